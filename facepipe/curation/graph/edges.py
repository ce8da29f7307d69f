"""Edges on disk: Parquet parts of u, v, distance, written one a task and read as a stream."""

import os
import re
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from facepipe.errors import StorageError
from facepipe.nearest.similarity import Pairs
from facepipe.storage import replace_file

SCHEMA = pa.schema([("u", pa.uint32()), ("v", pa.uint32()), ("distance", pa.float32())])
_PART = re.compile(r"edges-\d{6}\.parquet$")
_ROWS = 1 << 20


def part(folder: str, number: int) -> str:
    """Path of a part."""
    return os.path.join(folder, f"edges-{number:06d}.parquet")


def write(pairs: Pairs, path: str) -> None:
    """A part; it appears when it is complete."""
    rows = (pairs.u, pairs.v, pairs.distance)
    columns = [pa.array(column, field.type) for column, field in zip(rows, SCHEMA, strict=True)]
    with replace_file(path, unique=True) as unfinished:
        pq.write_table(pa.table(columns, schema=SCHEMA), unfinished, compression="zstd")


class Edges:
    """All parts of a folder, in order."""

    def __init__(self, folder: str):
        self._folder = folder

    def paths(self) -> list[str]:
        """The parts' files."""
        return [os.path.join(self._folder, name) for name in sorted(os.listdir(self._folder)) if _PART.search(name)]

    def __len__(self) -> int:
        return sum(int(pq.read_metadata(path).num_rows) for path in self.paths())

    def __iter__(self) -> Iterator[Pairs]:
        for path in self.paths():
            try:
                with pq.ParquetFile(path) as file:
                    for batch in file.iter_batches(_ROWS):
                        u, v, distance = (batch[name].to_numpy() for name in SCHEMA.names)
                        yield Pairs(u.astype(np.int64), v.astype(np.int64), distance)
            except (OSError, pa.ArrowException) as error:
                raise StorageError(f"cannot read {path!r}: {str(error).splitlines()[0]}") from error

    def within(self, distance: float) -> Pairs:
        """All edges of at most this distance, in memory."""
        return joined([found.take(found.distance <= distance) for found in self])


def joined(parts: list[Pairs]) -> Pairs:
    """Several lists of pairs as one."""
    columns = [[getattr(pairs, name) for pairs in parts] for name in SCHEMA.names]
    kinds = (np.int64, np.int64, np.float32)
    u, v, distance = (np.concatenate([*c, np.empty(0, kind)]) for c, kind in zip(columns, kinds, strict=True))
    return Pairs(u, v, distance)
