"""Keys in sorted arrays: positions, membership and values."""

import numpy as np

from facepipe.sorted_lookup import find_sorted, is_in_sorted, look_up_sorted

ORDERED = np.array([2, 3, 5, 9], np.int64)


def test_positions_of_present_and_absent_keys():
    keys = np.array([9, 1, 2, 4, 10, 3])
    assert find_sorted(ORDERED, keys).tolist() == [3, -1, 0, -1, -1, 1]
    assert is_in_sorted(ORDERED, keys).tolist() == [True, False, True, False, False, True]


def test_an_empty_table_holds_nothing_and_no_keys_give_no_positions():
    empty = np.empty(0, np.int64)
    assert find_sorted(empty, ORDERED).tolist() == [-1] * 4
    assert find_sorted(ORDERED, empty).tolist() == []
    assert look_up_sorted(empty, empty, ORDERED).tolist() == [-1] * 4


def test_values_and_the_default_of_absent_keys():
    values = np.array([10, 20, 30, 40], np.int32)
    found = look_up_sorted(ORDERED, values, np.array([5, 6]), default=-2)
    assert found.tolist() == [30, -2]
    assert found.dtype == np.int64


def test_unsigned_hashes_beyond_63_bits_are_compared_exactly():
    hashes = np.array([1, 2**63, 2**64 - 1], np.uint64)
    assert find_sorted(hashes, np.array([2**64 - 1, 2**64 - 2], np.uint64)).tolist() == [2, -1]
