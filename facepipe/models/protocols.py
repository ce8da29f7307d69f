"""What a detector and an embedder are to the stages."""

from typing import NamedTuple, Protocol, runtime_checkable

from facepipe.types import Float32, UInt8Image


class Faces(NamedTuple):
    """Faces of one image in its pixels, by falling score.

    boxes (n, 4) x1 y1 x2 y2; landmarks (n, 5, 2): left eye, right eye, nose, left and right mouth corner as seen in
    the image; scores (n,). All float32.
    """

    boxes: Float32
    landmarks: Float32
    scores: Float32


class Detector(Protocol):
    """Finds faces. `stride`: image sides must be multiples of it."""

    stride: int

    def detect(self, images: UInt8Image) -> list[Faces]:
        """images (n, h, w, 3) RGB -> the faces of each."""


@runtime_checkable
class CanAbstain(Detector, Protocol):
    """A detector whose low scores mean something too: that there may be a face, seen too small to tell."""

    def detect_confident(self, images: UInt8Image, doubtful: float, sure: float) -> list[Faces | None]:
        """The faces of each image where all are surely some; None where there is none, or where something else scores
        `doubtful` or more and less than `sure`.
        """


class Embedder(Protocol):
    """Makes one vector of one aligned chip of `size` (width, height)."""

    size: tuple[int, int]
    dim: int

    def embed(self, chips: UInt8Image) -> Float32:
        """chips (n, h, w, 3) RGB -> raw vectors (n, dim), not normalised."""
