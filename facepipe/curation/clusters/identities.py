"""Cluster the faces of a graph into persons by average linkage."""

import tempfile

import numpy as np

from facepipe.curation.clusters.decided import DecidedNodes
from facepipe.curation.clusters.decided_places import gather_groups
from facepipe.curation.graph import Graph
from facepipe.curation.graph.cannot_links import CannotLinks
from facepipe.curation.graph.cells import CellLayout, train_cells
from facepipe.curation.graph.clusters import Clusters
from facepipe.curation.graph.components import renumber_labels
from facepipe.curation.graph.edges import iterate_ends, select_ends, spill_ends
from facepipe.curation.graph.linkage import RunTasks, merge_by_average_linkage, run_tasks_here
from facepipe.nearest.join import find_candidate_pairs
from facepipe.types import Bool, Float32, Int32, Int64

_MAX_NEIGHBOURS = 32  # clusters that a cluster is compared with, per cell
_MAX_PASSES = 4


def cluster_faces(
    graph: Graph,
    different: Int64 | None = None,
    same: Int64 | None = None,
    unfit: Bool | None = None,
    *,
    decided: DecidedNodes | None = None,
    left_out: Bool | None = None,
    run_tasks: RunTasks = run_tasks_here,
) -> tuple[Int64, Clusters]:
    """Cluster the nodes of a graph into persons.

    What people have decided holds exactly. Else nodes with equal vectors are one person, whatever `different` says.

    Args:
        graph: the face graph, n nodes.
        different: pairs of nodes that are two persons, (m, 2).
        same: a number per node, (n,), -1 for none. Nodes with one number are one person.
        unfit: whether a node is a face that is cut or poor, (n,). Such faces look alike whoever they show. Each joins
            the person whose fit faces it is most similar to, if it is similar enough; they found none and merge none.
        decided: what people have said about the nodes; nothing by default. It overrules `different` and `same`.
        left_out: whether a node stays out of all clusters, (n,). Each is returned as a cluster of its own.
        run_tasks: runs the tasks of a step of average linkage.

    Returns:
        The cluster of each node, (n,), numbered by the smallest node, and the clusters.
    """
    threshold = graph.info.threshold.similarity
    margin = graph.info.threshold.margin
    u, v = graph.read_similar_pairs(threshold)
    if left_out is not None:
        u, v = _drop_left_out(graph.representatives, u, v, left_out)
    # Merge what is one person from the start, then link clusters along the edges.
    single = Clusters.from_faces(graph.nodes.vectors, graph.density)
    known = unite_known(graph, same, decided, left_out, with_groups=False)
    apart = join_links(different, decided, known)
    founding = (u, v)
    if unfit is not None and not unfit.any():
        unfit = None
    if unfit is not None:
        # Only fit faces found persons. The others join them afterwards.
        is_waiting = _find_waiting(known, int(known.max(initial=-1)) + 1, unfit)[known]
        founding = select_ends(u, v, lambda left, right: ~(is_waiting[left] | is_waiting[right]))
    labels, clusters = merge_by_average_linkage(
        single,
        *founding,
        threshold,
        apart.pairs,
        person=apart.person,
        start=known,
        margin=margin,
        run_tasks=run_tasks,
    )
    labels, clusters = _link_near_means(
        labels, clusters, threshold=threshold, margin=margin, apart=apart, unfit=unfit, run_tasks=run_tasks
    )
    if unfit is None:
        return _gather(decided, labels, clusters, single, threshold)
    is_waiting = _find_waiting(labels, len(clusters), unfit)
    # Only edges between a cluster that waits and one that does not matter.
    u, v = select_ends(u, v, lambda left, right: is_waiting[labels[left]] != is_waiting[labels[right]])
    group = _join_waiting(
        clusters,
        is_waiting,
        labels[u],
        labels[v],
        threshold=threshold,
        apart=apart.contract(labels, len(clusters)),
    )
    return _gather(decided, group[labels], clusters.merge(group), single, threshold)


def _gather(
    decided: DecidedNodes | None, labels: Int64, clusters: Clusters, faces: Clusters, threshold: float
) -> tuple[Int64, Clusters]:
    """Bring what people have said is one person into one cluster. Until here it was only kept from what it is not."""
    if decided is None or not decided.is_decided.any():
        return labels, clusters
    return gather_groups(decided, labels, clusters, faces, threshold)


def unite_known(
    graph: Graph,
    same: Int64 | None = None,
    decided: DecidedNodes | None = None,
    left_out: Bool | None = None,
    *,
    with_groups: bool = True,
) -> Int64:
    """Unite what is one person from the start: by decision, vectors that are equal in every bit, and equal numbers.

    Args:
        graph: the face graph, n nodes.
        same: a number per node, (n,), -1 for none.
        decided: what people have said about the nodes.
        left_out: whether a node stays alone, (n,).
        with_groups: whether decisions unite. What they part is apart in any case.

    Returns:
        The component (n,) of each node, numbered by its smallest node.
    """
    copies = graph.representatives
    keys = [copies] if same is None else [copies, same]
    if left_out is not None:
        keys = [np.where(left_out, -1, key) for key in keys]
    return (decided or DecidedNodes.make_empty(len(copies))).unite(keys, with_groups=with_groups)


def join_links(different: Int64 | None, decided: DecidedNodes | None, known: Int64) -> CannotLinks:
    """Join what must not come together: pairs of nodes (m, 2) that are two in `known` (n,), and decisions."""
    pairs = np.empty((0, 2), np.int64)
    if different is not None:
        pairs = different[known[different[:, 0]] != known[different[:, 1]]]
    if decided is None:
        return CannotLinks(pairs)
    person = decided.person if (decided.person >= 0).any() else np.empty(0, np.int32)
    return CannotLinks(np.concatenate([pairs, decided.different]), person)


def _drop_left_out(copies: Int64, u: Int32, v: Int32, left_out: Bool) -> tuple[Int32, Int32]:
    """Drop the edges of nodes that are left out. Of equal vectors only the first has edges: another takes them over."""
    stand_in = np.arange(len(copies), dtype=np.int32)
    kept = np.flatnonzero(~left_out)
    lacks_first = kept[left_out[copies[kept]]]
    # Of several copies the first one takes over: numpy keeps the last value written.
    stand_in[copies[lacks_first[::-1]]] = lacks_first[::-1]
    blocks = ((stand_in[left], stand_in[right]) for left, right in iterate_ends(u, v))
    moved = spill_ends(blocks, len(u))
    return select_ends(*moved, lambda left, right: ~(left_out[left] | left_out[right]) & (left != right))


def _find_waiting(labels: Int64, count: int, unfit: Bool) -> Bool:
    """Find the clusters (count,) that hold no fit face."""
    is_waiting = np.ones(count, bool)
    is_waiting[labels[~unfit]] = False
    return is_waiting


def _join_waiting(
    clusters: Clusters, is_waiting: Bool, u: Int64, v: Int64, *, threshold: float, apart: CannotLinks
) -> Int64:
    """Join clusters without a fit face to those with fit faces, each to the most similar one.

    Args:
        clusters: k clusters.
        is_waiting: whether a cluster holds no fit face, (k,).
        u: one cluster per edge, (m,).
        v: the other cluster, (m,).
        threshold: mean similarity from which a cluster joins another.
        apart: what must not come together.

    Returns:
        The group (k,) of each cluster, numbered by its smallest member.
    """
    count = len(clusters)
    # Edges from a waiting cluster to one that is not, each once.
    is_between = is_waiting[u] != is_waiting[v]
    first = np.where(is_waiting[u], u, v)[is_between]
    second = np.where(is_waiting[u], v, u)[is_between]
    keys = np.unique(first * count + second)
    joining = keys // max(1, count)
    target = keys % max(1, count)
    is_allowed = ~apart.forbid(joining, target, count)
    joining = joining[is_allowed]
    target = target[is_allowed]
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
    losing = _find_other_persons(group, best, apart.person) if len(apart.person) else np.empty(0, np.int64)
    group[losing] = losing
    clashing = apart.pairs[group[apart.pairs[:, 0]] == group[apart.pairs[:, 1]]]
    is_first_worse = best[clashing[:, 0]] < best[clashing[:, 1]]
    losing = np.where(is_first_worse, clashing[:, 0], clashing[:, 1])
    group[losing] = losing
    return renumber_labels(group)


def _find_other_persons(group: Int64, best: Float32, person: Int32) -> Int64:
    """Find the clusters (m,) of a group that are not of the person of its most similar member.

    Args:
        group: the group of each cluster, (k,).
        best: how similar each cluster is to the one that it has joined, (k,).
        person: number of the person that each cluster is known to be, (k,), -1 for none.
    """
    joined = np.flatnonzero((person >= 0) & (group != np.arange(len(group))))
    order = joined[np.lexsort((joined, -best[joined], group[joined]))]
    is_first = np.diff(group[order], prepend=-1) > 0
    winner = person[order[is_first]][np.cumsum(is_first) - 1]
    return np.asarray(order[person[order] != winner], np.int64)


def _link_near_means(
    labels: Int64,
    clusters: Clusters,
    *,
    threshold: float,
    margin: float,
    apart: CannotLinks,
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
        links = apart.contract(labels, len(clusters))
        group, merged = merge_by_average_linkage(
            clusters, u, v, threshold, links.pairs, person=links.person, margin=margin, run_tasks=run_tasks
        )
        labels = group[labels]
        if len(merged) == len(clusters):
            break
        clusters = merged
    return labels, clusters


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
