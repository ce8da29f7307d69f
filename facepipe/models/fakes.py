"""A deterministic detector and embedder without weights, for tests and for simulating runs of any size."""

import ctypes
from collections.abc import Sequence

import cv2
import numpy as np

from facepipe.models.protocols import Faces
from facepipe.types import Float32, UInt8Image

_MIN_AREA = 16
# Landmarks as shares of the rectangle's sides.
_LANDMARKS = np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]], np.float32)


class FakeDetector:
    """A detector for which a face is a red rectangle (r > 180, g and b < 80).

    Attributes:
        stride: Image sides must be multiples of it.
    """

    stride = 8

    def detect(self, images: Sequence[UInt8Image]) -> list[Faces]:
        """Find the red rectangles of each image, the largest first; see `Detector`."""
        return [self._detect_one(image) for image in images]

    def _detect_one(self, image: UInt8Image) -> Faces:
        is_red = (image[..., 0] > 180) & (image[..., 1] < 80) & (image[..., 2] < 80)
        # Left, top, width, height and area of each region; the first one is the background.
        regions = cv2.connectedComponentsWithStats(is_red.astype(np.uint8))[2][1:]
        regions = regions[regions[:, cv2.CC_STAT_AREA] >= _MIN_AREA]
        regions = regions[np.argsort(-regions[:, cv2.CC_STAT_AREA], kind="stable")]
        corner = regions[:, :2].astype(np.float32)
        sides = regions[:, 2:4].astype(np.float32)
        area = regions[:, cv2.CC_STAT_AREA]
        return Faces(
            boxes=np.concatenate([corner, corner + sides], 1),
            landmarks=corner[:, None] + _LANDMARKS * sides[:, None],
            scores=(area / (area + 100.0)).astype(np.float32),
        )


class FatalDetector(FakeDetector):
    """A FakeDetector that kills its process at an image with a magenta corner, as a fault in native code would."""

    def _detect_one(self, image: UInt8Image) -> Faces:
        red, green, blue = map(int, image[:4, :4].reshape(-1, 3).mean(0))
        if red > 200 and green < 60 and blue > 200:
            ctypes.string_at(0)  # a real SIGSEGV
        return super()._detect_one(image)


class FakeEmbedder:
    """An embedder of 126 mean colours on a 7x6 grid and two constants, which tell chips apart.

    Attributes:
        dim: Length of a vector.
        size: (width, height) of a chip.
    """

    dim = 128
    size = (32, 32)

    def embed(self, chips: UInt8Image) -> Float32:
        """Embed chips; see `Embedder`."""
        grids = [cv2.resize(chip, (7, 6), interpolation=cv2.INTER_AREA).astype(np.float32).ravel() for chip in chips]
        colours = np.stack(grids) / 255 if grids else np.empty((0, 126), np.float32)
        return np.concatenate([colours, np.full((len(colours), 2), 0.5, np.float32)], 1)
