"""Chinese whispers, for the comparison in clustering.py: each node takes the heaviest label among its neighbours.

Biemann, "Chinese whispers: an efficient graph clustering algorithm", TextGraphs 2006. It scores lower than average
linkage on faces (docs/performance.md), so that facepipe itself does not offer it.
"""

import numpy as np
from scipy.sparse import coo_array, csr_array

from facepipe.curation.graph.components import renumber_labels
from facepipe.types import Bool, Float32, Int64

SWEEPS = 20
BLOCKS_PER_SWEEP = 8


def cluster_by_whispers(
    count: int, u: Int64, v: Int64, weight: Float32, *, sweeps: int = SWEEPS, seed: int = 0
) -> Int64:
    """Cluster a weighted graph by Chinese whispers.

    Biemann visits one node after another in random order. Here a sweep draws some blocks of nodes, and the nodes of a
    block change together.

    Args:
        count: number of nodes.
        u: smaller end of each edge, (m,). Each edge appears once, in any order.
        v: larger end of each edge, (m,).
        weight: weights above 0, (m,).
        sweeps: sweeps at most. It stops earlier if no node would change.
        seed: seed of the random order.

    Returns:
        The label of each node, (count,), numbered by the smallest node of the cluster.
    """
    rng = np.random.default_rng(seed)
    graph = build_adjacency(count, u, v, weight)
    labels = rng.permutation(count)  # ties go to the smallest label, which must not mean the smallest node
    is_active = np.diff(graph.indptr) > 0
    for _ in range(sweeps):
        waiting = rng.permutation(np.flatnonzero(is_active))
        if not waiting.size:
            break
        # The blocks are drawn again in each sweep: two neighbours that change together may swap labels forever.
        for block in np.array_split(waiting, min(BLOCKS_PER_SWEEP, waiting.size)):
            _update_block(graph, labels, is_active, np.sort(block))
    return renumber_labels(labels)


def build_adjacency(count: int, u: Int64, v: Int64, weight: Float32) -> csr_array:
    """Build the symmetric weight matrix (count, count), the same to the bit for any order of the edges."""
    upper = coo_array((weight.astype(np.float32, copy=False), (u, v)), shape=(count, count)).tocsr()
    matrix = csr_array(upper + upper.T)
    matrix.sort_indices()
    return matrix


def _update_block(graph: csr_array, labels: Int64, is_active: Bool, block: Int64) -> None:
    """Give the nodes of a block the heaviest label around them, and mark the neighbours of changed nodes as active."""
    neighbours = graph[block]
    is_active[block] = False
    heaviest = _find_heaviest_labels(neighbours, labels, block)
    is_changed = heaviest != labels[block]
    labels[block] = heaviest
    is_active[neighbours[np.flatnonzero(is_changed)].indices] = True


def _find_heaviest_labels(neighbours: csr_array, labels: Int64, block: Int64) -> Int64:
    """Find the label with the largest sum of weights for each row: the node's own if it ties, else the smallest."""
    sums = csr_array((neighbours.data.copy(), labels[neighbours.indices], neighbours.indptr.copy()), neighbours.shape)
    sums.sum_duplicates()
    start = sums.indptr[:-1]
    length = np.diff(sums.indptr)
    is_top = sums.data == np.repeat(np.maximum.reduceat(sums.data, start), length)
    own = labels[block]
    keeps_own = np.logical_or.reduceat(is_top & (sums.indices == np.repeat(own, length)), start)
    tops = np.flatnonzero(is_top)
    return np.where(keeps_own, own, sums.indices[tops[np.searchsorted(tops, start)]])
