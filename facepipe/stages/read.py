"""Read: work items to bytes and content hashes."""

import weakref
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from facepipe import storage
from facepipe.arrow import pack_arrays, set_columns
from facepipe.errors import ConfigError, StorageError
from facepipe.hashing import compute_image_id, hash64
from facepipe.schema import OK, READ_ERROR, TOO_LARGE, TOUCHED, UNCHANGED
from facepipe.sources.parquet import find_bytes_column, get_first_line

Outcome = tuple[bytes | None, str, str | None]  # bytes, status, error
_BATCH_ROWS = 16


class ParquetCursor:
    """A cursor over the bytes column of one Parquet file: ascending rows are read on, not from the start again."""

    def __init__(self, path: bytes):
        self.path = path
        self._handle = storage.open_seekable(path)
        weakref.finalize(self, self._handle.close)  # also where the file turns out to be damaged
        self._file = pq.ParquetFile(self._handle)
        self._column = find_bytes_column(self._file.schema_arrow)
        self._seek(0)

    def _seek(self, row: int) -> None:
        """Go to the start of the row group that holds the row; the batch in hand is empty then."""
        group = min(self._group(row), max(0, self._file.num_row_groups - 1))
        self._start = sum(self._file.metadata.row_group(g).num_rows for g in range(group))
        groups = list(range(group, self._file.num_row_groups))
        self._batches = self._file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=[self._column])
        self._values: pa.Array = pa.array([], pa.binary())

    def read(self, rows: list[int]) -> dict[int, bytes]:
        """The bytes of the rows (sorted) that hold some."""
        if rows[0] < self._start or self._group(rows[0]) > self._group(self._start + len(self._values)):
            self._seek(rows[0])
        found: dict[int, bytes] = {}
        wanted = set(rows)
        while True:
            end = self._start + len(self._values)
            for row in wanted.intersection(range(self._start, end)):
                if self._values[row - self._start].is_valid:
                    found[row] = self._values[row - self._start].as_py()
            # The batch stays in hand: the next rows asked for may begin inside it.
            if rows[-1] < end or (batch := next(self._batches, None)) is None:
                return found
            self._start, column = end, batch.column(0)
            self._values = column.field("bytes") if pa.types.is_struct(column.type) else column

    def _group(self, row: int) -> int:
        start = 0
        for group in range(self._file.num_row_groups):
            start += self._file.metadata.row_group(group).num_rows
            if row < start:
                return group
        return self._file.num_row_groups

    def close(self) -> None:
        self._handle.close()


@dataclass(frozen=True)
class Read:
    """Reads files, byte ranges (tar members), Parquet rows and objects.

    max_bytes: longer files become `too_large` without being read
    threads: parallel reads from an object store; local files are read one after the other
    """

    max_bytes: int = 256 << 20
    threads: int = 16

    needs: ClassVar = ("path", "offset", "length", "listing_error", "previous")
    adds: ClassVar = ("bytes", "image_id", "status", "error")

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads, "read")

    @cached_property
    def _open(self) -> dict[bytes, ParquetCursor]:
        return {}

    def setup(self) -> None:
        """Nothing to load."""

    def __call__(self, table: pa.Table) -> pa.Table:
        items = table.select(list(self.needs)).to_pylist()
        rows = self._parquet_rows(items)
        todo = [item for n, item in enumerate(items) if n not in rows]
        remote = len(todo) > 1 and any(storage.is_remote(item["path"]) for item in todo)
        outcomes = iter(list((self._pool.map if remote else map)(self._one, todo)))
        results = [rows[n] if n in rows else next(outcomes) for n in range(len(items))]
        results = [_unless_known(r, item["previous"]) for r, item in zip(results, items, strict=True)]
        columns = {
            "bytes": pack_arrays([data if status == OK else None for data, status, _ in results]),
            "image_id": pa.array(
                [None if data is None else compute_image_id(data) for data, _, _ in results], pa.string()
            ),
            "status": pa.array([status for _, status, _ in results], pa.string()),
            "error": pa.array([error for _, _, error in results], pa.string()),
        }
        return set_columns(table, columns, drop=self.needs)

    def _one(self, item: dict[str, Any]) -> Outcome:
        if item["listing_error"]:
            return None, READ_ERROR, item["listing_error"]
        try:
            return storage.read(item["path"], item["offset"], item["length"], self.max_bytes), OK, None
        except storage.TooLargeError as error:
            return None, TOO_LARGE, str(error)
        except (StorageError, ConfigError) as error:
            # ConfigError: a URL without a bucket, or of a store whose client is not installed, in a list of files.
            return None, READ_ERROR, str(error)

    def _parquet_rows(self, items: list[dict[str, Any]]) -> dict[int, Outcome]:
        """Items that are rows of Parquet files, read file by file."""
        wanted: dict[bytes, dict[int, int]] = defaultdict(dict)
        for n, item in enumerate(items):
            if item["offset"] is not None and item["length"] is None and not item["listing_error"]:
                wanted[item["path"]][item["offset"]] = n
        outcomes: dict[int, Outcome] = {}
        for path, rows in wanted.items():
            try:
                found = self._cursor(path).read(sorted(rows))
                outcomes |= {n: self._limited(found.get(row)) for row, n in rows.items()}
            except (StorageError, OSError, ValueError) as error:
                outcomes |= dict.fromkeys(rows.values(), (None, READ_ERROR, get_first_line(error)))
        return outcomes

    def _cursor(self, path: bytes) -> ParquetCursor:
        """The open cursor of a file; one is kept open at a time."""
        if path not in self._open:
            while self._open:
                self._open.popitem()[1].close()
            self._open[path] = ParquetCursor(path)
        return self._open[path]

    def _limited(self, data: bytes | None) -> Outcome:
        if data is None:
            return None, READ_ERROR, "the row holds no bytes"
        if len(data) > self.max_bytes:
            return None, TOO_LARGE, f"{len(data)} bytes, the limit is {self.max_bytes}"
        return data, OK, None


def hash_content(image: str | None) -> int:
    """What a work item's `previous` is compared with: the content hash, or that nothing could be read."""
    return hash64(image or "")


def _unless_known(outcome: Outcome, previous: int | None) -> Outcome:
    """No new row for a file that was touched but holds the same bytes, nor for one that cannot be read just now: what
    the gallery holds of it stays, and the next run tries again.
    """
    data, status, _ = outcome
    if previous is None or status not in (OK, READ_ERROR):
        return outcome
    same = data is not None and hash_content(compute_image_id(data)) == previous
    return (None, TOUCHED if same else UNCHANGED, None) if same or status == READ_ERROR else outcome
