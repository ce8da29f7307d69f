"""Where faces that people have decided on belong among existing clusters, and which must leave the one they are in."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from facepipe.curation.clusters.assign import DecidedPlaces
from facepipe.decisions.persons import DecidedFaces
from facepipe.types import Int64


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
