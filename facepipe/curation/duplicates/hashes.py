"""Pairs of images whose perceptual hashes nearly agree, whatever faces they show: by blocks of bits, not all with all.

Two hashes that differ in two bits agree in one of three blocks of bits. So hashes are sorted by each block, and only
those with an equal one are compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from facepipe.imaging.perceptual import (
    QUARTER_TURNS,
    count_differing_bits,
    get_known_bits,
    mirror_hashes,
    turn_hashes,
)
from facepipe.types import Bool, Int64

MAX_BITS = 2
"""Differing bits up to which two pictures are copies by their hashes alone."""
# Lowest bit and number of bits of each block.
_BLOCK_BITS = ((0, 21), (21, 21), (42, 22))
BLOCKS = tuple(range(len(_BLOCK_BITS)))
"""The blocks of bits, by number."""
# Set bits of a picture's hash. Plain areas have hardly any contrast, and their hashes agree by chance.
_MIN_SET_BITS = 10
_MAX_SET_BITS = 54
_PAIRS = 4_000_000  # compared at a time
_MAX_IN_BLOCK = 4096  # hashes with one block that a hash is compared with: a crowd of nearly equal pictures


@dataclass(frozen=True)
class HashPairs:
    """Pairs of hashes: positions among the queries (m,) and among the others (m,)."""

    query: Int64
    other: Int64


def is_telling(hashes: Int64) -> Bool:
    """Say which hashes (n,) are of pictures with enough contrast to be told apart."""
    count = count_differing_bits(hashes, np.zeros(len(hashes), np.int64))
    return np.asarray((count >= _MIN_SET_BITS) & (count <= _MAX_SET_BITS), bool)


def make_variants(hashes: Int64) -> list[Int64]:
    """Make the hashes (n,) of the mirrored and turned pictures, the pictures as they are first."""
    variants = []
    for degrees in QUARTER_TURNS:
        variants += [turn_hashes(hashes, degrees), turn_hashes(mirror_hashes(hashes), degrees)]
        if get_known_bits(degrees) != -1:
            # One bit is not known: either value.
            unknown = ~get_known_bits(degrees)
            variants += [variants[-2] | unknown, variants[-1] | unknown]
    return variants


class HashLookup:
    """Hashes, sorted by each block of bits, among which others are looked up."""

    def __init__(self, hashes: Int64, blocks: Sequence[int] = BLOCKS):
        """Sort hashes (p,), which rise, by some of the blocks. Equal ones should have been left out."""
        self._hashes = hashes
        self._blocks = blocks
        self._orders = [np.argsort(cut_block(hashes, block), kind="stable") for block in blocks]
        self._keys = [cut_block(hashes[order], block) for order, block in zip(self._orders, blocks, strict=True)]

    def find(self, queries: Int64) -> HashPairs:
        """Find the pairs of queries (n,) and hashes that differ in up to two bits, each once."""
        parts = [HashPairs(np.empty(0, np.int64), np.empty(0, np.int64))]
        for keys, order, block in zip(self._keys, self._orders, self._blocks, strict=True):
            wanted = cut_block(queries, block)
            begins = np.searchsorted(keys, wanted)
            counts = np.minimum(np.searchsorted(keys, wanted, side="right") - begins, _MAX_IN_BLOCK)
            # Spread the pairs out, some millions at a time.
            totals = np.concatenate([[0], np.cumsum(counts)])
            first = 0
            while first < len(queries):
                last = max(first + 1, int(np.searchsorted(totals, totals[first] + _PAIRS, side="right")) - 1)
                chosen = np.arange(first, min(last, len(queries)))
                query = np.repeat(chosen, counts[chosen])
                offset = np.arange(len(query)) - np.repeat(totals[chosen] - totals[first], counts[chosen])
                other = order[np.repeat(begins[chosen], counts[chosen]) + offset]
                is_near = count_differing_bits(queries[query], self._hashes[other]) <= MAX_BITS
                parts.append(HashPairs(query[is_near], other[is_near]))
                first = int(chosen[-1]) + 1
        size = max(1, len(self._hashes))
        pairs = np.unique(np.concatenate([part.query * size + part.other for part in parts]))
        return HashPairs(pairs // size, pairs % size)


def cut_block(hashes: Int64, block: int) -> Int64:
    """Cut a block of bits out of hashes (n,)."""
    low, width = _BLOCK_BITS[block]
    return np.asarray((hashes >> np.int64(low)) & np.int64((1 << width) - 1), np.int64)
