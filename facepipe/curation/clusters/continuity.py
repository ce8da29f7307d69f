"""Cluster anew without surprising anybody: clusters keep their numbers, and newcomers join old ones only if sure."""

from dataclasses import dataclass

import numpy as np

from facepipe.curation.clusters.assign import assign_faces
from facepipe.curation.clusters.persons import EarlierPersons
from facepipe.curation.clusters.sums import mask_empty
from facepipe.curation.graph import Graph
from facepipe.curation.graph.clusters import Clusters
from facepipe.curation.graph.components import renumber_labels
from facepipe.curation.graph.linkage import merge_by_average_linkage
from facepipe.sorted_lookup import find_sorted
from facepipe.types import Bool, Int64

_NO_PAIRS = np.empty((0, 2), np.int64)


@dataclass(frozen=True)
class EarlierClusters:
    """Which cluster each face had.

    Attributes:
        ids: Sorted face ids, (n,).
        clusters: Their clusters, (n,).
        next_number: Number of the next new cluster.
        persons: Who the clusters are.
    """

    ids: Int64
    clusters: Int64
    next_number: int
    persons: EarlierPersons

    def find(self, ids: Int64) -> Int64:
        """Find the clusters (m,) of faces (m,), -1 for faces that had none."""
        at = find_sorted(self.ids, ids)
        if not len(self.ids):
            return at
        return np.where(at >= 0, self.clusters[at], -1)


def keep_numbers(labels: Int64, count: int, earlier: Int64, order: Int64, next_number: int) -> Int64:
    """Assign numbers to clusters (count,): that of the earlier cluster with which one shares most faces, or a new one.

    Args:
        labels: cluster of each face, (n,).
        count: number of clusters.
        earlier: earlier cluster of each face, (n,), -1 for none.
        order: clusters in the order in which they get new numbers, (count,).
        next_number: first new number.
    """
    numbers = np.full(count, -1, np.int64)
    known = np.flatnonzero(earlier >= 0)
    if len(known):
        stride = int(earlier.max()) + 1
        keys, shared = np.unique(labels[known] * stride + earlier[known], return_counts=True)
        new = keys // stride
        old = keys % stride
        # A pair that share more faces with each other than with any other keep the number.
        best_of_new = _find_first(np.lexsort((old, -shared, new)), new)
        best_of_old = _find_first(np.lexsort((new, -shared, old)), old)
        mutual = np.intersect1d(best_of_new, best_of_old)
        numbers[new[mutual]] = old[mutual]
    unnumbered = order[numbers[order] < 0]
    numbers[unnumbered] = next_number + np.arange(len(unnumbered))
    return numbers


def _find_first(order: Int64, group: Int64) -> Int64:
    """Return the first position of each group in an order that is sorted by group."""
    return order[np.flatnonzero(np.diff(group[order], prepend=-1))]


def part_newcomers(
    graph: Graph,
    labels: Int64,
    clusters: Clusters,
    is_new: Bool,
    min_lead: float,
    *,
    known: Int64 | None = None,
) -> tuple[Int64, Clusters]:
    """Part new faces from the old ones of their cluster, unless these stand out as much as they must for new faces.

    Those that are parted stay together if they are one person by themselves.

    Args:
        graph: the face graph, n nodes.
        labels: cluster of each node, (n,).
        clusters: the clusters.
        is_new: whether each node is a new face, (n,).
        min_lead: how much the old faces of a cluster must stand out from the next clusters for a new face to stay.
        known: a number per node, (n,). Nodes with one number are known to be one person and stay together; by default
            those with one vector.

    Returns:
        The cluster of each node, (n,), numbered by the smallest node, and the clusters.
    """
    faces = Clusters.from_faces(graph.nodes.vectors, graph.density)
    new = np.flatnonzero(is_new)
    # The clusters of old faces, numbered as the clusters are.
    added = faces.take(new)
    sums = clusters.sums.copy()
    crowd = clusters.crowd.copy()
    np.subtract.at(sums, labels[new], added.sums)
    np.subtract.at(crowd, labels[new], added.crowd)
    old = Clusters(sums, crowd, np.bincount(labels[~is_new], minlength=len(clusters)))
    candidates = new[old.size[labels[new]] > 0]
    if not len(candidates):
        return labels, clusters
    placement = assign_faces(
        faces.take(candidates), mask_empty(old), graph.info.threshold.similarity, _NO_PAIRS, min_lead=min_lead
    )
    # What is one person stays or leaves as a whole: it leaves if it is all new, and none of it is sure to belong.
    person = graph.representatives if known is None else known
    is_leaving = np.zeros(len(labels), bool)
    is_leaving[candidates] = placement.known != labels[candidates]
    stays = np.zeros(int(person.max(initial=-1)) + 1, bool)
    stays[person[~is_leaving]] = True
    is_leaving &= ~stays[person]
    leaving = np.flatnonzero(is_leaving)
    # Faces that leave one cluster are merged along their edges.
    u, v = graph.read_similar_pairs(graph.info.threshold.similarity)
    is_inside = is_leaving[u] & is_leaving[v] & (labels[u] == labels[v])
    position = np.full(len(labels), -1, np.int64)
    position[leaving] = np.arange(len(leaving))
    group, _ = merge_by_average_linkage(
        faces.take(leaving),
        position[u[is_inside]],
        position[v[is_inside]],
        graph.info.threshold.similarity,
        margin=graph.info.threshold.margin,
        start=renumber_labels(np.unique(person[leaving], return_inverse=True)[1]),
    )
    parted = labels.copy()
    parted[leaving] = len(clusters) + group
    parted = renumber_labels(parted)
    return parted, faces.merge(parted)
