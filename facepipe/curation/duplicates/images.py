"""Gather the faces of galleries, and rank their images: of two copies the image with the smaller number is kept."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.curation.duplicates.rule import Keep
from facepipe.curation.graph.nodes import Nodes
from facepipe.decisions.persons import DecidedFaces
from facepipe.gallery import Gallery
from facepipe.schema import FACES
from facepipe.sorted_lookup import is_in_sorted
from facepipe.storage.spilled import SPILLED_ROWS, sort_rows, spill_batches, take_rows
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
        The rows, mapped from a temporary file, and the row of each node, (n,).
    """
    row_of_node = np.full(len(nodes), -1, np.int64)
    schema = add_size_and_side(pa.schema([FACES.field(name) for name in COLUMNS]).empty_table(), 0).schema

    def read_batches() -> Iterator[pa.RecordBatch]:
        row_count = 0
        for table in read_faces(galleries, nodes):
            # Note the row of each node in the table of all galleries.
            node = table["node"].to_numpy()
            row_of_node[node[node >= 0]] = row_count + np.flatnonzero(node >= 0)
            row_count += table.num_rows
            yield from table.select(schema.names).to_batches()

    return spill_batches(schema, read_batches()), row_of_node


def read_faces(galleries: Sequence[Gallery], nodes: Nodes) -> Iterator[pa.Table]:
    """Read the rows of one gallery or two, images without a face included, some ten thousand at a time.

    Args:
        galleries: the galleries. Their positions are the sides of the nodes.
        nodes: nodes of their graph.

    Yields:
        The rows with `side`, `file_size`, and `node`: the position of the face among the nodes, -1 for none. The first
        table has no rows.
    """
    empty = add_size_and_side(pa.schema([FACES.field(name) for name in COLUMNS]).empty_table(), 0)
    yield empty.append_column("node", pa.array([], pa.int64()))
    for side, gallery in enumerate(galleries):
        for batch in gallery.batches(COLUMNS, rows=SPILLED_ROWS):
            ids = batch["face_id"]
            node = np.full(batch.num_rows, -1)
            node[np.asarray(ids.is_valid())] = nodes.find(ids.drop_null().to_numpy(), side)
            table = add_size_and_side(pa.Table.from_batches([batch]), side).cast(empty.schema)
            yield table.append_column("node", pa.array(node))


def add_size_and_side(table: pa.Table, side: int) -> pa.Table:
    """Replace the column `fingerprint` of a gallery's rows by `file_size` (null if unknown) and `side`."""
    # The size in bytes is a part of the fingerprint.
    size = pc.struct_field(pc.extract_regex(table["fingerprint"], _FILE_SIZE), "size").cast(pa.int64())
    table = table.drop_columns("fingerprint").append_column("file_size", size)
    return table.append_column("side", pa.array(np.full(table.num_rows, side, np.int8)))


KEPT_BY_PEOPLE = 2
"""Standing of an image that people keep, even beside a copy."""


@dataclass(frozen=True)
class RankedImages:
    """Images of a table of faces, ranked by which one is kept: side 1 first, then by the rule.

    Of each image there are some numbers. Its texts stay in the table of faces, which may be mapped from a file.

    Attributes:
        faces: The table of faces.
        row: Row of the face that stands for each image: its largest one.
        of_face: Number of the image of each row of the table of faces.
        face_counts: Number of faces of each image.
        uri_position: Position of each image in the order of uris, and of one uri by side.
        standing: Whether people have decided on a face of each image: 2 if they keep it, 1 if they have confirmed it,
            -1 if they ignore all of its faces.
        side_count: Number of galleries that are compared, if these are some of their images; by default as many as
            there are sides.
    """

    faces: pa.Table
    row: Int64
    of_face: Int64
    face_counts: Int64
    uri_position: Int64
    standing: npt.NDArray[np.int8]
    side_count: int | None = None

    def __len__(self) -> int:
        return len(self.row)

    def get_numbers(self, column: str) -> npt.NDArray[Any]:
        """Get a numeric column as an array, with 0 for null."""
        return np.asarray(pc.fill_null(self.faces[column], 0).to_numpy())[self.row]

    def take(self, columns: Sequence[str], numbers: Int64, is_missing: Bool | None = None) -> pa.Table:
        """Take columns of some images (m,), with null for those that are missing (m,)."""
        return take_rows(self.faces.select(columns), self.row[numbers], is_missing)

    def add_pixels(self, numbers: Int64, columns: Sequence[str]) -> pa.Table:
        """Take columns of some images (m,) with `file_size`, null if it is unknown, and `pixels`."""
        known = [name for name in ("file_size",) if name in self.faces.column_names]
        table = self.take([*columns, "width", "height", *known], numbers)
        if not known:
            table = table.append_column("file_size", pa.nulls(table.num_rows, pa.int64()))
        return table.append_column("pixels", _count_pixels(table))

    @cached_property
    def side(self) -> npt.NDArray[np.int8]:
        """Gallery that each image is in: 0 or 1."""
        return self.get_numbers("side")

    @property
    def has_two_sides(self) -> bool:
        """Whether there are two galleries: then only what they share counts."""
        if self.side_count is not None:
            return self.side_count > 1
        return bool(len(self.side)) and int(self.side.min()) != int(self.side.max())

    @cached_property
    def has_hash(self) -> Bool:
        """Whether each image has a perceptual hash."""
        return np.asarray(self.faces["image_hash"].is_valid())[self.row]

    @cached_property
    def first_with_bytes(self) -> Int64:
        """First image with the same bytes as each image. An image of unknown bytes is its own."""
        first = np.arange(len(self))
        order, is_new = sort_rows(self.faces.select(["image_id"]))
        # One group of rows per content. Rows of unknown bytes come last.
        order = order[: len(order) - self.faces["image_id"].null_count]
        group = np.empty(len(self.faces), np.int64)
        group[order] = np.cumsum(is_new[: len(order)]) - 1
        has_bytes = np.zeros(len(self.faces), bool)
        has_bytes[order] = True
        known = np.flatnonzero(has_bytes[self.row])
        content = group[self.row[known]]
        lowest = np.full(int(content.max(initial=-1)) + 1, len(self))
        np.minimum.at(lowest, content, known)
        first[known] = lowest[content]
        return first


def rank_images(
    faces: pa.Table, keep: Keep, decided: Sequence[DecidedFaces] = (), side_count: int | None = None
) -> RankedImages:
    """Rank the images of a table of faces. The order of the rows does not matter.

    Of two copies the one comes first that has a face on which people have decided who it is. Images all of whose faces
    people ignore come last.

    Args:
        faces: rows as of `gather_faces`.
        keep: which copy is kept.
        decided: what people have decided, of each side; nothing by default.
        side_count: number of galleries that are compared, if these are some of their faces.
    """
    # Number the images by uri and side. The largest face of each image stands for it.
    by_name, is_new = sort_rows(faces.select(["uri", "side"]))
    number = np.empty(len(by_name), np.int64)
    number[by_name] = np.cumsum(is_new) - 1
    face_px = np.nan_to_num(pc.fill_null(faces["face_px"], 0).to_numpy())
    face_index = pc.fill_null(faces["face_index"], 0).to_numpy()
    order = np.lexsort((face_index, -face_px, number))
    row = order[np.diff(number[order], prepend=-1) > 0]
    # Rank them by numbers alone: that of an image by uri stands for the uri.
    columns = [name for name, _ in _ORDER[keep] if name in faces.column_names]
    table = take_rows(faces.select([*columns, "side", "width", "height"]), row)
    table = table.append_column("pixels", _count_pixels(table)).append_column("number", pa.array(np.arange(len(row))))
    table = table.append_column("standing", pa.array(_find_standing(faces, number, len(row), decided)))
    ranked = sort_by_rank(table, keep)
    rank = np.empty(len(ranked), np.int64)
    rank[ranked] = np.arange(len(ranked))
    of_face = rank[number]
    standing = table["standing"].to_numpy()[ranked]
    is_face = np.asarray(faces["face_id"].is_valid())
    return RankedImages(
        faces=faces,
        row=row[ranked],
        of_face=of_face,
        face_counts=np.bincount(of_face[is_face], minlength=len(ranked)),
        uri_position=ranked,
        standing=standing,
        side_count=side_count,
    )


RANK_COLUMNS = ("side", "standing", "pixels", "file_size", "sharpness", "ingested_at", "number")
"""What images are ranked by. Their numbers are in the order of their uris."""


def sort_by_rank(images: pa.Table, keep: Keep) -> Int64:
    """Sort images (n,) by which one is kept, by those of RANK_COLUMNS that there are."""
    known_order = [key for key in _ORDER[keep] if key[0] in images.column_names]
    sort_keys = [("side", "descending"), ("standing", "descending"), *known_order, ("number", "ascending")]
    return np.asarray(pc.sort_indices(images, sort_keys=sort_keys).to_numpy(), np.int64)


def _find_standing(faces: pa.Table, number: Int64, count: int, decided: Sequence[DecidedFaces]) -> npt.NDArray[np.int8]:
    """Find whether people have decided on the faces of `count` images.

    2 if they keep one, 1 if they have confirmed one, -1 if they ignore all, else 0.

    Args:
        faces: rows of the faces.
        number: image of each row, (n,).
        count: number of images.
        decided: what people have decided, of each side.
    """
    standing = np.zeros(count, np.int8)
    if not any(decided):
        return standing
    is_face = faces["face_id"].is_valid().to_numpy()
    ids = pc.fill_null(faces["face_id"], -1).to_numpy()
    side = faces["side"].to_numpy()
    for position, known in enumerate(decided):
        rows = np.flatnonzero(is_face & (side == position))
        is_ignored = known.is_ignored(ids[rows])
        ignored = np.bincount(number[rows[is_ignored]], minlength=count)
        all_faces = np.bincount(number[rows], minlength=count)
        standing[(ignored > 0) & (ignored == all_faces)] = -1
        standing[number[rows[known.is_confirmed(ids[rows]) & ~is_ignored]]] = 1
        standing[number[rows[is_in_sorted(known.kept, ids[rows])]]] = KEPT_BY_PEOPLE
    return standing


def _count_pixels(table: pa.Table) -> pa.ChunkedArray:
    return pc.fill_null(pc.multiply(table["width"].cast(pa.int64()), table["height"].cast(pa.int64())), 0)


def encode_strings(column: pa.ChunkedArray) -> Int64:
    """Encode strings as numbers (n,): equal ones for equal strings, -1 for null."""
    # One dictionary for all chunks, so that equal strings have one code.
    chunks = pa.chunked_array(pc.dictionary_encode(column)).unify_dictionaries().chunks
    codes = [np.empty(0, np.int64)]
    codes += [pc.fill_null(chunk.indices, -1).to_numpy(zero_copy_only=False) for chunk in chunks]
    return np.concatenate(codes).astype(np.int64)
