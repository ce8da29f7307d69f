"""Which faces of the gallery decisions mean: by face id, or else by the image's content and the box."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.gallery.table import Gallery
from facepipe.sorted_lookup import find_sorted
from facepipe.types import Float32, Int64

MIN_OVERLAP = 0.5
"""Smallest overlap (intersection over union) of two boxes that mean one face."""

_COLUMNS = ("face_id", "image_id", "box")
_NO_BOX = (np.nan, np.nan, np.nan, np.nan)
_KEYS_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class FaceKeys:
    """What names n faces: ids, and the content from which a face is found under another id.

    Attributes:
        face_id: (n,) ids; -1 for none.
        image_id: texts; null for none.
        box: (n, 4) x1, y1, x2, y2 in pixels; NaN for none.
    """

    face_id: Int64
    image_id: pa.Array
    box: Float32

    def __len__(self) -> int:
        return len(self.face_id)

    @classmethod
    def from_rows(cls, rows: pa.Table, prefix: str = "") -> "FaceKeys":
        """Take the keys of the first faces of rows, or of the others if the prefix is `other_`."""
        return cls(
            to_ids(rows[f"{prefix}face_id"]),
            _combine(rows[f"{prefix}image_id"], pa.string()),
            to_boxes(rows[f"{prefix}box"]),
        )

    def take(self, positions: Int64) -> "FaceKeys":
        """Take some of the keys."""
        return FaceKeys(self.face_id[positions], self.image_id.take(pa.array(positions)), self.box[positions])


def _combine(column: pa.Array | pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    # A column without a chunk may come back as a chunked array.
    return pa.concat_arrays(array.chunks or [pa.array([], kind)]) if isinstance(array, pa.ChunkedArray) else array


def to_ids(column: pa.Array | pa.ChunkedArray) -> Int64:
    """Convert a column of ids to an array (n,); -1 for null."""
    ids: Int64 = pc.fill_null(column, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    return ids


def to_boxes(column: pa.Array | pa.ChunkedArray) -> Float32:
    """Convert a column of boxes to an array (n, 4); NaN for null and for lists of another length."""
    array = _combine(column, pa.list_(pa.float32()))
    boxes = np.full((len(array), 4), np.nan, np.float32)
    is_box = pc.fill_null(pc.equal(pc.list_value_length(array), 4), False).to_numpy(zero_copy_only=False)
    values = array.filter(pa.array(is_box)).flatten().to_numpy(zero_copy_only=False)
    boxes[is_box] = values.reshape(-1, 4)
    return boxes


def compute_overlaps(boxes: Float32, others: Float32) -> Float32:
    """Compute the overlap (intersection over union) of pairs of boxes, (n, 4) and (n, 4); 0 if one is NaN."""
    low = np.maximum(boxes[:, :2], others[:, :2])
    high = np.minimum(boxes[:, 2:], others[:, 2:])
    common = np.prod(np.maximum(high - low, 0), axis=1)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) + np.prod(others[:, 2:] - others[:, :2], axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        overlaps = common / (areas - common)
    return np.nan_to_num(overlaps.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)


def read_faces(gallery: Gallery, key: str, values: pa.Array) -> pa.Table:
    """Read the faces whose key is among some values; memory grows with these faces only.

    Args:
        gallery: the gallery.
        key: `face_id`, `image_id` or `uri`.
        values: the values.

    Returns:
        Rows with face_id, image_id and box, and with the key.
    """
    columns = list(dict.fromkeys((*_COLUMNS, key)))
    parts = list(gallery.read_chosen_rows(key, values, columns)) if len(values) else []
    faces = [part.filter(part["face_id"].is_valid()) for part in parts]
    return pa.concat_tables(faces) if faces else _make_empty(key)


def _make_empty(key: str) -> pa.Table:
    kinds = {"face_id": pa.int64(), "image_id": pa.string(), "box": pa.list_(pa.float32()), key: pa.string()}
    kinds["face_id"] = pa.int64()
    return pa.schema(list(kinds.items())).empty_table()


def find_faces(gallery: Gallery, keys: FaceKeys) -> FaceKeys:
    """Find the faces that keys mean in the gallery.

    A face is found by its id, if its box is that of the key. Else it is the face of the same image whose box overlaps
    most, and at least by half. So decisions survive moved files and new ids.

    Args:
        gallery: the gallery.
        keys: n keys.

    Returns:
        The faces, n keys as the gallery has them; the id is -1 for one that the gallery does not hold.
    """
    found = _FoundFaces(keys)
    for start in range(0, len(keys), _KEYS_AT_ONCE):
        part = slice(start, start + _KEYS_AT_ONCE)
        is_wanted = (found.face_id[part] < 0) & (keys.face_id[part] >= 0)
        ids = np.unique(keys.face_id[part][is_wanted])
        if len(ids):
            found.match_ids(read_faces(gallery, "face_id", pa.array(ids)))
    # What is left is looked for by its content.
    has_content = keys.image_id.is_valid().to_numpy(zero_copy_only=False) & ~np.isnan(keys.box[:, 0])
    wanted = np.flatnonzero((found.face_id < 0) & has_content)
    for start in range(0, len(wanted), _KEYS_AT_ONCE):
        part_of_wanted = wanted[start : start + _KEYS_AT_ONCE]
        images = pc.unique(keys.image_id.take(pa.array(part_of_wanted)))
        found.match_contents(part_of_wanted, read_faces(gallery, "image_id", images))
    return FaceKeys(found.face_id, pa.array(found.image_ids, pa.string()), found.box)


class _FoundFaces:
    """The faces that were found so far, in the order of the keys.

    Attributes:
        face_id: (n,) ids; -1 for one that was not found.
        image_ids: their images.
        box: (n, 4) their boxes.
    """

    def __init__(self, keys: FaceKeys):
        self._keys = keys
        self.face_id = np.full(len(keys), -1, np.int64)
        self.image_ids: list[str | None] = [None] * len(keys)
        self.box = np.full((len(keys), 4), np.nan, np.float32)

    def match_ids(self, faces: pa.Table) -> None:
        """Find keys by their ids among faces of the gallery."""
        keys = self._keys
        wanted = np.flatnonzero((keys.face_id >= 0) & (self.face_id < 0))
        present = FaceKeys.from_rows(faces)
        order = np.argsort(present.face_id, kind="stable")
        at = find_sorted(present.face_id[order], keys.face_id[wanted])
        positions = wanted[at >= 0]
        at = order[at[at >= 0]]
        # Another detector may give the id to another face of the image.
        has_box = ~np.isnan(keys.box[positions, 0]) & ~np.isnan(present.box[at, 0])
        is_same = compute_overlaps(keys.box[positions], present.box[at]) >= MIN_OVERLAP
        is_right = ~has_box | is_same
        self._note(positions[is_right], present, at[is_right])

    def match_contents(self, wanted: Int64, faces: pa.Table) -> None:
        """Find keys by image and box: of several faces the one that overlaps most, and of equals the smallest id."""
        present = FaceKeys.from_rows(faces)
        by_image: dict[str | None, list[int]] = {}
        images = present.image_id.to_pylist()
        for at in np.argsort(present.face_id, kind="stable").tolist():
            by_image.setdefault(images[at], []).append(at)
        for position in wanted.tolist():
            candidates = np.array(by_image.get(self._keys.image_id[position].as_py(), []), np.int64)
            if not len(candidates):
                continue
            box = np.repeat(self._keys.box[position : position + 1], len(candidates), axis=0)
            overlaps = compute_overlaps(box, present.box[candidates])
            best = int(np.argmax(overlaps))
            if overlaps[best] >= MIN_OVERLAP:
                self._note(np.array([position]), present, candidates[best : best + 1])

    def _note(self, positions: Int64, faces: FaceKeys, at: Int64) -> None:
        self.face_id[positions] = faces.face_id[at]
        self.box[positions] = faces.box[at]
        images = faces.image_id.take(pa.array(at)).to_pylist()
        for position, image_id in zip(positions.tolist(), images, strict=True):
            self.image_ids[position] = image_id


def to_box_column(boxes: Float32) -> pa.Array:
    """Convert boxes (n, 4) to a column; null for NaN."""
    rows: Iterable[list[float] | None] = (None if np.isnan(box[0]) else box.tolist() for box in boxes)
    return pa.array(list(rows), pa.list_(pa.float32()))
