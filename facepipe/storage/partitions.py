"""Steps over tables too large for one process: rows are partitioned by a key, and each partition is handled by itself.

A step is a function of one partition's tables. It runs here, one partition after the other, or as a task elsewhere:
tables travel with it and come back, so that machines need no folder in common. What a step returns must not depend on
how rows are spread, so that the number of partitions and of workers does not matter.
"""

import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.errors import StorageError
from facepipe.storage.error_text import describe_error
from facepipe.types import Bool, Int64, UInt64

ROWS_PER_PARTITION = 1 << 18
"""Rows that a partition is to have: some 50 MB of a gallery's columns."""

MAX_PARTITIONS = 512
_PIECE_ALIGNMENT = 64
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, which spreads keys that follow each other


@dataclass(frozen=True)
class TableTask:
    """One partition of a step.

    Attributes:
        number: Number of the partition.
        tables: Its tables, by name.
    """

    number: int
    tables: Mapping[str, pa.Table]


Tables = dict[str, pa.Table]
RunTables = Callable[[Callable[[TableTask, Any], Tables], Iterable[TableTask], Any], Iterable[tuple[int, Tables]]]
"""Runs a function on tasks, with something that all share; yields the number of a partition and what it became."""


def run_tables_here(
    function: Callable[[TableTask, Any], Tables], tasks: Iterable[TableTask], shared: Any
) -> Iterator[tuple[int, Tables]]:
    """Run a step on one partition after the other in this process."""
    for task in tasks:
        yield task.number, function(task, shared)


def count_partitions(rows: int) -> int:
    """Count the partitions that so many rows fall into."""
    return min(MAX_PARTITIONS, max(1, -(-rows // ROWS_PER_PARTITION)))


def spread_keys(keys: Int64 | UInt64, count: int) -> Int64:
    """Choose the partition (n,), of `count`, of integer keys (n,): one for equal keys, and about as many rows each."""
    mixed = keys.astype(np.int64).view(np.uint64) * _MIX
    return np.asarray((mixed >> np.uint64(32)) % np.uint64(count), np.int64)


def sample_bounds(values: pa.Array, count: int) -> pa.Array:
    """Choose the bounds (up to count - 1,) between ranges of about as many values each, from a sample of them."""
    ordered = values.take(pc.sort_indices(values))
    at = np.arange(1, count) * len(ordered) // count
    return pc.unique(ordered.take(pa.array(at[at < len(ordered)])))


def find_ranges(bounds: pa.Array, values: pa.Array | pa.ChunkedArray) -> Int64:
    """Find the range (n,) of each value (n,): the number of bounds (m,), which rise, that are not above it."""
    low = np.zeros(len(values), np.int64)
    high = np.full(len(values), len(bounds))
    # Binary search by Arrow's own comparison, which is that of its sorting.
    while (is_open := low < high).any():
        middle = (low + high) // 2
        bound = bounds.take(pa.array(np.minimum(middle, len(bounds) - 1)))
        is_reached = _to_mask(pc.less_equal(bound, values)) & is_open
        low = np.where(is_reached, middle + 1, low)
        high = np.where(is_open & ~is_reached, middle, high)
    return low


def _to_mask(values: pa.Array | pa.ChunkedArray) -> Bool:
    filled = pc.fill_null(values, False)
    if isinstance(filled, pa.ChunkedArray):
        filled = filled.combine_chunks()
    return np.asarray(filled.to_numpy(zero_copy_only=False))


class PartitionedTable:
    """Rows in partitions, in one temporary file without a name. They are read as they are mapped from it.

    Rows of a partition keep the order in which they came.
    """

    def __init__(self, schema: pa.Schema, count: int):
        """Make it for rows of a schema, and a number of partitions."""
        self.schema = schema
        self.count = count
        self.rows = np.zeros(count, np.int64)
        self._pieces: list[list[tuple[int, int]]] = [[] for _ in range(count)]  # position and bytes in the file
        self._descriptor = -1  # of the file, as soon as there is something to write
        self._size = 0
        self._mapped = pa.py_buffer(b"")

    def append(self, table: pa.Table, partition: Int64) -> None:
        """Append rows to the partitions (n,) that they belong to."""
        if not table.num_rows:
            return
        if self.count == 1:
            self.add(0, table)
            return
        order = np.argsort(partition, kind="stable")
        ordered = table.combine_chunks().take(pa.array(order))
        bounds = np.searchsorted(partition[order], np.arange(self.count + 1))
        for number in np.flatnonzero(np.diff(bounds)).tolist():
            self.add(number, ordered.slice(bounds[number], bounds[number + 1] - bounds[number]))

    def add(self, number: int, table: pa.Table) -> None:
        """Append all rows of a table to one partition.

        Raises:
            StorageError: there is no room for them.
        """
        self.rows[number] += table.num_rows
        for batch in table.select(self.schema.names).cast(self.schema).to_batches():
            self._write(number, batch.serialize())

    def _write(self, number: int, piece: pa.Buffer) -> None:
        try:
            if self._descriptor < 0:
                self._descriptor = _open_nameless_file()
                weakref.finalize(self, os.close, self._descriptor)
            rest = memoryview(piece)
            while rest:
                rest = rest[os.pwrite(self._descriptor, rest, self._size + len(piece) - len(rest)) :]
        except OSError as error:
            raise StorageError(
                f"cannot keep a table in {tempfile.gettempdir()!r}: {describe_error(error)}. "
                "Set TMPDIR to a folder with more room"
            ) from error
        self._pieces[number].append((self._size, len(piece)))
        self._size += -(-len(piece) // _PIECE_ALIGNMENT) * _PIECE_ALIGNMENT

    def read(self, number: int) -> pa.Table:
        """Return the rows of a partition, mapped from the file."""
        pieces = self._pieces[number]
        if pieces and pieces[-1][0] >= len(self._mapped):
            self._mapped = pa.py_buffer(mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ))
        batches = [pa.ipc.read_record_batch(self._mapped.slice(at, size), self.schema) for at, size in pieces]
        return pa.Table.from_batches(batches, self.schema)

    def __iter__(self) -> Iterator[pa.Table]:
        """Yield the rows of one partition after the other."""
        return map(self.read, range(self.count))


def _open_nameless_file() -> int:
    """Open a temporary file without a name, and return its descriptor."""
    descriptor, path = tempfile.mkstemp(prefix="facepipe-")
    os.unlink(path)
    return descriptor


def list_tasks(**tables: PartitionedTable) -> Iterator[TableTask]:
    """List a task per partition that has rows in any of some tables, which have as many partitions each."""
    numbers = np.flatnonzero(sum(table.rows for table in tables.values()))
    for number in numbers.tolist():
        yield TableTask(number, {name: table.read(number) for name, table in tables.items()})
