"""Sums by group: exact, and those of a group are the same to the bit whatever other groups are summed with it."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.curation.graph.grouped_sums import add_pieces, iterate_pieces

SIZES = st.lists(st.integers(0, 9), max_size=12)


def sum_groups(groups: np.ndarray, values: np.ndarray, count: int, block_rows: int) -> np.ndarray:
    sums = np.zeros((count, values.shape[1]), np.float32)
    for block, starts in iterate_pieces(groups, block_rows):
        assert 0 < block.stop - block.start <= block_rows
        add_pieces(sums, groups[block], values[block], starts)
    return sums


@settings(max_examples=100, deadline=None)
@given(SIZES, st.integers(1, 7), st.integers(1, 16), st.integers(0, 1 << 30))
def test_groups_may_be_spread_over_partitions(sizes: list[int], block_rows: int, partitions: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    values = rng.standard_normal((len(groups), 3)).astype(np.float32)
    whole = sum_groups(groups, values, len(sizes), block_rows)
    for group in range(len(sizes)):
        assert np.abs(whole[group] - values[groups == group].sum(axis=0, dtype=np.float64)).max(initial=0) < 1e-5
    # Whole groups, on any partition.
    partition = rng.integers(0, partitions, len(sizes))
    for number in range(partitions):
        chosen = np.isin(groups, np.flatnonzero(partition == number))
        part = sum_groups(groups[chosen], values[chosen], len(sizes), block_rows)
        assert np.array_equal(part[partition == number], whole[partition == number])
