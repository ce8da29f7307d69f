"""Cluster the faces of a graph into persons by average linkage."""

import tempfile

import numpy as np

from facepipe.curation.graph import Graph
from facepipe.curation.graph.cells import CellLayout, train_cells
from facepipe.curation.graph.components import find_components, renumber_labels
from facepipe.curation.graph.linkage import Clusters, merge_by_average_linkage
from facepipe.nearest.join import find_candidate_pairs
from facepipe.types import Bool, Int64

_MAX_NEIGHBOURS = 32  # clusters that a cluster is compared with, per cell
_MAX_DISTANCE = 2.0  # of two unit vectors: all edges
_MAX_PASSES = 4


def cluster_faces(
    graph: Graph, different: Int64 | None = None, same: Int64 | None = None, cut: Bool | None = None
) -> tuple[Int64, Clusters]:
    """Cluster the nodes of a graph into persons.

    Nodes with equal vectors are one person, whatever `different` says.

    Args:
        graph: the face graph, n nodes.
        different: pairs of nodes that are two persons, (m, 2).
        same: a number per node, (n,), -1 for none. Nodes with one number are one person.
        cut: whether a node is a face that is cut by its picture's edge, (n,). Such faces look alike: they join persons,
            but two of them found none.

    Returns:
        The cluster of each node, (n,), numbered by the smallest node, and the clusters.
    """
    threshold = graph.info.threshold.similarity
    pairs = graph.edges.read_within(_MAX_DISTANCE)
    pairs = pairs.take(graph.compute_similarity(pairs) >= threshold)
    if cut is not None:
        pairs = pairs.take(~(cut[pairs.u] & cut[pairs.v]))
    single = Clusters.from_faces(graph.nodes.vectors, graph.density)
    # Merge what is one person from the start, then link clusters along the edges.
    labels = _merge_known(graph, same)
    clusters = single.merge(labels)
    del single  # as large as all vectors
    return _link(labels, clusters, labels[pairs.u], labels[pairs.v], threshold=threshold, different=different)


def _merge_known(graph: Graph, same: Int64 | None) -> Int64:
    """Label what is one person from the start: vectors that are equal in every bit, and nodes with one number."""
    count = len(graph.nodes)
    copies = graph.representatives
    if same is None:
        return renumber_labels(copies)
    # Tie each numbered node to the first node of its number.
    labelled = np.flatnonzero(same >= 0)
    first = np.full(int(same.max(initial=-1)) + 1, count)
    np.minimum.at(first, same[labelled], labelled)
    u = np.concatenate([copies, first[same[labelled]]])
    v = np.concatenate([np.arange(count), labelled])
    return find_components(count, np.minimum(u, v), np.maximum(u, v))


def _link(
    labels: Int64, clusters: Clusters, u: Int64, v: Int64, *, threshold: float, different: Int64 | None
) -> tuple[Int64, Clusters]:
    """Link clusters along edges, and then along pairs of clusters with near means.

    The second kind is needed because edges are capped and cells miss a few: two halves of a person may share no edge.
    """
    for n in range(_MAX_PASSES):
        group, merged = merge_by_average_linkage(clusters, u, v, threshold, _find_forbidden(labels, different))
        labels = group[labels]
        # Stop once a pass merges nothing. The first one has not compared means yet.
        if n and len(merged) == len(clusters):
            break
        clusters = merged
        u, v = find_near_means(clusters, threshold)
    return labels, clusters


def _find_forbidden(labels: Int64, different: Int64 | None) -> Int64 | None:
    """Find the pairs of clusters (m, 2) that hold two nodes of different persons."""
    if different is None:
        return None
    pairs = np.sort(labels[different], axis=1)
    return np.asarray(pairs[pairs[:, 0] != pairs[:, 1]], np.int64)


def find_near_means(clusters: Clusters, threshold: float) -> tuple[Int64, Int64]:
    """Find pairs of clusters of several faces whose mean similarity is near the threshold or above it.

    Single faces are left out: what the graph did not find for them, as many comparisons would not find now.

    Args:
        clusters: k clusters.
        threshold: mean similarity.

    Returns:
        The clusters u (m,) and v (m,) of each pair.
    """
    several = np.flatnonzero(clusters.size > 1)
    means = clusters.means[several]
    density = clusters.density[several]
    cells = train_cells(means, seed=0)
    # Few clusters are compared all with all, many within cells only.
    if len(cells.centres) == 1:
        u, v = find_candidate_pairs(means, density, threshold, _MAX_NEIGHBOURS)
        return several[u], several[v]
    left = []
    right = []
    with tempfile.TemporaryDirectory(prefix="facepipe-") as folder:
        layout = CellLayout.build(means, cells, folder)
        for cell in range(len(cells.centres)):
            inside = layout.get_faces(cell)
            u, v = find_candidate_pairs(means[inside], density[inside], threshold, _MAX_NEIGHBOURS)
            is_new = layout.mask_first_shared(cell, inside, u, v)
            left.append(inside[u[is_new]])
            right.append(inside[v[is_new]])
    return several[np.concatenate(left)], several[np.concatenate(right)]
