"""Detect: pixels to faces, in coordinates of the oriented full-size image."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import ClassVar, NamedTuple

import cv2
import numpy as np
import pyarrow as pa

from facepipe.arrow import read_frames, set_columns, to_ragged_lists, view_images
from facepipe.imaging.geometry import Frame
from facepipe.models.protocols import CanAbstain, DetectionLimits, Detector, Faces
from facepipe.models.runtime.device import resolve_device
from facepipe.models.zoo.registry import find_card
from facepipe.schema import NO_FACE, OK
from facepipe.types import Float32, UInt8Image

Search = Callable[[UInt8Image], Sequence[Faces | None]]

# Of a quick look: from this score on something may be a face, and from that on it is one (docs/performance.md).
DOUBTFUL, CERTAIN = 0.02, 0.9


class Letterbox(NamedTuple):
    """A detector's input and the way back: x = (x' - left) / sx and likewise y, about pixel centres."""

    pixels: UInt8Image
    sx: float
    sy: float
    left: int
    top: int


@dataclass(frozen=True)
class Detect:
    """Finds faces with a registered detector.

    size: longest side given to the detector; images are shrunk to it, never enlarged
    quick_look: images are first searched at this size; where all faces found there are certain, and nothing else looks
        like one, that is the result (RetinaFace only; 0: always `size`)
    border_below: images no longer than this get a mirrored border of a quarter of their sides, which helps with faces
        that fill the frame (LFW crops)
    second_look: images without a face are searched once more at half `size` with such a border (close-ups)
    min_score, max_iou: lowest confidence kept, highest overlap of two faces
    min_face: shorter side of the smallest box kept, in pixels of the full-size image
    batch: images of one shape given to a GPU at a time
    device: cpu, cuda, or auto (what the plan gives, else a GPU if there is one); threads: on a CPU
    """

    model: str = "retinaface-mnet025"
    size: int = 640
    quick_look: int = 384
    border_below: int = 320
    second_look: bool = True
    min_score: float = 0.7
    max_iou: float = 0.4
    min_face: float = 12.0
    batch: int = 8
    device: str = "auto"
    threads: int = 1

    needs: ClassVar = (
        *("pixels", "pixels_width", "pixels_height", "pixels_scale", "pixels_left", "pixels_top"),
        *("width", "height", "status"),
    )
    adds: ClassVar = ("boxes", "points", "scores")

    @cached_property
    def detector(self) -> Detector:
        loaded: Detector = find_card(self.model, "detector").load(
            resolve_device(self.device), self.threads, DetectionLimits(self.min_score, self.max_iou)
        )
        return loaded

    def setup(self) -> None:
        cv2.setNumThreads(1)
        _ = self.detector

    def __call__(self, table: pa.Table) -> pa.Table:
        faces = self.detect_faces({n: pixels for n, pixels in enumerate(view_images(table)) if pixels is not None})
        sizes = zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True)
        results = [
            self._full_size(faces[n], frame, size) if n in faces else _NONE
            for n, (frame, size) in enumerate(zip(read_frames(table), sizes, strict=True))
        ]
        status = [
            (OK if len(found.scores) else NO_FACE) if before == OK else before
            for found, before in zip(results, table["status"].to_pylist(), strict=True)
        ]
        columns = {
            "status": pa.array(status, pa.string()),
            "boxes": to_ragged_lists([found.boxes for found in results]),
            "points": to_ragged_lists([found.landmarks for found in results]),
            "scores": to_ragged_lists([found.scores for found in results]),
        }
        return set_columns(table, columns)

    def detect_faces(self, pixels: dict[int, UInt8Image]) -> dict[int, Faces]:
        """The faces of images (h, w, 3) RGB by number, in those images' pixels."""
        faces = self._quick(pixels)
        faces |= self._search({n: self.letterbox(p, self.size) for n, p in pixels.items() if n not in faces})
        if self.second_look:
            missed = [n for n, found in faces.items() if not len(found.scores)]
            again = {n: self._closer(pixels[n]) for n in missed if max(pixels[n].shape[:2]) > self.border_below}
            faces |= self._search(again)
        return faces

    def _quick(self, pixels: dict[int, UInt8Image]) -> dict[int, Faces]:
        """The faces of those images that a smaller input is enough for."""
        detector = self.detector
        if not self.quick_look or not isinstance(detector, CanAbstain):
            return {}
        inputs = {
            n: self.letterbox(p, self.quick_look)
            for n, p in pixels.items()
            if min(self.size, max(p.shape[:2])) > self.quick_look
        }
        reject_below = min(DOUBTFUL, self.min_score)
        accept_above = max(CERTAIN, self.min_score)
        detect = partial(detector.detect_confident, reject_below=reject_below, accept_above=accept_above)
        return self._search(inputs, detect)

    def _search(self, inputs: dict[int, Letterbox], detect: Search | None = None) -> dict[int, Faces]:
        """Faces in the pixels that were letterboxed, detected in batches of one shape; without those of None."""
        detect = detect or self.detector.detect
        buckets: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for n, box in inputs.items():
            buckets[box.pixels.shape].append(n)
        found: dict[int, Faces] = {}
        for rows in buckets.values():
            for start in range(0, len(rows), self.batch):
                part = rows[start : start + self.batch]
                stacked = inputs[part[0]].pixels[None] if len(part) == 1 else np.stack([inputs[n].pixels for n in part])
                looks = zip(part, detect(stacked), strict=True)
                found |= {n: _restore(faces, inputs[n]) for n, faces in looks if faces is not None}
        return found

    def letterbox(self, pixels: UInt8Image, size: int) -> Letterbox:
        """Shrunk to `size` and padded to the detector's stride."""
        pixels, (sx, sy) = shrink_image(pixels, size)
        small_h, small_w = pixels.shape[:2]
        if max(small_h, small_w) <= self.border_below:
            top, bottom = self._mirror(small_h)
            left, right = self._mirror(small_w)
            pixels = cv2.copyMakeBorder(pixels, top, bottom, left, right, cv2.BORDER_REFLECT_101)
            return Letterbox(pixels, sx, sy, left, top)
        bottom, right = -small_h % self.detector.stride, -small_w % self.detector.stride
        if bottom or right:
            pixels = cv2.copyMakeBorder(pixels, 0, bottom, 0, right, cv2.BORDER_CONSTANT)
        return Letterbox(pixels, sx, sy, 0, 0)

    def _closer(self, pixels: UInt8Image) -> Letterbox:
        return self.letterbox(pixels, min(self.size // 2, self.border_below))

    def _mirror(self, side: int) -> tuple[int, int]:
        """Border before and after: half the side in all, to the nearest multiple of the stride."""
        stride = self.detector.stride
        total = max(stride * round(1.5 * side / stride), side + (-side % stride)) - side
        return total // 2, total - total // 2

    def _full_size(self, faces: Faces, frame: Frame, size: tuple[int, int]) -> Faces:
        boxes = frame.to_full(faces.boxes.reshape(-1, 2, 2)).reshape(-1, 4)
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2
        inside = ((centre >= 0) & (centre <= np.array(size) - 1)).all(1)  # a mirrored border mirrors faces as well
        keep = np.flatnonzero(inside & ((boxes[:, 2:] - boxes[:, :2]).min(1, initial=np.inf) >= self.min_face))
        return Faces(boxes[keep], frame.to_full(faces.landmarks)[keep], faces.scores[keep])


def shrink_image(pixels: UInt8Image, size: int) -> tuple[UInt8Image, tuple[float, float]]:
    """(pixels whose longer side is at most `size`, scales of x and y).

    Halved by averages, then bilinear, which down to a half skips no pixel; averaging to any size takes five times as
    long.
    """
    sx = sy = 1.0
    while max(h := pixels.shape[0], w := pixels.shape[1]) > 2 * size and min(h, w) > 1:
        half = (w // 2, h // 2)
        pixels = np.asarray(
            cv2.resize(pixels[: 2 * half[1], : 2 * half[0]], half, interpolation=cv2.INTER_AREA), np.uint8
        )
        sx, sy = sx / 2, sy / 2
    scale = size / max(h, w)
    if scale < 1:
        wanted = (max(1, round(w * scale)), max(1, round(h * scale)))
        pixels = np.asarray(cv2.resize(pixels, wanted, interpolation=cv2.INTER_LINEAR), np.uint8)
        sx, sy = sx * wanted[0] / w, sy * wanted[1] / h
    return pixels, (sx, sy)


_NONE = Faces(np.empty((0, 4), np.float32), np.empty((0, 5, 2), np.float32), np.empty(0, np.float32))


def _restore(faces: Faces, box: Letterbox) -> Faces:
    shift = np.array([box.left, box.top], np.float32)
    scale = np.array([1 / box.sx, 1 / box.sy], np.float32)
    boxes = _scaled(faces.boxes.reshape(-1, 2, 2) - shift, scale).reshape(-1, 4)
    return Faces(boxes, _scaled(faces.landmarks - shift, scale), faces.scores)


def _scaled(points: Float32, scale: Float32) -> Float32:
    """Points about pixel centres: a pixel's centre is at a whole coordinate."""
    return ((points + 0.5) * scale - 0.5).astype(np.float32)
