"""Edges on disk: Parquet parts of u, v, distance, one written per task and read as a stream."""

import os
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from facepipe.errors import StorageError
from facepipe.nearest.similarity import Pairs
from facepipe.storage import replace_file
from facepipe.storage.mapped import make_temporary_array
from facepipe.types import Bool, Int32

# Positions take four bytes on disk and eight in memory.
SCHEMA = pa.schema([("u", pa.uint32()), ("v", pa.uint32()), ("distance", pa.float32())])
_PART = re.compile(r"edges-\d{6}\.parquet$")
_BATCH_ROWS = 1 << 18


def get_part_path(folder: str, number: int) -> str:
    """Return the path of a part."""
    return os.path.join(folder, f"edges-{number:06d}.parquet")


def write_part(pairs: Pairs, path: str) -> None:
    """Write a part, which appears when it is complete."""
    arrays = (pairs.u, pairs.v, pairs.distance)
    columns = [pa.array(array, field.type) for array, field in zip(arrays, SCHEMA, strict=True)]
    # Synced, because a resumed build takes every part for a whole one.
    with replace_file(path, sync=True, unique=True) as unfinished:
        pq.write_table(pa.table(columns, schema=SCHEMA), unfinished, compression="zstd")


def spill_ends(blocks: Iterable[tuple[Int32, Int32]], max_count: int) -> tuple[Int32, Int32]:
    """Keep the ends of up to `max_count` edges, which come in blocks, in temporary files.

    Returns:
        One node of each edge, (m,), and the other, (m,).
    """
    left = make_temporary_array(np.int32, (max_count,))
    right = make_temporary_array(np.int32, (max_count,))
    filled = 0
    for u, v in blocks:
        left[filled : filled + len(u)] = u
        right[filled : filled + len(u)] = v
        filled += len(u)
    return left[:filled], right[:filled]


def iterate_ends(u: Int32, v: Int32) -> Iterator[tuple[Int32, Int32]]:
    """Yield the ends of edges, u (m,) and v (m,), some hundred thousand at a time."""
    for at in range(0, len(u), _BATCH_ROWS):
        yield u[at : at + _BATCH_ROWS], v[at : at + _BATCH_ROWS]


def select_ends(u: Int32, v: Int32, is_chosen: Callable[[Int32, Int32], Bool]) -> tuple[Int32, Int32]:
    """Select edges, u (m,) and v (m,), by a function of their ends. They are kept in temporary files."""
    return spill_ends(_iterate_chosen(u, v, is_chosen), len(u))


def _iterate_chosen(u: Int32, v: Int32, is_chosen: Callable[[Int32, Int32], Bool]) -> Iterator[tuple[Int32, Int32]]:
    for left, right in iterate_ends(u, v):
        chosen = is_chosen(left, right)
        yield left[chosen], right[chosen]


class Edges:
    """All parts of a folder, in order."""

    def __init__(self, folder: str):
        self._folder = folder

    def list_paths(self) -> list[str]:
        """List the files of the parts."""
        return [os.path.join(self._folder, name) for name in sorted(os.listdir(self._folder)) if _PART.search(name)]

    def __len__(self) -> int:
        return sum(int(pq.read_metadata(path).num_rows) for path in self.list_paths())

    def __iter__(self) -> Iterator[Pairs]:
        for path in self.list_paths():
            try:
                with pq.ParquetFile(path) as file:
                    for batch in file.iter_batches(_BATCH_ROWS):
                        u, v, distance = (batch[name].to_numpy() for name in SCHEMA.names)
                        yield Pairs(u.astype(np.int64), v.astype(np.int64), distance)
            except (OSError, pa.ArrowException) as error:
                raise StorageError(f"cannot read {path!r}: {str(error).splitlines()[0]}") from error

    def read_within(self, distance: float) -> Pairs:
        """Read all edges of at most this distance into memory."""
        return Pairs.concatenate([pairs.take(pairs.distance <= distance) for pairs in self])
