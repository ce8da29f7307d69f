"""Images that are aligned crops already, as in training sets of the field: the face is where the template has it."""

from collections.abc import Sequence

import numpy as np

from facepipe.imaging.alignment import scale_arcface_template
from facepipe.models.protocols import Faces
from facepipe.types import UInt8Image

# The box that RetinaFace finds, in 112x112 crops: medians over the 3,811 faces of LFW-dev, brought to the template.
BOX_112 = ((15.9, 11.3), (95.0, 118.3))
_SIDE = 112


class AlignedCrops:
    """Stands in for a detector. No network runs: each image is one face, and its landmarks are those of the template.

    The template is ArcFace's, scaled to the height of the image and centred in its width. So 112x112 crops are meant,
    enlarged ones, and SphereFace's 112x96.

    Attributes:
        stride: Image sides may be any.
    """

    stride = 1

    def detect(self, images: Sequence[UInt8Image]) -> list[Faces]:
        """Locate the face of each image.

        Args:
            images: (h, w, 3) RGB each.
        """
        return [self.locate_face(image.shape[1], image.shape[0]) for image in images]

    def locate_face(self, width: int, height: int) -> Faces:
        """Locate the face of an image of some size."""
        scale = height / _SIDE
        shift = (width - _SIDE * scale) / 2
        box = np.array(BOX_112) * scale + (shift, 0)
        landmarks = np.array(scale_arcface_template((width, height)))
        return Faces(
            boxes=box.reshape(1, 4).astype(np.float32),
            landmarks=landmarks.reshape(1, 5, 2).astype(np.float32),
            scores=np.ones(1, np.float32),
        )
