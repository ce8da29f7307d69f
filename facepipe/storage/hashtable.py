"""A hash table of 64-bit keys in a memory-mapped temporary file: a hundred million keys cost page cache, not heap."""

import mmap
import tempfile
from collections.abc import Iterator
from typing import IO

import numpy as np

from facepipe.errors import StorageError
from facepipe.storage.error_text import describe_error
from facepipe.types import Bool, UInt64

_FIRST_SLOTS = 1 << 16
_MAX_LOAD = 0.6
_REHASH_ROWS = 1 << 17  # 4 MiB at three values a key: what a rehash holds beside the tables


class HashTable:
    """Maps uint64 keys to rows of `width` uint64 values; open addressing, linear probing, vectorised over batches.

    Keys must be well mixed hashes. Key 0 marks a free slot and is stored as 1.
    """

    def __init__(self, width: int = 0, folder: str | None = None):
        self.width = width
        self.count = 0
        self._folder = folder
        self._slots, self._file = self._allocate(_FIRST_SLOTS)

    def _allocate(self, slots: int) -> tuple[UInt64, IO[bytes]]:
        size = slots * (1 + self.width) * 8
        try:
            file = tempfile.TemporaryFile(dir=self._folder, prefix="facepipe-")  # noqa: SIM115  closed by close()
            file.truncate(size)
            mapped = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise StorageError(
                f"cannot keep a table of ids in {self._folder or tempfile.gettempdir()!r} (TMPDIR): "
                f"{describe_error(error)}"
            ) from error
        return np.frombuffer(mapped, np.uint64).reshape(slots, 1 + self.width), file

    def add(self, keys: UInt64, values: UInt64 | None = None) -> Bool:
        """Insert or overwrite; True where the key was new. A key repeated in the batch is new at its first place."""
        keys = np.where(keys == 0, np.uint64(1), keys).astype(np.uint64)
        unique, first = np.unique(keys, return_index=True)
        while self.count + len(unique) > _MAX_LOAD * len(self._slots):
            self._grow()
        new = np.zeros(len(keys), bool)
        new[first] = self._insert(unique, None if values is None else values[first])
        return new

    def get(self, keys: UInt64) -> tuple[Bool, UInt64]:
        """(found, values): values are (n, width), zero where the key is absent."""
        keys = np.where(keys == 0, np.uint64(1), keys).astype(np.uint64)
        found = np.zeros(len(keys), bool)
        values = np.zeros((len(keys), self.width), np.uint64)
        mask = np.uint64(len(self._slots) - 1)
        slot, pending = keys & mask, np.arange(len(keys))
        while pending.size:
            held = self._slots[slot[pending], 0]
            hit = held == keys[pending]
            found[pending[hit]] = True
            values[pending[hit]] = self._slots[slot[pending[hit]], 1:]
            pending = pending[~hit & (held != 0)]
            slot[pending] = (slot[pending] + np.uint64(1)) & mask
        return found, values

    def _insert(self, keys: UInt64, values: UInt64 | None) -> Bool:
        new = np.zeros(len(keys), bool)
        mask = np.uint64(len(self._slots) - 1)
        slot, pending = keys & mask, np.arange(len(keys))
        while pending.size:
            free = pending[self._slots[slot[pending], 0] == 0]
            self._slots[slot[free], 0] = keys[free]  # of several keys that want one slot the last writer wins
            won = free[self._slots[slot[free], 0] == keys[free]]
            new[won] = True
            here = self._slots[slot[pending], 0] == keys[pending]
            if values is not None:
                self._slots[slot[pending[here]], 1:] = values[pending[here]]
            pending = pending[~here]
            slot[pending] = (slot[pending] + np.uint64(1)) & mask
        self.count += int(new.sum())
        return new

    def _grow(self) -> None:
        old, old_file = self._slots, self._file
        self._slots, self._file = self._allocate(2 * len(old))
        self.count = 0
        for keys, values in _filled(old):
            self._insert(keys, values)
        old_file.close()

    def rows(self) -> Iterator[tuple[UInt64, UInt64]]:
        """(keys (n,), values (n, width)) of everything held, a piece at a time, in no order."""
        yield from _filled(self._slots)

    def close(self) -> None:
        """Give the temporary file back."""
        self._slots = np.zeros((1, 1 + self.width), np.uint64)
        self._file.close()


def _filled(slots: UInt64) -> Iterator[tuple[UInt64, UInt64]]:
    for start in range(0, len(slots), _REHASH_ROWS):
        rows = slots[start : start + _REHASH_ROWS]
        rows = rows[rows[:, 0] != 0]
        yield rows[:, 0], rows[:, 1:]
