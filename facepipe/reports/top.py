"""What a page shows of very many faces: the first of an order, and the best of some groups.

Both are found slice by slice. Memory follows what is shown, not the gallery.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from facepipe.types import Bool, Float32, Float64, Int64

SLICE = 1 << 20
"""Faces that are looked at at a time."""

_NONE = np.empty(0, np.int64)


def find_highest(scores: Float32 | Float64, count: int, among: Bool | None = None) -> Int64:
    """Find the positions of the highest scores, the highest first, ties by position.

    Args:
        scores: (n,); NaN comes last.
        count: positions to find, at most.
        among: whether each position may be found, (n,); by default all.
    """
    best = _NONE
    for begin in range(0, len(scores), SLICE):
        part = slice(begin, begin + SLICE)
        rows = np.arange(begin, begin + len(scores[part])) if among is None else np.flatnonzero(among[part]) + begin
        rows = np.concatenate([best, rows])
        # NaN is sorted to the end.
        best = rows[np.argsort(-scores[rows], kind="stable")[:count]]
    return best


class BestMembers:
    """The best members of some groups."""

    def __init__(
        self,
        size: int,
        chosen: Int64,
        count: int,
        label_slice: Callable[[slice], Int64],
        rank_rows: Callable[[Int64], Sequence[npt.NDArray[np.generic]]],
    ):
        """Find them.

        Args:
            size: number of faces.
            chosen: numbers of the groups.
            count: members per group, at most.
            label_slice: returns the groups of a range of faces.
            rank_rows: returns keys of some faces by which members are ordered, the last key first; ties by position.
        """
        groups = np.unique(chosen)
        rows = _NONE
        labels = _NONE
        for begin in range(0, size, SLICE):
            part = label_slice(slice(begin, begin + SLICE))
            found = np.flatnonzero(np.isin(part, groups))
            rows = np.concatenate([rows, found + begin])
            labels = np.concatenate([labels, part[found].astype(np.int64)])
            # Order by group and keys, and keep the first of each group.
            order = np.lexsort((rows, *rank_rows(rows), labels))
            rows = rows[order]
            labels = labels[order]
            rank = np.arange(len(rows)) - np.searchsorted(labels, labels)
            rows = rows[rank < count]
            labels = labels[rank < count]
        self._rows = rows
        self._labels = labels

    def list_members(self, group: int) -> Int64:
        """List the members of a group, the best first; none of a group that was not chosen."""
        begin, end = np.searchsorted(self._labels, [group, group + 1])
        return self._rows[begin:end]
