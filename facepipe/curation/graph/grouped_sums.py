"""Sum rows by group in blocks that stay in the cache. The sum of a group does not depend on what else is summed."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from facepipe.types import Float32, Int64

BLOCK_ROWS = 1 << 13
"""Rows of vectors that are gathered at a time."""


def iterate_pieces(groups: Int64, block_rows: int = BLOCK_ROWS) -> Iterator[tuple[slice, Int64]]:
    """Cut sorted groups (m,) into blocks of whole pieces, each of one group.

    A large group is cut into pieces of `block_rows` from its first row on. So where it is cut, and in which order its
    rows are added up, depends on the group alone: groups can be spread over partitions.

    Args:
        groups: number of each row's group, rising.
        block_rows: rows of a block, at most.

    Yields:
        The rows of a block, and where each of its pieces begins in it, (p,).
    """
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    counts = -(-np.diff(starts, append=len(groups)) // block_rows)
    number = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = np.repeat(starts, counts) + number * block_rows
    ends = np.append(begins[1:], len(groups))
    first = 0
    while first < len(begins):
        last = max(first + 1, int(np.searchsorted(ends, begins[first] + block_rows, side="right")))
        yield slice(int(begins[first]), int(ends[last - 1])), begins[first:last] - begins[first]
        first = last


def add_pieces(sums: Float32, groups: Int64, values: npt.NDArray[Any], starts: Int64) -> None:
    """Add up the rows of each piece, and add that to the sum of its group, in place.

    Args:
        sums: sums by group, (k, ...).
        groups: group of each row of a block, (m,), rising.
        values: the rows, (m, ...).
        starts: where each piece begins, (p,).
    """
    rows = groups[starts]
    pieces = np.add.reduceat(values, starts, axis=0)
    # Only a large group has several pieces in a block.
    if (np.diff(rows) != 0).all():
        sums[rows] += pieces
    else:
        np.add.at(sums, rows, pieces)
