"""Look up keys in a sorted array by binary search."""

from typing import Any

import numpy as np
import numpy.typing as npt

from facepipe.types import Bool, Int64

Keys = npt.NDArray[Any]


def find_sorted(ordered: Keys, keys: Keys) -> Int64:
    """Find the positions of keys in a sorted array.

    Args:
        ordered: keys in ascending order, (n,); may be a memory map.
        keys: the keys to look for, (m,), in any order.

    Returns:
        The position of each key in `ordered`, (m,); -1 if it is absent.
    """
    if not len(ordered):
        return np.full(len(keys), -1, np.int64)
    # A key greater than all others would be inserted behind the end.
    at = np.minimum(np.searchsorted(ordered, keys), len(ordered) - 1)
    return np.where(ordered[at] == keys, at, -1)


def is_in_sorted(ordered: Keys, keys: Keys) -> Bool:
    """Tell for each key (m,) whether a sorted array (n,) holds it."""
    return np.asarray(find_sorted(ordered, keys) >= 0)


def look_up_sorted(ordered: Keys, values: npt.NDArray[Any], keys: Keys, default: int = -1) -> Int64:
    """Look up the values of keys in a table that is sorted by key.

    Args:
        ordered: keys of the table in ascending order, (n,).
        values: the integer of each of these keys, (n,).
        keys: the keys to look up, (m,).
        default: value of a key that the table does not hold.

    Returns:
        One value per key, (m,).
    """
    found = np.full(len(keys), default, np.int64)
    at = find_sorted(ordered, keys)
    found[at >= 0] = values[at[at >= 0]]
    return found
