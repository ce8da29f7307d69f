"""Chinese whispers (Biemann, TextGraphs 2006): every node takes the label that weighs most among its neighbours."""

import numpy as np
from scipy.sparse import csr_array

from facepipe.curation.graph.components import adjacency, numbered
from facepipe.types import Bool, Float32, Int64

SWEEPS = 20
_BLOCKS = 8


def whispers(count: int, u: Int64, v: Int64, weight: Float32, sweeps: int = SWEEPS, seed: int = 0) -> Int64:
    """Labels (count,) int64 after `sweeps` sweeps, or sooner when no node would change.

    Edges u < v int64 (m,), each once, in any order; weight float32 (m,) > 0. Biemann visits one node after another in
    random order; here a sweep draws some blocks of nodes, and the nodes of a block change together. Labels are numbered
    by the smallest node of their cluster.
    """
    rng = np.random.default_rng(seed)
    graph = adjacency(count, u, v, weight)
    labels = rng.permutation(count)  # ties go to the smallest label, which must not mean the smallest node
    stirred = np.diff(graph.indptr) > 0
    for _ in range(sweeps):
        waiting = rng.permutation(np.flatnonzero(stirred))
        if not waiting.size:
            break
        # Drawn anew every time: two neighbours that change together may swap labels, and would for ever.
        for block in np.array_split(waiting, min(_BLOCKS, waiting.size)):
            _whisper(graph, labels, stirred, np.sort(block))
    return numbered(labels)


def _whisper(graph: csr_array, labels: Int64, stirred: Bool, block: Int64) -> None:
    """Give the nodes of a block their neighbours' label; those who hear of a change are stirred, the block is not."""
    near = graph[block]
    stirred[block] = False
    heard = _loudest(near, labels, block)
    changed = heard != labels[block]
    labels[block] = heard
    stirred[near[np.flatnonzero(changed)].indices] = True


def _loudest(near: csr_array, labels: Int64, block: Int64) -> Int64:
    """For each row the label with the largest sum of weights: the node's own one if it ties, else the smallest."""
    heard = csr_array((near.data.copy(), labels[near.indices], near.indptr.copy()), shape=near.shape)
    heard.sum_duplicates()
    start, length = heard.indptr[:-1], np.diff(heard.indptr)
    top = heard.data == np.repeat(np.maximum.reduceat(heard.data, start), length)
    own = labels[block]
    keeps = np.logical_or.reduceat(top & (heard.indices == np.repeat(own, length)), start)
    places = np.flatnonzero(top)
    return np.where(keeps, own, heard.indices[places[np.searchsorted(places, start)]])
