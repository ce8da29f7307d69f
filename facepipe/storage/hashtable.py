"""A hash table of 64-bit keys in a memory-mapped temporary file: a hundred million keys cost page cache, not heap."""

from collections.abc import Iterator
from typing import IO

import numpy as np

from facepipe.storage.mapped import map_temporary_file
from facepipe.types import Bool, UInt64

# Slots are a power of two, so that a mask replaces the division.
_FIRST_SLOTS = 1 << 16
# Beyond this share of filled slots the chains of collisions grow long.
_MAX_LOAD = 0.6
_REHASH_ROWS = 1 << 17  # 4 MiB at three values per key: what a rehash needs beside the tables


class HashTable:
    """Maps uint64 keys to rows of `width` uint64 values.

    Open addressing with linear probing, vectorised over batches. Keys must be well mixed hashes. Key 0 marks a free
    slot and is stored as 1. Call `close` when done.
    """

    def __init__(self, width: int = 0, folder: str | None = None):
        """Make an empty table.

        Args:
            width: values per key.
            folder: where the temporary file is made; the system's folder by default.
        """
        self.width = width
        self.count = 0
        self._folder = folder
        # One row per slot: the key, then its values; (slots, 1 + width).
        self._slots, self._file = self._allocate(_FIRST_SLOTS)

    def _allocate(self, slots: int) -> tuple[UInt64, IO[bytes]]:
        mapped, file = map_temporary_file(slots * (1 + self.width) * 8, self._folder)
        return np.frombuffer(mapped, np.uint64).reshape(slots, 1 + self.width), file

    def add(self, keys: UInt64, values: UInt64 | None = None) -> Bool:
        """Insert keys, or overwrite the values of known ones.

        Args:
            keys: (n,).
            values: (n, width), if the table has values.

        Returns:
            Whether each key was new, (n,). A key that is repeated in the batch is new at its first place.
        """
        # Prepare the batch: 0 stands for a free slot, and repeated keys are inserted once.
        keys = np.where(keys == 0, np.uint64(1), keys).astype(np.uint64)
        unique, first = np.unique(keys, return_index=True)
        while self.count + len(unique) > _MAX_LOAD * len(self._slots):
            self._grow()
        is_new = np.zeros(len(keys), bool)
        is_new[first] = self._insert(unique, None if values is None else values[first])
        return is_new

    def get(self, keys: UInt64) -> tuple[Bool, UInt64]:
        """Look keys up.

        Returns:
            Whether the table holds each key (n,), and the values (n, width), zero for absent keys.
        """
        keys = np.where(keys == 0, np.uint64(1), keys).astype(np.uint64)
        is_present = np.zeros(len(keys), bool)
        values = np.zeros((len(keys), self.width), np.uint64)
        mask = np.uint64(len(self._slots) - 1)
        slot = keys & mask
        pending = np.arange(len(keys))
        # Each round looks at one slot of every pending key; keys that meet another key go on to the next slot.
        while pending.size:
            slot_keys = self._slots[slot[pending], 0]
            hit = slot_keys == keys[pending]
            is_present[pending[hit]] = True
            values[pending[hit]] = self._slots[slot[pending[hit]], 1:]
            pending = pending[~hit & (slot_keys != 0)]
            slot[pending] = (slot[pending] + np.uint64(1)) & mask
        return is_present, values

    def _insert(self, keys: UInt64, values: UInt64 | None) -> Bool:
        """Insert different keys into slots that are there; tell which were new."""
        is_new = np.zeros(len(keys), bool)
        mask = np.uint64(len(self._slots) - 1)
        slot = keys & mask
        pending = np.arange(len(keys))
        # Each round tries one slot per pending key, as in `get`.
        while pending.size:
            free = pending[self._slots[slot[pending], 0] == 0]
            # If several keys want one free slot, the last writer gets it and the others go on.
            self._slots[slot[free], 0] = keys[free]
            won = free[self._slots[slot[free], 0] == keys[free]]
            is_new[won] = True
            settled = self._slots[slot[pending], 0] == keys[pending]
            if values is not None:
                self._slots[slot[pending[settled]], 1:] = values[pending[settled]]
            pending = pending[~settled]
            slot[pending] = (slot[pending] + np.uint64(1)) & mask
        self.count += int(is_new.sum())
        return is_new

    def _grow(self) -> None:
        """Move everything to a table of twice as many slots."""
        old_slots = self._slots
        old_file = self._file
        self._slots, self._file = self._allocate(2 * len(old_slots))
        self.count = 0
        # Insert in pieces, so that a rehash needs little memory beside both tables.
        for keys, values in _read_filled(old_slots):
            self._insert(keys, values)
        old_file.close()

    def read_rows(self) -> Iterator[tuple[UInt64, UInt64]]:
        """Yield (keys (n,), values (n, width)) of the whole table in pieces, in no order."""
        yield from _read_filled(self._slots)

    def close(self) -> None:
        """Delete the temporary file."""
        self._slots = np.zeros((1, 1 + self.width), np.uint64)
        self._file.close()


def _read_filled(slots: UInt64) -> Iterator[tuple[UInt64, UInt64]]:
    for start in range(0, len(slots), _REHASH_ROWS):
        rows = slots[start : start + _REHASH_ROWS]
        rows = rows[rows[:, 0] != 0]
        yield rows[:, 0], rows[:, 1:]
