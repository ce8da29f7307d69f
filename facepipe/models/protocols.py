"""What the stages expect of a detector and of an embedder."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from facepipe.types import Float32, Int64, UInt8Image


class Faces(NamedTuple):
    """Faces of one image in its pixels, by falling score.

    Attributes:
        boxes: (n, 4) x1 y1 x2 y2.
        landmarks: (n, 5, 2) left eye, right eye, nose, left and right corner of the mouth, as seen in the image.
        scores: (n,).
        turns: (n,) degrees clockwise by which faces lie in the image: 0, 90, 180 or 270. None: all are upright.
    """

    boxes: Float32
    landmarks: Float32
    scores: Float32
    turns: Int64 | None = None


@dataclass(frozen=True)
class DetectionLimits:
    """Which faces a detector keeps.

    Attributes:
        min_score: Lowest score.
        max_iou: Highest overlap of two faces, as intersection over union.
    """

    min_score: float
    max_iou: float


class Detector(Protocol):
    """A model that finds faces.

    Attributes:
        stride: Image sides must be multiples of it.
    """

    stride: int

    def detect(self, images: Sequence[UInt8Image]) -> list[Faces]:
        """Find the faces of each image.

        Args:
            images: (h, w, 3) RGB of any sizes that `stride` divides. The detector makes its own batches.
        """


@runtime_checkable
class CanAbstain(Detector, Protocol):
    """A detector whose low scores are meaningful: they mark what may be a face but is too small to tell."""

    def detect_confident(
        self, images: Sequence[UInt8Image], *, reject_below: float, accept_above: float
    ) -> list[Faces | None]:
        """Find the faces of those images whose result is beyond doubt.

        Args:
            images: (h, w, 3) RGB, as for `detect`.
            reject_below: What scores less is not a face.
            accept_above: What scores this or more is a face.

        Returns:
            The faces of each image. None if an image has no face, or if something scores between the two bounds.
        """


@runtime_checkable
class KnowsPlaces(Detector, Protocol):
    """What stands in for a detector if it is known where faces are: the size of an image is enough."""

    def locate_face(self, width: int, height: int) -> Faces:
        """Locate the face of an image of some size, in its pixels."""


class Embedder(Protocol):
    """A model that turns an aligned chip into a vector.

    Attributes:
        size: (width, height) of a chip.
        dim: Length of a vector.
    """

    size: tuple[int, int]
    dim: int

    def embed(self, chips: UInt8Image) -> Float32:
        """Embed chips.

        Args:
            chips: (n, h, w, 3) RGB.

        Returns:
            Raw vectors (n, dim), not normalised.
        """


class QualityModel(Protocol):
    """A model that says how useful an aligned chip is for recognition.

    Attributes:
        size: (width, height) of a chip.
    """

    size: tuple[int, int]

    def score(self, chips: UInt8Image) -> Float32:
        """Score chips (n, h, w, 3) RGB: (n,), higher is better. Scores of two models cannot be compared."""


@runtime_checkable
class RunsOnDevice(Protocol):
    """A model whose networks run on a torch device, in a precision and in batches that can be chosen."""

    def configure(self, precision: str, max_batch: int) -> None:
        """Choose how the networks run. Call it once, before the first image.

        Args:
            precision: float32, tf32, bfloat16 or float16.
            max_batch: images per batch of a GPU, at most.
        """
