"""Connected components, the coarsest clustering; and the graph and the numbering that all clusterings share."""

import numpy as np
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

from facepipe.types import Float32, Int64


def components(count: int, u: Int64, v: Int64, weight: Float32) -> Int64:
    """Labels (count,) int64: nodes that a path joins are one cluster, as in single linkage.

    Edges u < v int64 (m,), each once, in any order; weight float32 (m,) > 0 is not looked at. A node without edges is a
    cluster of its own. Labels are numbered by the smallest node of their cluster.
    """
    once = coo_array((np.ones(len(u), np.int8), (u, v)), shape=(count, count)).tocsr()
    return numbered(np.asarray(connected_components(once, directed=False)[1], np.int64))


def adjacency(count: int, u: Int64, v: Int64, weight: Float32) -> csr_array:
    """The symmetric matrix (count, count) of the weights, float32, the same to the bit for any order of the edges."""
    upper = coo_array((weight.astype(np.float32, copy=False), (u, v)), shape=(count, count)).tocsr()
    whole = csr_array(upper + upper.T)
    whole.sort_indices()
    return whole


def numbered(labels: Int64) -> Int64:
    """The same clusters as labels 0..k-1 in the order of their smallest nodes; labels (n,) int64 within 0..n-1."""
    n = len(labels)
    first = np.full(n, n, np.int64)
    first[labels[::-1]] = np.arange(n - 1, -1, -1)  # numpy keeps the last value written: the smallest node
    rank = np.empty(n, np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(n)
    return rank[labels]
