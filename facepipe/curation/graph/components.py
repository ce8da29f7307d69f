"""Connected components of a graph, and the numbering that clusterings share."""

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from facepipe.types import Bool, Int64


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


class GrowingComponents:
    """Connected components of nodes whose edges come in parts. It takes four bytes per node, and none per edge."""

    def __init__(self, count: int):
        """Make a component of each node."""
        self._root = np.arange(count, dtype=np.int32 if count <= np.iinfo(np.int32).max else np.int64)

    def link(self, u: Int64, v: Int64) -> None:
        """Join the components of nodes u (m,) and v (m,)."""
        u = self.find(u)
        v = self.find(v)
        different = u != v
        nodes, ends = np.unique(np.concatenate([u[different], v[different]]), return_inverse=True)
        if not len(nodes):
            return
        half = len(ends) // 2
        component = find_components(len(nodes), ends[:half], ends[half:])
        # The smallest node of each component becomes its root.
        smallest = np.full(int(component.max()) + 1, len(nodes))
        np.minimum.at(smallest, component, np.arange(len(nodes)))
        self._root[nodes] = nodes[smallest[component]]

    def find(self, nodes: Int64) -> Int64:
        """Find the smallest node of the components of nodes (m,)."""
        roots = self._root[nodes]
        while (is_moving := self._root[roots] != roots).any():
            roots[is_moving] = self._root[roots[is_moving]]
        # The next search begins here.
        self._root[nodes] = roots
        return np.asarray(roots, np.int64)

    def find_linked(self) -> Bool:
        """Find the nodes (count,) whose component has another node."""
        is_linked = self._root != np.arange(len(self._root), dtype=self._root.dtype)
        is_linked[self._root[is_linked]] = True
        return np.asarray(is_linked)
