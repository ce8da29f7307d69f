"""Cluster the faces of a graph into persons by average linkage."""

import tempfile

import numpy as np

from facepipe.curation.graph import Graph
from facepipe.curation.graph.cells import CellLayout, train_cells
from facepipe.curation.graph.clusters import Clusters
from facepipe.curation.graph.components import find_components, renumber_labels
from facepipe.curation.graph.linkage import RunTasks, merge_by_average_linkage, run_tasks_here
from facepipe.nearest.join import find_candidate_pairs
from facepipe.types import Bool, Int64

_MAX_NEIGHBOURS = 32  # clusters that a cluster is compared with, per cell
_MAX_PASSES = 4


def cluster_faces(
    graph: Graph,
    different: Int64 | None = None,
    same: Int64 | None = None,
    unfit: Bool | None = None,
    *,
    run_tasks: RunTasks = run_tasks_here,
) -> tuple[Int64, Clusters]:
    """Cluster the nodes of a graph into persons.

    Nodes with equal vectors are one person, whatever `different` says.

    Args:
        graph: the face graph, n nodes.
        different: pairs of nodes that are two persons, (m, 2).
        same: a number per node, (n,), -1 for none. Nodes with one number are one person.
        unfit: whether a node is a face that is cut or poor, (n,). Such faces look alike whoever they show. Each joins
            the person whose fit faces it is most similar to, if it is similar enough; they found none and merge none.
        run_tasks: runs the tasks of a step of average linkage.

    Returns:
        The cluster of each node, (n,), numbered by the smallest node, and the clusters.
    """
    threshold = graph.info.threshold.similarity
    u, v = graph.read_similar_pairs(threshold)
    # Merge what is one person from the start, then link clusters along the edges.
    single = Clusters.from_faces(graph.nodes.vectors, graph.density)
    known = _merge_known(graph, same)
    forbidden = None if different is None else different[known[different[:, 0]] != known[different[:, 1]]]
    if unfit is None or not unfit.any():
        labels, clusters = merge_by_average_linkage(
            single, u, v, threshold, forbidden, start=known, run_tasks=run_tasks
        )
        return _link_near_means(labels, clusters, threshold=threshold, different=different, run_tasks=run_tasks)
    # Only fit faces found persons. The others join them afterwards.
    is_waiting = _find_waiting(known, int(known.max(initial=-1)) + 1, unfit)[known]
    is_founding = ~(is_waiting[u] | is_waiting[v])
    labels, clusters = merge_by_average_linkage(
        single, u[is_founding], v[is_founding], threshold, forbidden, start=known, run_tasks=run_tasks
    )
    labels, clusters = _link_near_means(
        labels, clusters, threshold=threshold, different=different, unfit=unfit, run_tasks=run_tasks
    )
    is_waiting = _find_waiting(labels, len(clusters), unfit)
    group = _join_waiting(
        clusters, is_waiting, labels[u], labels[v], threshold=threshold, forbidden=_find_forbidden(labels, different)
    )
    return group[labels], clusters.merge(group)


def _find_waiting(labels: Int64, count: int, unfit: Bool) -> Bool:
    """Find the clusters (count,) that hold no fit face."""
    is_waiting = np.ones(count, bool)
    is_waiting[labels[~unfit]] = False
    return is_waiting


def _join_waiting(
    clusters: Clusters, is_waiting: Bool, u: Int64, v: Int64, *, threshold: float, forbidden: Int64 | None
) -> Int64:
    """Join clusters without a fit face to those with fit faces, each to the most similar one.

    Args:
        clusters: k clusters.
        is_waiting: whether a cluster holds no fit face, (k,).
        u: one cluster per edge, (m,).
        v: the other cluster, (m,).
        threshold: mean similarity from which a cluster joins another.
        forbidden: pairs (p, 2) of clusters that must not come together.

    Returns:
        The group (k,) of each cluster, numbered by its smallest member.
    """
    count = len(clusters)
    # Edges from a waiting cluster to one that is not, each once.
    is_between = is_waiting[u] != is_waiting[v]
    first = np.where(is_waiting[u], u, v)[is_between]
    second = np.where(is_waiting[u], v, u)[is_between]
    keys = np.unique(first * count + second)
    pairs = np.empty((0, 2), np.int64) if forbidden is None else forbidden
    keys = np.setdiff1d(keys, np.concatenate([pairs[:, 0] * count + pairs[:, 1], pairs[:, 1] * count + pairs[:, 0]]))
    joining = keys // max(1, count)
    target = keys % max(1, count)
    weight = clusters.compute_linkage(joining, target)
    # The most similar one of each, if it is similar enough; of equally similar ones the first.
    order = np.lexsort((target, -weight, joining))
    order = order[weight[order] >= threshold]
    order = order[np.diff(joining[order], prepend=-1) > 0]
    group = np.arange(count)
    group[joining[order]] = target[order]
    best = np.full(count, -np.inf, np.float32)
    best[joining[order]] = weight[order]
    # Two that must not come together may have joined one cluster: the less similar one stays alone.
    clashing = pairs[group[pairs[:, 0]] == group[pairs[:, 1]]]
    is_first_worse = best[clashing[:, 0]] < best[clashing[:, 1]]
    losing = np.where(is_first_worse, clashing[:, 0], clashing[:, 1])
    group[losing] = losing
    return renumber_labels(group)


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


def _link_near_means(
    labels: Int64,
    clusters: Clusters,
    *,
    threshold: float,
    different: Int64 | None,
    unfit: Bool | None = None,
    run_tasks: RunTasks,
) -> tuple[Int64, Clusters]:
    """Link clusters along pairs with near means, until a pass merges nothing.

    This is needed because edges are capped and cells miss a few: two halves of a person may share no edge. Clusters
    that hold only `unfit` nodes (n,) are left out.
    """
    for _ in range(_MAX_PASSES - 1):
        u, v = find_near_means(clusters, threshold)
        if unfit is not None:
            is_waiting = _find_waiting(labels, len(clusters), unfit)
            is_founding = ~(is_waiting[u] | is_waiting[v])
            u = u[is_founding]
            v = v[is_founding]
        forbidden = _find_forbidden(labels, different)
        group, merged = merge_by_average_linkage(clusters, u, v, threshold, forbidden, run_tasks=run_tasks)
        labels = group[labels]
        if len(merged) == len(clusters):
            break
        clusters = merged
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
