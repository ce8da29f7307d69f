"""Connected components of a graph, and the numbering that clusterings share."""

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from facepipe.types import Int64


def find_components(count: int, u: Int64, v: Int64) -> Int64:
    """Find the connected components, as in single linkage.

    Args:
        count: number of nodes.
        u: one node per edge, (m,), in any order.
        v: the other node, (m,).

    Returns:
        Labels (count,), numbered by the smallest node of each component. A node without edges is a component.
    """
    edges = coo_array((np.ones(len(u), np.int8), (u, v)), shape=(count, count))
    labels = connected_components(edges.tocsr(), directed=False)[1]
    return renumber_labels(np.asarray(labels, np.int64))


def renumber_labels(labels: Int64) -> Int64:
    """Renumber labels (n,) of 0..n-1 as 0..k-1, in the order of each cluster's smallest node."""
    n = len(labels)
    first = np.full(n, n, np.int64)
    first[labels[::-1]] = np.arange(n - 1, -1, -1)  # numpy keeps the last value written: the smallest node
    rank = np.empty(n, np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(n)
    return rank[labels]
