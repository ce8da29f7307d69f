"""Stages that make training chips: choose the subject of a picture, use faces that are known, encode chips as JPEG."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import cv2
import numpy as np
import pyarrow as pa

from facepipe.arrow import pack_arrays, set_columns, view_buffers, view_images
from facepipe.hashing import compute_face_id
from facepipe.models.zoo.registry import find_chip_layout
from facepipe.schema import OK, READ_ERROR
from facepipe.types import Float32, UInt8Image

# Columns of work items that tell the faces of an image: its hash, then one value (or 4, or 10) per face.
GIVEN_COLUMNS = pa.schema(
    [
        ("given_image", pa.string()),
        ("given_faces", pa.list_(pa.int64())),
        ("given_identities", pa.list_(pa.string())),
        ("given_boxes", pa.list_(pa.float32())),
        ("given_points", pa.list_(pa.float32())),
        ("given_scores", pa.list_(pa.float32())),
        ("given_turns", pa.list_(pa.float32())),
    ]
)
# How much the distance from the centre counts against the area, squared pixels both.
_CENTRE_WEIGHT = 2.0
_PIXEL_COLUMNS = ("pixels", "pixels_width", "pixels_height", "pixels_scale", "pixels_left", "pixels_top")
# JPEG without chroma subsampling: training chips keep their colours at full resolution.
_FULL_CHROMA = (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)


def compute_prominence(boxes: Float32, size: Float32) -> Float32:
    """Compute how prominent faces are. The subject of an image is the face with the highest value.

    This is the face's area less twice its squared distance from the image's centre, the rule by which LFW is aligned
    (D. Sandberg's facenet, align_dataset_mtcnn).

    Args:
        boxes: x1 y1 x2 y2, (n, 4).
        size: width and height of each face's image, (n, 2), or of the one image, (2,).

    Returns:
        Square pixels, (n,).
    """
    squared_offset = ((boxes[:, :2] + boxes[:, 2:]) / 2 - size / 2) ** 2
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return np.asarray(area - _CENTRE_WEIGHT * squared_offset.sum(1), np.float32)


class _ChosenFace(NamedTuple):
    """The face that is left of an image: its values as lists, as in the columns of Detect, and which face it was."""

    boxes: Any
    points: Any
    scores: Any
    turns: Any
    subject: int


@dataclass(frozen=True)
class Subject:
    """Keep the subject of each image, and drop its other faces. It follows Detect.

    The column `subject` is the ordinal of the face among those that were detected.
    """

    needs: ClassVar = ("boxes", "points", "scores", "turns", "width", "height")
    adds: ClassVar = ("subject",)

    def setup(self) -> None:
        """Do nothing: there is nothing to load."""

    def __call__(self, table: pa.Table) -> pa.Table:
        """Keep one face per image."""
        rows = zip(*(table[name].to_pylist() for name in self.needs), strict=True)
        # Rows without faces and with one face pass through unchanged.
        chosen = [self._choose_face(*row) for row in rows]
        columns: dict[str, Any] = {
            name: pa.array([getattr(face, name) for face in chosen], table.schema.field(name).type)
            for name in ("boxes", "points", "scores", "turns")
        }
        columns["subject"] = pa.array([face.subject for face in chosen], pa.int16())
        return set_columns(table, columns)

    def _choose_face(self, boxes: Any, points: Any, scores: Any, turns: Any, width: int, height: int) -> _ChosenFace:
        """Choose the most prominent face of an image."""
        if not scores or len(scores) < 2:
            return _ChosenFace(boxes, points, scores, turns, 0)
        size = np.array([width, height], np.float32)
        best = int(np.argmax(compute_prominence(np.array(boxes, np.float32).reshape(-1, 4), size)))
        # Numbers of landmarks per face: the lists are flat.
        numbers = len(points) // len(scores)
        return _ChosenFace(
            boxes[4 * best : 4 * best + 4],
            points[numbers * best : numbers * (best + 1)],
            [scores[best]],
            [turns[best]],
            best,
        )


@dataclass(frozen=True)
class KnownFaces:
    """Use the gallery's faces instead of running Detect, if the image is unchanged."""

    stage_name: ClassVar = "given"
    needs: ClassVar = ("pixels", "image_id", "status", "error", *GIVEN_COLUMNS.names)
    adds: ClassVar = ("boxes", "points", "scores", "turns")

    def setup(self) -> None:
        """Do nothing: there is nothing to load."""

    def __call__(self, table: pa.Table) -> pa.Table:
        """Copy the known faces of unchanged images; set the status of changed ones to `read_error`."""
        # Known faces count only for images that were read and still have the hash they were embedded with.
        statuses = table["status"].to_pylist()
        errors = table["error"].to_pylist()
        known_ids = table["given_image"].to_pylist()
        is_usable = []
        for row, (image_id, known_id) in enumerate(zip(table["image_id"].to_pylist(), known_ids, strict=True)):
            is_unchanged = image_id == known_id
            is_usable.append(statuses[row] == OK and is_unchanged)
            if statuses[row] == OK and not is_unchanged:
                statuses[row] = READ_ERROR
                errors[row] = "the file has changed since it was embedded"
        # Unusable rows get empty lists, as if no face had been detected.
        columns: dict[str, Any] = {}
        for name in self.adds:
            values = zip(table[f"given_{name}"].to_pylist(), is_usable, strict=True)
            columns[name] = pa.array([value if usable else [] for value, usable in values], pa.list_(pa.float32()))
        columns["status"] = pa.array(statuses, pa.string())
        columns["error"] = pa.array(errors, pa.string())
        return set_columns(table, columns)


@dataclass(frozen=True)
class WholeImage:
    """Make the whole picture, which is a face crop, the chip. It replaces Detect and Align.

    Of a picture of another shape the centre is used.

    Attributes:
        embedder: model whose chip size the picture is scaled to
    """

    embedder: str = "dlib-resnet"

    stage_name: ClassVar = "whole"
    needs: ClassVar = ("bytes", *_PIXEL_COLUMNS)
    adds: ClassVar = ("face_index", "chip")
    drops: ClassVar = ("bytes", *_PIXEL_COLUMNS)

    @cached_property
    def _size(self) -> tuple[int, int]:
        return find_chip_layout(self.embedder).size

    def setup(self) -> None:
        """Look the size of chips up."""
        cv2.setNumThreads(1)
        _ = self._size

    def __call__(self, table: pa.Table) -> pa.Table:
        """Replace the pixels by a chip."""
        chips = [None if pixels is None else crop_to_size(pixels, self._size) for pixels in view_images(table)]
        indices = pa.array([None if chip is None else 0 for chip in chips], pa.int16())
        return set_columns(table, {"face_index": indices, "chip": pack_arrays(chips)}, drop=self.drops)


def crop_to_size(pixels: UInt8Image, size: tuple[int, int]) -> UInt8Image:
    """Crop the centre of a picture to the shape of `size` (width, height), and scale it to that size."""
    height, width = pixels.shape[:2]
    # Scale at which the picture covers the size; what reaches past it is cut off, half on each side.
    scale = max(size[0] / width, size[1] / height)
    crop_width = min(width, round(size[0] / scale))
    crop_height = min(height, round(size[1] / scale))
    left = (width - crop_width) // 2
    top = (height - crop_height) // 2
    # Averaging avoids aliasing if the picture shrinks.
    kernel = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    centre = pixels[top : top + crop_height, left : left + crop_width]
    return np.asarray(cv2.resize(centre, size, interpolation=kernel), np.uint8)


@dataclass(frozen=True)
class Encode:
    """Encode chips as JPEGs in the column `thumb`, without chroma subsampling, and add each face's id and identity.

    Attributes:
        embedder: model whose layout the chips have
        quality: JPEG quality, 1 to 100
    """

    embedder: str = "dlib-resnet"
    quality: int = 95

    needs: ClassVar = ("uri", "image_id", "identity", "face_index", "chip")
    adds: ClassVar = ("thumb", "face_id")

    @cached_property
    def _size(self) -> tuple[int, int]:
        return find_chip_layout(self.embedder).size

    def setup(self) -> None:
        """Look the size of chips up."""
        cv2.setNumThreads(1)
        _ = self._size

    def __call__(self, table: pa.Table) -> pa.Table:
        """Replace the chips by JPEGs."""
        pictures = [None if view is None else self._encode_jpeg(view) for view in view_buffers(table["chip"])]
        columns: dict[str, Any] = {"thumb": pa.array(pictures, pa.binary())}
        indices = table["face_index"].to_pylist()
        if "given_faces" in table.column_names:
            # Faces of a gallery keep their ids and identities.
            columns["face_id"] = pa.array(_pick_elements(table["given_faces"], indices), pa.int64())
            columns["identity"] = pa.array(_pick_elements(table["given_identities"], indices), pa.string())
        else:
            columns["face_id"] = pa.array(self._compute_face_ids(table, indices), pa.int64())
        return set_columns(table, columns, drop=("chip",))

    def _compute_face_ids(self, table: pa.Table, indices: list[int | None]) -> list[int | None]:
        """Compute the ids that the gallery would give to the faces; None for rows without a face."""
        # Subject leaves one face per image, whose ordinal among all faces is in its own column.
        ordinals = table["subject"].to_pylist() if "subject" in table.column_names else indices
        rows = zip(table["uri"].to_pylist(), table["image_id"].to_pylist(), indices, ordinals, strict=True)
        return [
            None if index is None else compute_face_id(uri, image_id or "", ordinal)
            for uri, image_id, index, ordinal in rows
        ]

    def _encode_jpeg(self, view: memoryview) -> bytes:
        width, height = self._size
        chip = np.frombuffer(view, np.uint8).reshape(height, width, 3)
        options = [cv2.IMWRITE_JPEG_QUALITY, self.quality, *_FULL_CHROMA]
        return bytes(cv2.imencode(".jpg", cv2.cvtColor(chip, cv2.COLOR_RGB2BGR), options)[1])


def _pick_elements(column: pa.ChunkedArray, indices: list[int | None]) -> list[Any]:
    """Pick one element of each row's list; None for rows without an index."""
    return [None if index is None else values[index] for values, index in zip(column.to_pylist(), indices, strict=True)]
