"""Stages that make training chips: which face of a picture is meant, faces that are known already, and the JPEG."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa

from facepipe.arrow import pack_arrays, set_columns, view_buffers, view_images
from facepipe.hashing import compute_face_id
from facepipe.models.zoo.registry import find_chip_layout
from facepipe.schema import OK, READ_ERROR
from facepipe.types import Float32, UInt8Image

GIVEN_COLUMNS = pa.schema(
    [
        ("given_image", pa.string()),
        ("given_faces", pa.list_(pa.int64())),
        ("given_identities", pa.list_(pa.string())),
        ("given_boxes", pa.list_(pa.float32())),
        ("given_points", pa.list_(pa.float32())),
        ("given_scores", pa.list_(pa.float32())),
    ]
)
_CENTRE_WEIGHT = 2.0
_PIXELS = ("pixels", "pixels_width", "pixels_height", "pixels_scale", "pixels_left", "pixels_top")


def compute_prominence(boxes: Float32, size: Float32) -> Float32:
    """(n,) for boxes (n, 4) in images of (width, height) (n, 2) or (2,): the subject of an image has the largest.

    The face's area less twice its squared distance from the image's centre, the rule by which LFW is aligned
    (D. Sandberg's facenet, align_dataset_mtcnn).
    """
    off = ((boxes[:, :2] + boxes[:, 2:]) / 2 - size / 2) ** 2
    return np.asarray((boxes[:, 2:] - boxes[:, :2]).prod(1) - _CENTRE_WEIGHT * off.sum(1), np.float32)


@dataclass(frozen=True)
class Subject:
    """Stands behind Detect: of several faces in an image the subject stays; `subject` is which one that was."""

    needs: ClassVar = ("boxes", "points", "scores", "width", "height")
    adds: ClassVar = ("subject",)

    def setup(self) -> None:
        """Nothing to load."""

    def __call__(self, table: pa.Table) -> pa.Table:
        names = ("boxes", "points", "scores")
        rows = zip(*(table[name].to_pylist() for name in (*names, "width", "height")), strict=True)
        chosen = [self._one(*row) for row in rows]
        columns = zip(*chosen, strict=True) if chosen else ((), (), (), ())
        kinds = (*(table.schema.field(name).type for name in names), pa.int16())
        kept = zip((*names, "subject"), columns, kinds, strict=True)
        return set_columns(table, {name: pa.array(values, kind) for name, values, kind in kept})

    def _one(self, boxes: Any, points: Any, scores: Any, width: int, height: int) -> tuple[Any, Any, Any, int]:
        if not scores or len(scores) < 2:
            return boxes, points, scores, 0
        sizes = np.array([width, height], np.float32)
        best = int(np.argmax(compute_prominence(np.array(boxes, np.float32).reshape(-1, 4), sizes)))
        each = len(points) // len(scores)
        return boxes[4 * best : 4 * best + 4], points[each * best : each * (best + 1)], [scores[best]], best


@dataclass(frozen=True)
class KnownFaces:
    """Stands where Detect would: faces that a gallery holds, as long as the image is the one it holds."""

    stage_name: ClassVar = "given"
    needs: ClassVar = ("pixels", "image_id", "status", "error", *GIVEN_COLUMNS.names)
    adds: ClassVar = ("boxes", "points", "scores")

    def setup(self) -> None:
        """Nothing to load."""

    def __call__(self, table: pa.Table) -> pa.Table:
        seen, held = (np.array(table[name].to_pylist(), object) for name in ("image_id", "given_image"))
        status, error = (table[name].to_pylist() for name in ("status", "error"))
        usable = [ok == OK and same for ok, same in zip(status, seen == held, strict=True)]
        for n in (n for n, good in enumerate(usable) if not good and status[n] == OK):
            status[n], error[n] = READ_ERROR, "the file has changed since it was embedded"
        columns: dict[str, Any] = {
            name: pa.array(
                [x if good else [] for x, good in zip(table[f"given_{name}"].to_pylist(), usable, strict=True)],
                pa.list_(pa.float32()),
            )
            for name in self.adds
        }
        columns |= {"status": pa.array(status, pa.string()), "error": pa.array(error, pa.string())}
        return set_columns(table, columns)


@dataclass(frozen=True)
class WholeImage:
    """Stands where Detect and Align would: the picture is a face crop, scaled to the embedder's chip.

    Of a picture of another shape the middle is taken.
    """

    embedder: str = "dlib-resnet"

    stage_name: ClassVar = "whole"
    needs: ClassVar = ("bytes", *_PIXELS)
    adds: ClassVar = ("face_index", "chip")
    drops: ClassVar = ("bytes", *_PIXELS)

    @cached_property
    def _size(self) -> tuple[int, int]:
        return find_chip_layout(self.embedder).size

    def setup(self) -> None:
        cv2.setNumThreads(1)
        _ = self._size

    def __call__(self, table: pa.Table) -> pa.Table:
        chips = [None if pixels is None else crop_to_size(pixels, self._size) for pixels in view_images(table)]
        indices = pa.array([None if chip is None else 0 for chip in chips], pa.int16())
        return set_columns(table, {"face_index": indices, "chip": pack_arrays(chips)}, drop=self.drops)


def crop_to_size(pixels: UInt8Image, size: tuple[int, int]) -> UInt8Image:
    """The middle of a picture that has the shape of `size` (width, height), scaled to it."""
    height, width = pixels.shape[:2]
    scale = max(size[0] / width, size[1] / height)
    w, h = min(width, round(size[0] / scale)), min(height, round(size[1] / scale))
    left, top = (width - w) // 2, (height - h) // 2
    kernel = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    middle = pixels[top : top + h, left : left + w]
    return np.asarray(cv2.resize(middle, size, interpolation=kernel), np.uint8)


@dataclass(frozen=True)
class Encode:
    """Chips to JPEGs without chroma subsampling, in the column `thumb` of the rows, with the face's id and identity.

    embedder: whose chips these are; quality: 1-100
    """

    embedder: str = "dlib-resnet"
    quality: int = 95

    needs: ClassVar = ("uri", "image_id", "identity", "face_index", "chip")
    adds: ClassVar = ("thumb", "face_id")

    @cached_property
    def _size(self) -> tuple[int, int]:
        return find_chip_layout(self.embedder).size

    def setup(self) -> None:
        cv2.setNumThreads(1)
        _ = self._size

    def __call__(self, table: pa.Table) -> pa.Table:
        pictures = [None if view is None else self._jpeg(view) for view in view_buffers(table["chip"])]
        index = table["face_index"].to_pylist()
        which = table["subject"].to_pylist() if "subject" in table.column_names else index
        named = zip(*(table[name].to_pylist() for name in ("uri", "image_id")), index, which, strict=True)
        ids = [None if n is None else compute_face_id(uri, image or "", face) for uri, image, n, face in named]
        columns: dict[str, Any] = {"thumb": pa.array(pictures, pa.binary()), "face_id": pa.array(ids, pa.int64())}
        if "given_faces" in table.column_names:
            columns["face_id"] = pa.array(_picked(table["given_faces"], index), pa.int64())
            columns["identity"] = pa.array(_picked(table["given_identities"], index), pa.string())
        return set_columns(table, columns, drop=("chip",))

    def _jpeg(self, view: memoryview) -> bytes:
        chip = np.frombuffer(view, np.uint8).reshape(self._size[1], self._size[0], 3)
        options = [cv2.IMWRITE_JPEG_QUALITY, self.quality, *_FULL_CHROMA]
        return bytes(cv2.imencode(".jpg", cv2.cvtColor(chip, cv2.COLOR_RGB2BGR), options)[1])


_FULL_CHROMA = (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)


def _picked(column: pa.ChunkedArray, index: list[int | None]) -> list[Any]:
    """Of each row's list the element of its face."""
    return [None if n is None else values[n] for values, n in zip(column.to_pylist(), index, strict=True)]
