"""Faces of many images at once, from the pixels that were searched to the full-size images: as Detect and Frame do it
face by face, operation by operation. NumPy only.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from facepipe.imaging.geometry import Frame
from facepipe.types import Float32, Float64, Int64


class Found(NamedTuple):
    """Faces of many images, flat: image (f,) rising, boxes (f, 4), landmarks (f, 5, 2), scores (f,) float32.

    By falling score within an image.
    """

    image: Int64
    boxes: Float32
    landmarks: Float32
    scores: Float32

    @classmethod
    def joined(cls, parts: "Iterable[Found]") -> "Found":
        """The faces of several searches, no image of which is in two."""
        image, *rest = (np.concatenate(columns) for columns in zip(_NONE, *parts, strict=True))
        order = np.argsort(image, kind="stable")
        return cls(image[order], *(values[order] for values in rest))

    def whose_least(self, score: float) -> "Found":
        """The faces of those images that have no face of a lower score."""
        low = np.unique(self.image[self.scores < score])
        keep = ~np.isin(self.image, low)
        return Found(self.image[keep], self.boxes[keep], self.landmarks[keep], self.scores[keep])

    def ordinals(self) -> Int64:
        """(f,) ordinal of each face in its image."""
        if not len(self.image):
            return self.image
        starts = np.flatnonzero(np.diff(self.image, prepend=-1))
        return np.arange(len(self.image)) - np.repeat(starts, np.diff(starts, append=len(self.image)))


_NONE = Found(
    *(np.empty(0, np.int64), np.empty((0, 4), np.float32), np.empty((0, 5, 2), np.float32), np.empty(0, np.float32))
)


class Frames(NamedTuple):
    """Where images' decoded pixels lie in the full-size ones: scale (n,), left and top (n, 2)."""

    scale: Float64
    corner: Float64

    @classmethod
    def of(cls, frames: Iterable[Frame]) -> "Frames":
        rows = np.array([*frames], np.float64).reshape(-1, 3)
        return cls(rows[:, 0], rows[:, 1:])

    def to_full(self, points: Float32, image: Int64) -> Float32:
        """Points (f, p, 2) of the decoded pixels of images (f,) in the full ones."""
        half = np.float32(0.5)
        scale = self.scale[image].astype(np.float32)[:, None, None]
        return ((points + half) / scale - half + self.corner[image][:, None]).astype(np.float32)

    def from_full(self, points: Float64, image: Int64) -> Float64:
        """Points (f, p, 2) of full images in their decoded pixels."""
        return (points - self.corner[image][:, None] + 0.5) * self.scale[image][:, None, None] - 0.5


def full_size(found: Found, frames: Frames, sizes: Float64, min_face: float) -> Found:
    """In pixels of the full-size images, whose (width, height) are sizes (n, 2); without faces that are too small, and
    without those whose middle is outside: a mirrored border mirrors faces as well.
    """
    boxes = frames.to_full(found.boxes.reshape(-1, 2, 2), found.image).reshape(-1, 4)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    inside = ((centre >= 0) & (centre <= sizes[found.image] - 1)).all(1)
    keep = np.flatnonzero(inside & ((boxes[:, 2:] - boxes[:, :2]).min(1, initial=np.inf) >= min_face))
    landmarks = frames.to_full(found.landmarks, found.image)
    return Found(found.image[keep], boxes[keep], landmarks[keep], found.scores[keep])


def restored(points: Float32, ways: Float64) -> Float32:
    """Points (f, p, 2) of a detector's input in the images' pixels; ways (f, 4): sx, sy, left, top of its letterbox."""
    half = np.float32(0.5)
    scale = (1 / ways[:, None, :2]).astype(np.float32)
    return ((points - ways[:, None, 2:].astype(np.float32) + half) * scale - half).astype(np.float32)
