"""Gather the faces of galleries, and rank their images: of two copies the image with the smaller number is kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.curation.duplicates.rule import Keep
from facepipe.curation.graph.nodes import Nodes
from facepipe.gallery import Gallery
from facepipe.types import Bool, Int64

COLUMNS = (
    "face_id",
    "image_id",
    "uri",
    "source",
    "identity",
    "image_hash",
    "width",
    "height",
    "face_index",
    "sharpness",
    "face_px",
    "ingested_at",
    "fingerprint",
)
_FILE_SIZE = r"^(?P<size>\d{1,18})-"  # how a fingerprint begins if the file's size is known
_BY_SIZE = [("pixels", "descending"), ("file_size", "descending")]
_BY_SHARPNESS = [("sharpness", "descending")]
_BY_AGE = [("ingested_at", "ascending")]
_ORDER: dict[Keep, list[tuple[str, str]]] = {
    "largest": _BY_SIZE + _BY_AGE,
    "sharpest": _BY_SHARPNESS + _BY_SIZE + _BY_AGE,
    "oldest": _BY_AGE + _BY_SIZE,
}


def gather_faces(galleries: Sequence[Gallery], nodes: Nodes) -> tuple[pa.Table, Int64]:
    """Gather the rows of one gallery or two, images without a face included, as `find_duplicates` takes them.

    Args:
        galleries: the galleries. Their positions are the sides of the nodes.
        nodes: n nodes of their graph.

    Returns:
        The rows, and the row of each node, (n,).
    """
    parts = []
    row_of_node = np.full(len(nodes), -1, np.int64)
    row_count = 0
    for side, gallery in enumerate(galleries):
        table = gallery.to_arrow(COLUMNS)
        # Note the row of each node in the table of all galleries.
        faces = np.flatnonzero(table["face_id"].is_valid())
        at = nodes.find(table["face_id"].drop_null().to_numpy(), side)
        row_of_node[at[at >= 0]] = row_count + faces[at >= 0]
        parts.append(add_size_and_side(table, side))
        row_count += table.num_rows
    return pa.concat_tables(parts), row_of_node


def add_size_and_side(table: pa.Table, side: int) -> pa.Table:
    """Replace the column `fingerprint` of a gallery's rows by `file_size` (null if unknown) and `side`."""
    # The size in bytes is a part of the fingerprint.
    size = pc.struct_field(pc.extract_regex(table["fingerprint"], _FILE_SIZE), "size").cast(pa.int64())
    table = table.drop_columns("fingerprint").append_column("file_size", size)
    return table.append_column("side", pa.array(np.full(table.num_rows, side, np.int8)))


@dataclass(frozen=True)
class RankedImages:
    """Images of a table of faces, ranked by which one is kept: side 1 first, then by the rule.

    Attributes:
        table: One row per image. `sharpness` and `face_id` are those of its largest face.
        of_face: Number of the image of each row of the table of faces.
        face_counts: Number of faces of each image.
    """

    table: pa.Table
    of_face: Int64
    face_counts: Int64

    def __len__(self) -> int:
        return self.table.num_rows

    def get_numbers(self, column: str) -> npt.NDArray[Any]:
        """Get a numeric column as an array, with 0 for null."""
        return np.asarray(pc.fill_null(self.table[column], 0).to_numpy())

    @cached_property
    def side(self) -> npt.NDArray[np.int8]:
        """Gallery that each image is in: 0 or 1."""
        return self.get_numbers("side")

    @property
    def has_two_sides(self) -> bool:
        """Whether there are two galleries: then only what they share counts."""
        return bool(len(self.side)) and int(self.side.min()) != int(self.side.max())

    @cached_property
    def has_hash(self) -> Bool:
        """Whether each image has a perceptual hash."""
        return np.asarray(self.table["image_hash"].is_valid())

    @cached_property
    def first_with_bytes(self) -> Int64:
        """First image with the same bytes as each image. An image of unknown bytes is its own."""
        codes = encode_strings(self.table["image_id"])
        own = np.arange(len(self))
        if not len(own):
            return own
        _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
        return np.where(codes < 0, own, first[inverse])


def rank_images(faces: pa.Table, keep: Keep) -> RankedImages:
    """Rank the images of a table of faces. The order of the rows does not matter.

    Args:
        faces: rows as of `gather_faces`.
        keep: which copy is kept.
    """
    # The largest face of each image stands for it.
    keys = 2 * encode_strings(faces["uri"]) + faces["side"].to_numpy()
    face_px = np.nan_to_num(pc.fill_null(faces["face_px"], 0).to_numpy())
    face_index = pc.fill_null(faces["face_index"], 0).to_numpy()
    order = np.lexsort((face_index, -face_px, keys))
    _, first = np.unique(keys[order], return_index=True)
    table = faces.take(pa.array(order[first]))
    pixels = pc.multiply(table["width"].cast(pa.int64()), table["height"].cast(pa.int64()))
    table = table.append_column("pixels", pc.fill_null(pixels, 0))
    if "file_size" not in table.column_names:
        table = table.append_column("file_size", pa.nulls(table.num_rows, pa.int64()))
    # Rank them, and number the faces' images by rank.
    sort_keys = [("side", "descending"), *_ORDER[keep], ("uri", "ascending")]
    ranked = pc.sort_indices(table, sort_keys=sort_keys)
    rank = np.empty(len(ranked), np.int64)
    rank[ranked.to_numpy()] = np.arange(len(ranked))
    of_face = rank[np.unique(keys, return_inverse=True)[1]]
    is_face = np.asarray(faces["face_id"].is_valid())
    return RankedImages(table.take(ranked), of_face, np.bincount(of_face[is_face], minlength=len(ranked)))


def encode_strings(column: pa.ChunkedArray) -> Int64:
    """Encode strings as numbers (n,): equal ones for equal strings, -1 for null."""
    # One dictionary for all chunks, so that equal strings have one code.
    chunks = pa.chunked_array(pc.dictionary_encode(column)).unify_dictionaries().chunks
    codes = [np.empty(0, np.int64)]
    codes += [pc.fill_null(chunk.indices, -1).to_numpy(zero_copy_only=False) for chunk in chunks]
    return np.concatenate(codes).astype(np.int64)
