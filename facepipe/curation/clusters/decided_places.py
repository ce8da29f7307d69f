"""Where faces that people have decided on belong among existing clusters, and which must leave the one they are in."""

from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np

from facepipe.curation.clusters.assign import DecidedPlaces
from facepipe.curation.clusters.decided import DecidedNodes
from facepipe.curation.graph.clusters import Clusters
from facepipe.curation.graph.components import renumber_labels
from facepipe.decisions.persons import DecidedFaces
from facepipe.types import Bool, Int32, Int64


@dataclass(frozen=True)
class GroupPlaces:
    """The existing clusters of groups of decided faces.

    Attributes:
        cluster: Cluster of each group, (g,), -1 for one that has none, or that must leave the one it is in.
        moved: Sorted ids of faces that are in another cluster than their group.
    """

    cluster: Int64
    moved: Int64


def find_group_places(decided: DecidedFaces, clusters: Int64) -> GroupPlaces:
    """Find the cluster of each group: that of most of its faces, unless more faces there are another person's.

    Args:
        decided: what people have decided.
        clusters: cluster of each of its faces, (q,), -1 for none.
    """
    members = np.flatnonzero(clusters >= 0)
    stride = int(clusters.max(initial=-1)) + 1
    keys, count = np.unique(decided.group[members] * max(1, stride) + clusters[members], return_counts=True)
    groups = keys // max(1, stride)
    numbers = keys % max(1, stride)
    opponents: dict[int, set[int]] = defaultdict(set)
    for first, second in decided.different.tolist():
        opponents[first].add(second)
        opponents[second].add(first)
    # The most faces choose first. A cluster takes a group if nobody there is known to be another person.
    places = np.full(decided.group_count, -1, np.int64)
    residents: dict[int, set[int]] = defaultdict(set)
    name_of_cluster: dict[int, int] = {}
    for at in np.lexsort((numbers, groups, -count)).tolist():
        group = int(groups[at])
        cluster = int(numbers[at])
        name = int(decided.name[group])
        if places[group] >= 0 or opponents[group] & residents[cluster]:
            continue
        if name >= 0 and name_of_cluster.setdefault(cluster, name) != name:
            continue
        places[group] = cluster
        residents[cluster].add(group)
    is_moved = clusters[members] != places[decided.group[members]]
    return GroupPlaces(places, decided.ids[members[is_moved]])


def gather_groups(
    decided: DecidedNodes, labels: Int64, clusters: Clusters, faces: Clusters, threshold: float
) -> tuple[Int64, Clusters]:
    """Bring each group of decided nodes into one cluster. The clusters are those that the faces' looks make.

    A face that fits its cluster stands for it: two clusters become one if two such faces are one person by decision,
    unless that would join two persons. A face that does not fit leaves its cluster alone.

    Args:
        decided: what people have decided on n nodes.
        labels: cluster of each node, (n,). None holds two persons by decision.
        clusters: the clusters.
        faces: the nodes, as clusters of one.
        threshold: mean similarity to the rest from which a face fits its cluster.

    Returns:
        The cluster of each node, (n,), numbered by the smallest node, and the clusters.
    """
    nodes = np.flatnonzero(decided.group >= 0)
    group = decided.group[nodes]
    # Join the clusters of faces that fit.
    fits = _find_fitting(faces.take(nodes), labels[nodes], clusters, threshold)
    person = decided.links.contract(labels, len(clusters)).person
    joined = _ClusterJoin(labels[decided.different], person, len(clusters))
    first: dict[int, int] = {}
    for number, cluster in zip(group[fits].tolist(), labels[nodes[fits]].tolist(), strict=True):
        joined.join(first.setdefault(number, cluster), cluster)
    gathered = joined.find_all()[labels]
    # The rest goes to where most of its group is, or is by itself.
    own = replace(decided.faces, ids=nodes, group=group)
    places = find_group_places(own, gathered[nodes])
    home = np.where(places.cluster >= 0, places.cluster, len(clusters) + np.arange(len(places.cluster)))
    gathered[places.moved] = home[decided.group[places.moved]]
    if np.array_equal(gathered, labels):
        return labels, clusters
    gathered = renumber_labels(np.unique(gathered, return_inverse=True)[1])
    return gathered, faces.merge(gathered)


def _find_fitting(faces: Clusters, labels: Int64, clusters: Clusters, threshold: float) -> Bool:
    """Find the faces (m,) whose mean similarity to the rest of their clusters (m,) reaches a threshold."""
    others = clusters.size[labels] - 1
    divisor = np.maximum(1, others)
    rest = np.einsum("nd,nd->n", faces.sums, clusters.sums[labels] - faces.sums) / divisor
    density = (faces.crowd + (clusters.crowd[labels] - faces.crowd) / divisor) / 2
    return np.asarray((others == 0) | (rest - density >= threshold), bool)


class _ClusterJoin:
    """Joins clusters one by one, unless that would bring together two persons."""

    def __init__(self, different: Int64, person: Int32, count: int):
        self._parent: dict[int, int] = {}
        self._count = count
        self._opponents: dict[int, set[int]] = defaultdict(set)
        for first, second in different.tolist():
            self._opponents[first].add(second)
            self._opponents[second].add(first)
        self._person = {number: int(person[number]) for number in np.flatnonzero(person >= 0).tolist()}

    def _find(self, cluster: int) -> int:
        root = cluster
        while self._parent.get(root, root) != root:
            root = self._parent[root]
        while cluster != root:
            following = self._parent.get(cluster, cluster)
            self._parent[cluster] = root
            cluster = following
        return root

    def join(self, first: int, second: int) -> None:
        """Join two clusters, with all that they are joined to."""
        kept = self._find(first)
        gone = self._find(second)
        if kept == gone:
            return
        persons = {self._person[root] for root in (kept, gone) if root in self._person}
        if len(persons) > 1 or any(self._find(other) == gone for other in self._opponents[kept]):
            return
        self._parent[gone] = kept
        self._opponents[kept] |= self._opponents.pop(gone, set())
        for person in persons:
            self._person[kept] = person

    def find_all(self) -> Int64:
        """Find which cluster each (k,) is part of now."""
        roots = np.arange(self._count)
        for cluster in list(self._parent):
            roots[cluster] = self._find(cluster)
        return roots


def place_groups(decided: DecidedFaces, places: GroupPlaces, group: Int64, cluster_count: int) -> DecidedPlaces:
    """Say what is decided on new faces, each of which may stand for several.

    Args:
        decided: what people have decided.
        places: the clusters of its groups.
        group: group of each new face, (n,), -1 for none.
        cluster_count: number of existing clusters.
    """
    is_decided = group >= 0
    empty = DecidedPlaces.make_empty(len(group), cluster_count)
    empty.cluster[is_decided] = places.cluster[group[is_decided]]
    empty.person[is_decided] = decided.name[group[is_decided]]
    settled = np.flatnonzero((places.cluster >= 0) & (decided.name >= 0))
    empty.person_of_cluster[places.cluster[settled]] = decided.name[settled]
    # A group keeps away from the clusters of groups that are other persons.
    pairs = np.concatenate([decided.different, decided.different[:, ::-1]])
    pairs = pairs[places.cluster[pairs[:, 1]] >= 0]
    face_of_group = np.full(decided.group_count, -1, np.int64)
    face_of_group[group[is_decided]] = np.flatnonzero(is_decided)
    excluded = np.stack([face_of_group[pairs[:, 0]], places.cluster[pairs[:, 1]]], axis=1)
    return DecidedPlaces(
        empty.cluster, empty.person, empty.person_of_cluster, np.unique(excluded[excluded[:, 0] >= 0], axis=0)
    )
