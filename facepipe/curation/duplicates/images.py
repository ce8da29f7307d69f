"""Images of a table of faces, numbered by what is kept first: of two copies the one with the smaller number stays."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.curation.duplicates.rule import Keep
from facepipe.types import Bool, Int64

_BY_SIZE = [("pixels", "descending"), ("file_size", "descending")]
_BY_SHARPNESS, _BY_AGE = [("sharpness", "descending")], [("ingested_at", "ascending")]
_ORDER: dict[Keep, list[tuple[str, str]]] = {
    "largest": [*_BY_SIZE, *_BY_AGE],
    "sharpest": [*_BY_SHARPNESS, *_BY_SIZE, *_BY_AGE],
    "oldest": [*_BY_AGE, *_BY_SIZE],
}


@dataclass(frozen=True)
class Images:
    """table: one row an image, side 1 first, then by the rule; `sharpness` and `face_id` are its largest face's.

    of_face (faces,): the image's number for each row of the table of faces; faces (images,): how many it has.
    """

    table: pa.Table
    of_face: Int64
    faces: Int64

    def __len__(self) -> int:
        return self.table.num_rows

    def numbers(self, name: str, absent: Any = 0) -> npt.NDArray[Any]:
        """A numeric column as an array."""
        return np.asarray(pc.fill_null(self.table[name], absent).to_numpy())

    @cached_property
    def side(self) -> npt.NDArray[np.int8]:
        return self.numbers("side")

    @property
    def compares(self) -> bool:
        """Whether there are two galleries: then only what they share counts."""
        return bool(len(self.side)) and int(self.side.min()) != int(self.side.max())

    @cached_property
    def hashed(self) -> Bool:
        """Which images have a perceptual hash."""
        return np.asarray(self.table["image_hash"].is_valid())

    @cached_property
    def same_bytes(self) -> Int64:
        """(images,) the first image with the same bytes; an image whose bytes are unknown is its own."""
        codes = codes_of(self.table["image_id"])
        own = np.arange(len(self))
        _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
        return np.where(codes < 0, own, first[inverse]) if len(own) else own


def images_of(faces: pa.Table, keep: Keep) -> Images:
    """The images of faces; the order of the rows does not matter."""
    keys = 2 * codes_of(faces["uri"]) + faces["side"].to_numpy()
    size = np.nan_to_num(pc.fill_null(faces["face_px"], 0).to_numpy())
    ordinal = pc.fill_null(faces["face_index"], 0).to_numpy()
    order = np.lexsort((ordinal, -size, keys))
    _, first = np.unique(keys[order], return_index=True)
    largest = faces.take(pa.array(order[first]))
    pixels = pc.multiply(largest["width"].cast(pa.int64()), largest["height"].cast(pa.int64()))
    table = largest.append_column("pixels", pc.fill_null(pixels, 0))
    if "file_size" not in table.column_names:
        table = table.append_column("file_size", pa.nulls(table.num_rows, pa.int64()))
    sort = [("side", "descending"), *_ORDER[keep], ("uri", "ascending")]
    places = pc.sort_indices(table, sort_keys=sort)
    number = np.empty(len(places), np.int64)
    number[places.to_numpy()] = np.arange(len(places))
    of_face = number[np.unique(keys, return_inverse=True)[1]]
    present = np.asarray(faces["face_id"].is_valid())
    return Images(table.take(places), of_face, np.bincount(of_face[present], minlength=len(places)))


def codes_of(column: pa.ChunkedArray) -> Int64:
    """(n,) equal numbers for equal strings, -1 for nulls."""
    chunks = pa.chunked_array(pc.dictionary_encode(column)).unify_dictionaries().chunks
    parts = [pc.fill_null(chunk.indices, -1).to_numpy(zero_copy_only=False) for chunk in chunks]
    return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64)
