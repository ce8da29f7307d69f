"""Marks: the fingerprint and `missing_since` of images for which these have changed since their rows were written.

A night finds files touched, or missing, all over a gallery. To write their rows anew would write nearly all vectors and
thumbnails of a large table. So such changes are kept apart, in one small file that all readers of this package apply.
Compaction folds them into the rows.

The file lies in `faces/_marks/`. A transaction number in the table's log names it, so that a commit changes the rows
and the marks in one step, and each version of the table has its own marks. Other readers of the table see all rows.
Only these two columns may be behind for them.
"""

import hashlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facepipe import storage
from facepipe.errors import StorageError
from facepipe.schema import FACES
from facepipe.storage.inside import is_link, make_link_error

FOLDER = "_marks"
"""Folder of the marks, in the table's folder. Other programs pass over names that begin with an underscore."""
TRANSACTION = "facepipe-marks"
"""Name under which the table's log holds the number of the file with the marks; 0 or absent: there are none."""
MARKED = ("fingerprint", "missing_since")
"""Columns that marks may change."""
KEY = ("uri", "ingested_at")
"""Columns that tell to which rows a mark belongs. An image that was embedded again has another time."""
SCHEMA = pa.schema([FACES.field(name) for name in (*KEY, *MARKED)])
"""Columns of the marks: one row per image."""

_NAME = re.compile(rf"{FOLDER}/[0-9a-f]{{13}}\.parquet")
_SALT = b"facepipe.salt"
Rows = TypeVar("Rows", pa.Table, pa.RecordBatch)


@dataclass(frozen=True)
class Marks:
    """The marks of a version of the table.

    Attributes:
        images: Table of SCHEMA in the order of uris, at most one row per uri.
    """

    images: pa.Table

    def __len__(self) -> int:
        return int(self.images.num_rows)

    def apply(self, rows: Rows) -> Rows:
        """Return rows of the table with what the marks say.

        Args:
            rows: rows with the columns KEY; of MARKED they may have any.
        """
        names = [name for name in MARKED if name in rows.schema.names]
        if not names or not len(self) or not rows.num_rows:
            return rows
        limits = pc.min_max(rows["uri"]).as_py()
        near = self.select_range(limits["min"], limits["max"])
        if not near.num_rows:
            return rows
        at = pc.index_in(rows["uri"], value_set=near["uri"].combine_chunks())
        # Rows that were embedded since the mark was made are newer than it.
        is_marked = pc.and_(pc.is_valid(at), _are_equal(near["ingested_at"].take(at), rows["ingested_at"]))
        if not pc.any(is_marked).as_py():
            return rows
        for name in names:
            values = pc.if_else(is_marked, near[name].take(at), rows[name])
            if isinstance(rows, pa.RecordBatch) and isinstance(values, pa.ChunkedArray):
                values = values.combine_chunks()
            rows = rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), values)
        return rows

    def select_range(self, low: str, high: str) -> pa.Table:
        """Select the marks of uris between two, both included."""
        first = self._count_below(low, or_equal=False)
        return self.images.slice(first, self._count_below(high, or_equal=True) - first)

    def _count_below(self, uri: str, *, or_equal: bool) -> int:
        """Count uris below a text by bisection."""
        uris = self.images["uri"]
        low = 0
        high = len(uris)
        while low < high:
            middle = (low + high) // 2
            text = uris[middle].as_py()
            if text < uri or (or_equal and text == uri):
                low = middle + 1
            else:
                high = middle
        return low

    def drop(self, uris: pa.Array | pa.ChunkedArray) -> "Marks":
        """Return the marks without those of some uris; the same object if there are none of them."""
        is_dropped = pc.is_in(self.images["uri"], value_set=_combine(uris))
        if not pc.any(is_dropped).as_py():
            return self
        return Marks(self.images.filter(pc.invert(is_dropped)).combine_chunks())

    def add(self, images: pa.Table) -> "Marks":
        """Return the marks with further ones, which replace those of the same uris."""
        if not images.num_rows:
            return self
        older = self.drop(images["uri"]).images
        return Marks(pa.concat_tables([older, images.cast(SCHEMA)]).sort_by("uri").combine_chunks())


NO_MARKS = Marks(SCHEMA.empty_table())


def make_marks(rows: pa.Table) -> pa.Table:
    """Make marks of the rows of images, which may have several rows each.

    Args:
        rows: rows with the columns of SCHEMA, in which the changes are made.
    """
    keys = rows.select(list(SCHEMA.names)).append_column("row", pa.array(range(rows.num_rows), pa.int64()))
    first = keys.group_by("uri").aggregate([("row", "min")])["row_min"]
    return keys.take(first.sort()).drop_columns("row").cast(SCHEMA)


def write_marks(faces_folder: str, marks: Marks) -> int:
    """Write marks to a new file.

    Args:
        faces_folder: folder or URL of the table.
        marks: the marks.

    Returns:
        The number by which a commit names the file; 0 if there are no marks.
    """
    if not len(marks):
        return 0
    # With a salt no two files are equal: no name is used twice, so that what is outdated can be deleted.
    salted = marks.images.replace_schema_metadata({_SALT: secrets.token_bytes(8)})
    sink = pa.BufferOutputStream()
    pq.write_table(salted, sink, compression="zstd", use_dictionary=["ingested_at", "missing_since"])
    data = sink.getvalue().to_pybytes()
    number = _compute_number(data)
    path = storage.join(faces_folder, format_name(number))
    storage.make_parent_folder(path)
    storage.write(path, data)
    if not storage.is_remote(path):
        storage.sync_folder(storage.join(faces_folder, FOLDER))
    return number


def read_marks(faces_folder: str, number: int) -> Marks:
    """Read the marks of a number.

    Raises:
        StorageError: the file cannot be read, or is damaged.
    """
    if not number:
        return NO_MARKS
    path = storage.join(faces_folder, format_name(number))
    if is_link(path) or is_link(storage.join(faces_folder, FOLDER)):
        raise make_link_error(path)
    data = storage.read(path)
    if _compute_number(data) != number:
        raise StorageError(f"{path!r} is damaged: it is not what was written")
    try:
        return Marks(pq.read_table(pa.BufferReader(data)).select(SCHEMA.names).cast(SCHEMA).combine_chunks())
    except (pa.ArrowException, KeyError) as error:
        raise StorageError(f"cannot read {path!r}: {storage.describe_error(error)}") from error


def format_name(number: int) -> str:
    """Format the name of a file of marks, below the table's folder."""
    return f"{FOLDER}/{number:013x}.parquet"


def is_marks_file(name: str) -> bool:
    """Tell whether a name below the table's folder is one of a file of marks."""
    return bool(_NAME.fullmatch(name))


def needs_marks(columns: Sequence[str]) -> bool:
    """Tell whether marks may change one of these columns."""
    return not set(MARKED).isdisjoint(columns)


def _compute_number(data: bytes) -> int:
    """Compute the number of a file from its content: 52 bits, which every reader of JSON takes exactly; never 0."""
    return int(hashlib.sha256(data).hexdigest()[:13], 16) or 1


def _are_equal(a: pa.ChunkedArray, b: pa.Array | pa.ChunkedArray) -> pa.ChunkedArray:
    """Compare times; two that are null are equal."""
    lowest = -(1 << 63)
    return pc.equal(pc.fill_null(a.cast(pa.int64()), lowest), pc.fill_null(b.cast(pa.int64()), lowest))


def _combine(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
