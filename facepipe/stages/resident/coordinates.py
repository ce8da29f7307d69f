"""Faces of many images at once, mapped from the searched pixels to the full-size images. NumPy only.

The arithmetic is that of Detect and Frame, operation by operation, so that the results are the same.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from facepipe.imaging.geometry import Frame
from facepipe.imaging.quality import find_shown_faces
from facepipe.models.protocols import Faces
from facepipe.stages.detect import CLOSEUP_SHARE
from facepipe.stages.turned import get_turns
from facepipe.types import Bool, Float32, Float64, Int64


class FaceArrays(NamedTuple):
    """Faces of many images in flat arrays, by ascending image and descending score.

    Attributes:
        image: image of each face, (f,)
        boxes: x1 y1 x2 y2, (f, 4)
        landmarks: five points, (f, 5, 2)
        scores: confidences, (f,)
        turns: degrees clockwise by which faces lie in their images, (f,)
    """

    image: Int64
    boxes: Float32
    landmarks: Float32
    scores: Float32
    turns: Int64

    @classmethod
    def concatenate(cls, parts: "Iterable[FaceArrays]") -> "FaceArrays":
        """Concatenate the faces of several searches. No image may be in two of them."""
        # An empty part comes first, so that no parts at all work too. The stable sort keeps the order of scores.
        columns = [np.concatenate(arrays) for arrays in zip(_NO_FACES, *parts, strict=True)]
        image = columns[0]
        return cls(*columns)._take(np.argsort(image, kind="stable"))

    def keep_confident_images(self, min_score: float) -> "FaceArrays":
        """Keep the faces of those images that have no face below a score."""
        doubtful = np.unique(self.image[self.scores < min_score])
        return self._take(~np.isin(self.image, doubtful))

    def keep_scores(self, min_score: float) -> "FaceArrays":
        """Keep the faces that score at least so much."""
        return self._take(self.scores >= min_score)

    def keep_closeups(self, shapes: Int64) -> "FaceArrays":
        """Keep the faces that fill a good part of their images, whose heights and widths are (n, 2)."""
        sides = (self.boxes[:, 2:] - self.boxes[:, :2]).max(1, initial=0)
        return self._take(sides >= CLOSEUP_SHARE * shapes[self.image].min(1, initial=np.iinfo(np.int64).max))

    def leave_out_images(self, images: Int64) -> "FaceArrays":
        """Leave out the faces of some images."""
        return self._take(~np.isin(self.image, images))

    def split_images(self) -> dict[int, Faces]:
        """Split the faces by image. Images without a face are not in the result."""
        images, starts = np.unique(self.image, return_index=True)
        ends = np.append(starts, len(self.image))[1:]
        return {
            int(image): Faces(
                self.boxes[start:end], self.landmarks[start:end], self.scores[start:end], self.turns[start:end]
            )
            for image, start, end in zip(images, starts, ends, strict=True)
        }

    @classmethod
    def join_images(cls, faces: "dict[int, Faces]") -> "FaceArrays":
        """Join the faces of images by number."""
        return cls.concatenate(
            [
                cls(np.full(len(found.scores), image), found.boxes, found.landmarks, found.scores, get_turns(found))
                for image, found in faces.items()
            ]
        )

    def number_faces(self) -> Int64:
        """Assign numbers to the faces of each image from 0 on, (f,)."""
        if not len(self.image):
            return self.image
        # Faces of an image are consecutive: count from the start of each run.
        starts = np.flatnonzero(np.diff(self.image, prepend=-1))
        counts = np.diff(starts, append=len(self.image))
        return np.arange(len(self.image)) - np.repeat(starts, counts)

    def _take(self, index: Int64 | Bool) -> "FaceArrays":
        return FaceArrays(
            self.image[index], self.boxes[index], self.landmarks[index], self.scores[index], self.turns[index]
        )


_NO_FACES = FaceArrays(
    image=np.empty(0, np.int64),
    boxes=np.empty((0, 4), np.float32),
    landmarks=np.empty((0, 5, 2), np.float32),
    scores=np.empty(0, np.float32),
    turns=np.empty(0, np.int64),
)


class FrameArrays(NamedTuple):
    """Where the decoded pixels of images lie in the full-size images.

    Attributes:
        scale: decoded pixels per pixel of the full-size image, (n,)
        corner: left and top, (n, 2)
    """

    scale: Float64
    corner: Float64

    @classmethod
    def from_frames(cls, frames: Iterable[Frame]) -> "FrameArrays":
        """Collect the frames of images."""
        rows = np.array([*frames], np.float64).reshape(-1, 3)
        return cls(rows[:, 0], rows[:, 1:])

    def to_full(self, points: Float32, image: Int64) -> Float32:
        """Map points (f, p, 2) from the decoded pixels of images (f,) to the full-size images."""
        # float32 and float64 as in Frame, so that the results round alike.
        half = np.float32(0.5)
        scale = self.scale[image].astype(np.float32)[:, None, None]
        return ((points + half) / scale - half + self.corner[image][:, None]).astype(np.float32)

    def from_full(self, points: Float64, image: Int64) -> Float64:
        """Map points (f, p, 2) from full-size images (f,) to their decoded pixels."""
        return (points - self.corner[image][:, None] + 0.5) * self.scale[image][:, None, None] - 0.5


def to_full_size(faces: FaceArrays, frames: FrameArrays, sizes: Float64, min_face: float) -> FaceArrays:
    """Map faces to the full-size images, and drop small faces and those of a mirrored border.

    Args:
        faces: faces in decoded pixels.
        frames: frames of the images.
        sizes: width and height of the full-size images, (n, 2).
        min_face: minimum shorter side of a box, in pixels of the full-size image.
    """
    boxes = frames.to_full(faces.boxes.reshape(-1, 2, 2), faces.image).reshape(-1, 4)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    # A mirrored border mirrors faces too; their centres are outside the image.
    is_inside = ((centre >= 0) & (centre <= sizes[faces.image] - 1)).all(1)
    is_large = (boxes[:, 2:] - boxes[:, :2]).min(1, initial=np.inf) >= min_face
    landmarks = frames.to_full(faces.landmarks, faces.image)
    is_shown = find_shown_faces(boxes, landmarks, sizes[faces.image])
    keep = np.flatnonzero(is_inside & is_large & is_shown)
    return FaceArrays(faces.image[keep], boxes[keep], landmarks[keep], faces.scores[keep], faces.turns[keep])


def undo_letterbox(points: Float32, letterboxes: Float64) -> Float32:
    """Map points from a detector's input to the images that were letterboxed.

    Args:
        points: (f, p, 2).
        letterboxes: sx, sy, left, top of each face's letterbox, (f, 4).

    Returns:
        Points in pixels of the images, (f, p, 2).
    """
    half = np.float32(0.5)
    scale = (1 / letterboxes[:, None, :2]).astype(np.float32)
    return ((points - letterboxes[:, None, 2:].astype(np.float32) + half) * scale - half).astype(np.float32)
