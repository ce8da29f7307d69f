"""What people have decided holds exactly: among known faces, among new ones, and between the two."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.curation.clusters.assign import assign_faces
from facepipe.curation.clusters.decided import DecidedNodes
from facepipe.curation.clusters.decided_places import find_group_places, gather_groups, place_groups
from facepipe.curation.clusters.persons import EarlierPersons, SharedFaces, match_persons
from facepipe.curation.graph.clusters import Clusters
from facepipe.decisions.persons import DecidedFaces
from facepipe.types import Int64

SEEDS = st.integers(0, 2**32 - 1)


def draw_decided(rng: np.random.Generator, faces: int, groups: int) -> DecidedFaces:
    """Draw decisions on some of the faces 0, 10, 20, ... without a contradiction."""
    ids = np.sort(rng.choice(faces, rng.integers(0, faces + 1), replace=False)) * 10
    names = int(rng.integers(0, groups + 1))
    name = np.full(groups, -1)
    name[rng.permutation(groups)[:names]] = np.arange(names)
    different = rng.integers(0, groups, (groups, 2))
    different = np.unique(np.sort(different[different[:, 0] != different[:, 1]], axis=1), axis=0)
    return DecidedFaces(
        ids=ids,
        group=rng.integers(0, groups, len(ids)),
        name=name,
        names=tuple(f"n{number:03d}" for number in range(names)),
        different=different.reshape(-1, 2),
        ignored=np.sort(rng.choice(faces, rng.integers(0, 1 + faces // 5), replace=False)) * 10,
    )


def check(decided: DecidedFaces, ids: Int64, clusters: Int64) -> None:
    """No decision is broken by the clusters of faces."""
    group = decided.find_groups(ids)
    group[decided.is_ignored(ids)] = -1
    cluster_of = np.full(decided.group_count, -1)
    for number in np.unique(group[group >= 0]).tolist():
        held = np.unique(clusters[group == number])
        assert len(held) == 1, "one person is in one cluster"
        cluster_of[number] = held[0]
    first, second = cluster_of[decided.different].T
    assert ((first != second) | (first < 0)).all(), "two persons are in two"
    named = cluster_of[(decided.name >= 0) & (cluster_of >= 0)]
    assert len(np.unique(named)) == len(named), "and so are two names"


@given(SEEDS, st.integers(1, 60), st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_keys_that_decisions_contradict_give_way(seed: int, count: int, groups: int) -> None:
    """Equal vectors and labels unite what no decision parts, and decisions hold among them."""
    rng = np.random.default_rng(seed)
    decided = draw_decided(rng, count, groups)
    nodes = DecidedNodes.locate(decided, np.arange(count) * 10)
    keys = [rng.integers(-1, max(1, count // 3), count) for _ in range(2)]
    component = nodes.unite(keys)
    check(decided, np.arange(count) * 10, component)
    undecided = np.flatnonzero(~nodes.is_decided)
    for key in keys:
        for number in np.unique(key[key >= 0]):
            assert len(np.unique(component[undecided[key[undecided] == number]])) <= 1
    assert np.array_equal(DecidedNodes.make_empty(count).unite(()), np.arange(count))


@given(SEEDS, st.integers(1, 60), st.integers(1, 12), st.integers(1, 12), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_clusters_are_gathered_as_decided(seed: int, count: int, groups: int, most: int, threshold: float) -> None:
    """From any clusters that hold no two persons: decisions hold, and who is not decided stays with the others."""
    rng = np.random.default_rng(seed)
    decided = draw_decided(rng, count, groups)
    nodes = DecidedNodes.locate(decided, np.arange(count) * 10)
    labels = nodes.unite([rng.integers(0, most, count)], with_groups=False)
    vectors = rng.standard_normal((count, 128)).astype(np.float32) * 0.1 + np.eye(128, dtype=np.float32)[labels % 128]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    faces = Clusters.from_faces(vectors, np.zeros(count, np.float32))
    gathered, clusters = gather_groups(nodes, labels, faces.merge(labels), faces, threshold)
    check(decided, np.arange(count) * 10, gathered)
    assert np.array_equal(clusters.size, np.bincount(gathered))
    assert np.allclose(clusters.sums, faces.merge(gathered).sums, atol=1e-4)
    undecided = np.flatnonzero(~nodes.is_decided)
    for number in np.unique(labels[undecided]):
        assert len(np.unique(gathered[undecided[labels[undecided] == number]])) == 1


def test_a_face_that_fits_stands_for_its_cluster() -> None:
    """One decision on two medoids joins two clusters; one on an outlier moves only that."""
    rng = np.random.default_rng(0)
    centres = np.eye(128, dtype=np.float32)[:3]
    vectors = np.repeat(centres, 5, axis=0) + 0.03 * rng.standard_normal((15, 128)).astype(np.float32)
    vectors[7] = centres[0] * 0.5 + centres[1] * 0.3 + np.eye(128, dtype=np.float32)[9]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = np.repeat(np.arange(3), 5)
    faces = Clusters.from_faces(vectors, np.zeros(15, np.float32))

    def gather(group: dict[int, int], different: list[list[int]]) -> list[int]:
        decided = DecidedFaces(
            ids=np.array(sorted(group)),
            group=np.array([group[face] for face in sorted(group)]),
            name=np.full(3, -1),
            different=np.array(different, np.int64).reshape(-1, 2),
        )
        nodes = DecidedNodes.locate(decided, np.arange(15))
        result: list[int] = gather_groups(nodes, labels, faces.merge(labels), faces, 0.6)[0].tolist()
        return result

    assert gather({0: 0, 5: 0}, []) == [0] * 10 + [1] * 5
    assert gather({0: 0, 7: 0}, []) == [0] * 5 + [1, 1, 0, 1, 1] + [2] * 5
    # Two that would bring together two persons are not joined: only the decided face moves.
    assert gather({0: 0, 5: 0, 1: 1, 6: 2}, [[1, 2]]) == [0] * 5 + [0, 1, 1, 1, 1] + [2] * 5


@given(SEEDS, st.integers(1, 60), st.integers(1, 12), st.integers(1, 10))
@settings(max_examples=100, deadline=None)
def test_as_few_faces_as_needed_leave_their_cluster(seed: int, count: int, groups: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    decided = draw_decided(rng, count, groups)
    clusters = rng.integers(-1, most, len(decided.ids))
    places = find_group_places(decided, clusters)
    stays = ~np.isin(decided.ids, places.moved)
    kept = stays & (clusters >= 0)
    assert np.array_equal(places.cluster[decided.group[kept]], clusters[kept])
    assert not np.isin(decided.ids[clusters < 0], places.moved).any()
    group = decided.group.copy()
    group[~kept] = -1
    check(
        DecidedFaces(decided.ids, group, decided.name, decided.names, decided.different),
        decided.ids[kept],
        clusters[kept],
    )
    # A group that has no enemy and no name stays where most of it is.
    is_free = ~np.isin(np.arange(groups), decided.different) & (decided.name < 0)
    for number in np.flatnonzero(is_free).tolist():
        inside = clusters[(decided.group == number) & (clusters >= 0)]
        assert places.cluster[number] == (np.bincount(inside).argmax() if len(inside) else -1)


@given(SEEDS, st.integers(1, 50), st.integers(1, 10), st.integers(1, 8), st.booleans())
@settings(max_examples=100, deadline=None)
def test_new_faces_go_where_decisions_say(seed: int, count: int, groups: int, most: int, similar: bool) -> None:
    """New and moved faces, placed by any similarity: with what has a cluster already no decision is broken."""
    rng = np.random.default_rng(seed)
    decided = draw_decided(rng, count, groups)
    ids = np.arange(count) * 10
    before = rng.integers(-1, most, count)
    known_decided = before[decided.ids // 10].copy()
    known_decided[decided.is_ignored(decided.ids)] = -1
    places = find_group_places(decided, known_decided)
    is_new = ((before < 0) | np.isin(ids, places.moved)) & ~decided.is_ignored(ids)
    new = ids[is_new]
    nodes = DecidedNodes.locate(decided, new)
    unit = nodes.unite(())
    first = np.unique(unit, return_index=True)[1]
    vectors = np.full((len(new), 128), 128**-0.5, np.float32)
    if not similar:
        vectors = rng.standard_normal(vectors.shape).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    faces = Clusters.from_faces(vectors, np.zeros(len(new), np.float32))
    known = Clusters.from_faces(np.full((most, 128), 128**-0.5, np.float32), np.zeros(most, np.float32))
    pairs = unit[nodes.different]
    placement = assign_faces(
        faces.merge(unit),
        known,
        0.5 if similar else 0.0,
        pairs[pairs[:, 0] != pairs[:, 1]],
        decided=place_groups(decided, places, nodes.group[first], most),
    )
    clusters = before.copy()
    clusters[is_new] = np.where(placement.known >= 0, placement.known, most + placement.new)[unit]
    assert (clusters[is_new] >= 0).all()
    present = (clusters >= 0) & ~decided.is_ignored(ids)
    check(decided, ids[present], clusters[present])


@pytest.mark.parametrize("seed", range(5))
def test_persons_are_matched_once_each(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cluster = rng.integers(0, 12, 300)
    person = rng.integers(-1, 15, 300)
    shared = SharedFaces.count_up(cluster, person, np.ones(300, np.int64), rng.random(300) < 0.1)
    persons = match_persons(shared, np.full(12, -1), (), EarlierPersons(next_person=15), rng.permutation(12)[:10])
    given_ = persons[persons >= 0]
    assert len(np.unique(given_)) == len(given_) == 10


def test_confirmed_faces_decide_who_a_cluster_is() -> None:
    """One decided face outweighs ten others; without any the larger part of a person keeps its id."""
    cluster = np.array([0] * 10 + [1] * 3 + [0] * 2 + [2])
    person = np.array([7] * 13 + [4] * 2 + [-1])
    nothing = np.zeros(len(cluster), bool)
    ones = np.ones(len(cluster), np.int64)
    nobody = np.full(3, -1)
    earlier = EarlierPersons(next_person=9)
    by_size = SharedFaces.count_up(cluster, person, ones, nothing)
    assert match_persons(by_size, nobody, (), earlier, np.arange(3)).tolist() == [7, 9, 10]
    decided = nothing.copy()
    decided[11] = True
    by_decision = SharedFaces.count_up(cluster, person, ones, decided)
    assert match_persons(by_decision, nobody, (), earlier, np.arange(3)).tolist() == [4, 7, 9]
