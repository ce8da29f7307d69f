"""A few thousand faces in which persons and those who look like them are whole: the neighbourhoods of some faces.

A random part of a large gallery holds one or two faces per person, and hardly ever two persons who look alike.
"""

import numpy as np

from facepipe.types import Bool, Float32, Int64, UInt64

_SEEDS = 96
_MAX_MEMBERS = 48  # per neighbourhood
_MAX_HELD = 2 * _MAX_MEMBERS * _SEEDS  # members, before neighbourhoods are cut down to what they may have
_BLOCK_COLUMNS = 8192
_MIXER = np.uint64(0x9E3779B97F4A7C15)


def gather_neighbourhoods(
    vectors: Float32, densities: Float32, sample: Int64, similarity: float, is_fit: Bool, seed: int
) -> Int64:
    """Gather the faces that reach a similarity to one of some faces.

    Args:
        vectors: unit vectors (n, dim).
        densities: densities (n,).
        sample: positions of faces, (m,), some of which are taken.
        similarity: from which a face is a neighbour.
        is_fit: whether a face may be gathered, (n,).
        seed: random seed.

    Returns:
        Sorted positions, at most 48 per face that is taken.
    """
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(sample, min(_SEEDS, len(sample)), replace=False))
    left = np.ascontiguousarray(vectors[chosen])
    left_density = densities[chosen]
    rows = np.empty(0, np.int64)
    members = np.empty(0, np.int64)
    for at in range(0, len(vectors), _BLOCK_COLUMNS):
        part = slice(at, at + _BLOCK_COLUMNS)
        product = left @ np.asarray(vectors[part]).T - (left_density[:, None] + densities[part]) / 2
        row, column = np.nonzero((product >= similarity) & is_fit[part])
        rows = np.concatenate([rows, row])
        members = np.concatenate([members, column + at])
        # Keep what a neighbourhood may have, so that memory does not grow with the largest person.
        if len(rows) > _MAX_HELD:
            kept = _select_members(rows, members)
            rows = rows[kept]
            members = members[kept]
    return np.unique(members[_select_members(rows, members)])


def _select_members(rows: Int64, members: Int64) -> Int64:
    """Select as many members of each row as it may have, as if at random, whatever came first."""
    order = np.lexsort((_mix(members), rows))
    rank = np.arange(len(order)) - np.searchsorted(rows[order], rows[order])
    return np.asarray(order[rank < _MAX_MEMBERS], np.int64)


def _mix(members: Int64) -> UInt64:
    return members.astype(np.uint64) * _MIXER
