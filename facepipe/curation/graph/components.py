"""Connected components of a graph, and the numbering that clusterings share."""

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from facepipe.types import Int64


def components(count: int, u: Int64, v: Int64) -> Int64:
    """Labels (count,) int64: nodes that a path joins are one cluster, as in single linkage.

    Edges u < v int64 (m,), each once, in any order. A node without edges is a cluster of its
    own. Labels are numbered by the smallest node of their cluster.
    """
    once = coo_array((np.ones(len(u), np.int8), (u, v)), shape=(count, count)).tocsr()
    return numbered(np.asarray(connected_components(once, directed=False)[1], np.int64))


def numbered(labels: Int64) -> Int64:
    """The same clusters as labels 0..k-1 in the order of their smallest nodes; labels (n,) int64 within 0..n-1."""
    n = len(labels)
    first = np.full(n, n, np.int64)
    first[labels[::-1]] = np.arange(n - 1, -1, -1)  # numpy keeps the last value written: the smallest node
    rank = np.empty(n, np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(n)
    return rank[labels]
