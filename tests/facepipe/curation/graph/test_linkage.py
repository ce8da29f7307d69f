"""Average linkage: the partition that SciPy finds from all distances, whatever the order; constraints; large stars."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster
from scipy.cluster.hierarchy import linkage as scipy_linkage
from scipy.spatial.distance import squareform

from facepipe.curation.graph.clusters import Clusters
from facepipe.curation.graph.components import renumber_labels
from facepipe.curation.graph.linkage import (
    LinkageResult,
    LinkageTask,
    RunTasks,
    merge_by_average_linkage,
    run_linkage_task,
    run_tasks_here,
)
from facepipe.nearest.join import find_candidate_pairs

SEEDS = st.integers(0, 2**32 - 1)
NONE = np.empty(0, np.int64)


def unit(vectors: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def faces(count: int, persons: int, spread: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = unit(rng.standard_normal((persons, 128)) + np.eye(128)[0] * 8)
    return unit(centres[rng.integers(0, persons, count)] + spread * rng.standard_normal((count, 128)))


def all_pairs(count: int) -> tuple[np.ndarray, np.ndarray]:
    u, v = np.triu_indices(count, 1)
    return u, v


def brute(vectors: np.ndarray, density: np.ndarray) -> np.ndarray:
    wide, crowd = vectors.astype(np.float64), density.astype(np.float64)
    return wide @ wide.T - (crowd[:, None] + crowd) / 2


def by_scipy(similarity: np.ndarray, quantile: float) -> tuple[np.ndarray, float]:
    """(labels, a threshold in the middle of a gap between two merges, so that rounding cannot decide)."""
    distance = similarity.max() + 1 - similarity  # SciPy takes no negative ones
    np.fill_diagonal(distance, 0)
    tree = scipy_linkage(squareform(distance, checks=False), "average")
    heights = np.concatenate([[tree[0, 2] - 0.1], tree[:, 2], [tree[-1, 2] + 0.1]])
    at = round(quantile * (len(heights) - 2))
    gaps = np.argsort(-np.diff(heights))  # widest first
    near = min(gaps[: max(1, len(gaps) // 2)], key=lambda gap: abs(gap - at))
    cut = (heights[near] + heights[near + 1]) / 2
    return renumber_labels(fcluster(tree, cut, "distance").astype(np.int64) - 1), float(similarity.max() + 1 - cut)


def random_case(seed: int, count: int, crowded: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    vectors = faces(count, rng.integers(1, 8), rng.choice([0.02, 0.06, 0.1]), seed)
    return vectors, (rng.uniform(0, 0.4, count) if crowded else np.zeros(count)).astype(np.float32)


@given(SEEDS, st.integers(2, 70), st.booleans(), st.floats(0, 1))
@settings(max_examples=120, deadline=None)
def test_the_partition_is_that_of_scipy(seed: int, count: int, crowded: bool, quantile: float) -> None:
    vectors, density = random_case(seed, count, crowded)
    wanted, threshold = by_scipy(brute(vectors, density), quantile)
    group, clusters = merge_by_average_linkage(Clusters.from_faces(vectors, density), *all_pairs(count), threshold)
    assert np.array_equal(group, wanted)
    assert np.array_equal(clusters.size, np.bincount(wanted))


@given(SEEDS, st.integers(2, 60), st.booleans(), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_neither_the_order_of_edges_nor_that_of_faces_counts(
    seed: int, count: int, crowded: bool, quantile: float
) -> None:
    rng = np.random.default_rng(seed)
    vectors, density = random_case(seed, count, crowded)
    _, threshold = by_scipy(brute(vectors, density), quantile)
    u, v = all_pairs(count)
    some = rng.random(len(u)) < 0.4
    u, v = u[some], v[some]
    clusters = Clusters.from_faces(vectors, density)
    group, merged = merge_by_average_linkage(clusters, u, v, threshold)
    order, turned = rng.permutation(len(u)), rng.random(len(u)) < 0.5
    again = np.concatenate([order, order[: len(order) // 2]])  # an edge may come twice
    left, right = np.where(turned, u, v)[again], np.where(turned, v, u)[again]
    assert np.array_equal(merge_by_average_linkage(clusters, left, right, threshold)[0], group)
    place = rng.permutation(count)
    moved = np.empty(count, np.int64)
    moved[place] = np.arange(count)
    elsewhere, _ = merge_by_average_linkage(
        Clusters.from_faces(vectors[place], density[place]), moved[u], moved[v], threshold
    )
    assert np.array_equal(renumber_labels(elsewhere[moved]), group)
    assert len(merged) == group.max() + 1


@given(SEEDS, st.integers(2, 60), st.floats(0, 1), st.integers(1, 40), st.booleans())
@settings(max_examples=60, deadline=None)
def test_forbidden_pairs_stay_apart(seed: int, count: int, quantile: float, most: int, hasty: bool) -> None:
    rng = np.random.default_rng(seed)
    vectors, density = random_case(seed, count, False)
    _, threshold = by_scipy(brute(vectors, density), quantile)
    forbidden = rng.integers(0, count, (most, 2))
    forbidden = forbidden[forbidden[:, 0] != forbidden[:, 1]]
    with pytest.MonkeyPatch.context() as patch:
        if hasty:  # leaves join stars from the first round
            patch.setattr("facepipe.curation.graph.rounds._STRICT_ROUNDS", -1000)
        u, v = all_pairs(count)
        clusters = Clusters.from_faces(vectors, density)
        group, merged = merge_by_average_linkage(clusters, u, v, threshold, forbidden)
        free, _ = merge_by_average_linkage(clusters, u, v, threshold)
    assert (group[forbidden[:, 0]] != group[forbidden[:, 1]]).all()
    # What is left apart must be: too far, or forbidden.
    left, right = all_pairs(len(merged))
    near = merged.compute_linkage(left, right) >= threshold + 1e-5
    barred = {frozenset(pair) for pair in group[forbidden].tolist()}
    assert all(frozenset(pair) in barred for pair in np.stack([left, right], axis=1)[near].tolist())
    if (free[forbidden[:, 0]] != free[forbidden[:, 1]]).all() and not hasty:
        assert np.array_equal(free, group)


def draw_links(rng: np.random.Generator, count: int, named: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw groups that are one person, persons that some of them are known to be, and pairs that are two persons."""
    start = renumber_labels(np.minimum(np.arange(count), rng.integers(0, 2 * count, count)))
    name = np.where(rng.random(count) < named, rng.integers(0, 4, count), -1)
    # Groups with one name may come together, and so may a group and itself.
    forbidden = rng.integers(0, count, (count // 3, 2))
    return start, name[start].astype(np.int32), forbidden[start[forbidden[:, 0]] != start[forbidden[:, 1]]]


@given(SEEDS, st.integers(2, 60), st.floats(0, 1), st.floats(0, 1), st.sampled_from([0.3, 1.0]), st.booleans())
@settings(max_examples=80, deadline=None)
def test_what_is_known_of_persons_holds(
    seed: int, count: int, quantile: float, named: float, share: float, hasty: bool
) -> None:
    """Known groups are together, known persons and forbidden pairs apart, and nothing else is hindered."""
    rng = np.random.default_rng(seed)
    vectors, density = random_case(seed, count, True)
    _, threshold = by_scipy(brute(vectors, density), quantile)
    start, person, forbidden = draw_links(rng, count, named)
    u, v = all_pairs(count)
    some = rng.random(len(u)) < share
    clusters = Clusters.from_faces(vectors, density)
    with pytest.MonkeyPatch.context() as patch:
        if hasty:
            patch.setattr("facepipe.curation.graph.rounds._STRICT_ROUNDS", -1000)
        group, merged = merge_by_average_linkage(
            clusters, u[some], v[some], threshold, forbidden, person=person, start=start
        )
    assert all(len(np.unique(group[start == number])) == 1 for number in np.unique(start))
    assert (group[forbidden[:, 0]] != group[forbidden[:, 1]]).all()
    persons = [set(person[group == number].tolist()) - {-1} for number in range(len(merged))]
    assert all(len(names) <= 1 for names in persons)
    if share < 1:
        return
    # What is left apart must be: too far, forbidden, or two persons.
    left, right = all_pairs(len(merged))
    near = merged.compute_linkage(left, right) >= threshold + 1e-5
    barred = {frozenset(pair) for pair in group[forbidden].tolist()}
    for first, second in np.stack([left, right], axis=1)[near].tolist():
        assert frozenset((first, second)) in barred or len(persons[first] | persons[second]) == 2


@given(
    SEEDS,
    st.integers(2, 120),
    st.floats(0, 1),
    st.floats(0.05, 1),
    st.integers(0, 20),
    st.integers(1, 30),
    st.floats(0, 0.5),
    st.sampled_from([0.0, 0.1]),
)
@settings(max_examples=80, deadline=None)
def test_no_spread_of_the_components_over_tasks_counts(
    seed: int, count: int, quantile: float, share: float, most: int, nodes_per_task: int, named: float, margin: float
) -> None:
    """Tasks of few nodes, in any order, give the sums of one task to the bit, whatever is known of persons."""
    rng = np.random.default_rng(seed)
    vectors, density = random_case(seed, count, True)
    _, threshold = by_scipy(brute(vectors, density), quantile)
    clusters = Clusters.from_faces(vectors, density)
    u, v = all_pairs(count)
    some = rng.random(len(u)) < share
    start, person, apart = draw_links(rng, count, named)
    forbidden = np.concatenate([rng.integers(0, count, (most, 2)), apart])
    forbidden = forbidden[start[forbidden[:, 0]] != start[forbidden[:, 1]]]
    counts: list[int] = []

    def run_shuffled(tasks: Iterable[LinkageTask]) -> Iterable[LinkageResult]:
        together = list(tasks)
        counts.append(len(together))
        return [run_linkage_task(together[at]) for at in rng.permutation(len(together))]

    def merge(run_tasks: RunTasks) -> tuple[np.ndarray, Clusters]:
        return merge_by_average_linkage(
            clusters,
            u[some],
            v[some],
            threshold,
            forbidden,
            person=person,
            start=start,
            margin=margin,
            run_tasks=run_tasks,
        )

    group, merged = merge(run_tasks_here)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("facepipe.curation.graph.linkage._MAX_NODES_PER_TASK", nodes_per_task)
        spread, parts = merge(run_shuffled)
    assert np.array_equal(spread, group)
    assert parts.sums.tobytes() == merged.sums.tobytes()
    assert parts.crowd.tobytes() == merged.crowd.tobytes()
    assert parts.size.tobytes() == merged.size.tobytes()
    event("more tasks than one in a step" if max(counts) > 1 else "one task per step")


def merge_one_by_one(similarity: np.ndarray, threshold: float, margin: float) -> tuple[np.ndarray, float]:
    """Merge the best two groups again and again; returns labels and how near any decision was to another one."""
    groups = [[face] for face in range(len(similarity))]
    doubt = np.inf
    while len(groups) > 1:
        weights = {}
        for at, first in enumerate(groups):
            for other, second in enumerate(groups[:at]):
                smaller = min(len(first), len(second))
                weights[other, at] = similarity[np.ix_(first, second)].mean() - margin * (1 - 1 / smaller)
        ranked = sorted(weights.values(), reverse=True)
        doubt = min(doubt, abs(ranked[0] - threshold))
        if ranked[0] < threshold:
            break
        doubt = min([doubt, *(ranked[0] - second for second in ranked[1:2])])
        left, right = max(weights, key=lambda pair: weights[pair])
        groups[left] += groups.pop(right)
    labels = np.empty(len(similarity), np.int64)
    for number, group in enumerate(groups):
        labels[group] = number
    return renumber_labels(labels), doubt


@given(SEEDS, st.integers(2, 30), st.booleans(), st.floats(0, 1), st.floats(0, 0.3))
@settings(max_examples=60, deadline=None)
def test_with_a_margin_of_groups_the_partition_is_that_of_merging_one_by_one(
    seed: int, count: int, crowded: bool, quantile: float, margin: float
) -> None:
    vectors, density = random_case(seed, count, crowded)
    similarity = brute(vectors, density)
    _, threshold = by_scipy(similarity, quantile)
    wanted, doubt = merge_one_by_one(similarity, threshold, margin)
    assume(doubt > 1e-5)  # or rounding would decide
    clusters = Clusters.from_faces(vectors, density)
    group, _ = merge_by_average_linkage(clusters, *all_pairs(count), threshold, margin=margin)
    assert np.array_equal(group, wanted)
    plain, _ = merge_by_average_linkage(clusters, *all_pairs(count), threshold)
    event("the margin counts" if len(np.unique(plain)) < len(np.unique(group)) else "it does not")


def test_a_margin_parts_two_groups_and_no_single_face() -> None:
    """Two groups of 16 are as near to each other as a face is to them: only the groups stay apart."""
    basis = np.eye(128)
    first = unit(basis[0] + 0.3 * basis[2:18])
    second = unit(0.8 * basis[0] + 0.6 * basis[1] + 0.3 * basis[18:34])
    between = float((first @ second.T).mean())
    lone = unit(0.8 * basis[:1] + 0.6 * basis[40:41])
    assert abs(float((first @ lone.T).mean()) - between) < 0.05
    vectors = np.concatenate([first, second, lone])
    clusters = Clusters.from_faces(vectors, np.zeros(len(vectors), np.float32))
    threshold = min(between, float((first @ lone.T).mean())) - 0.01
    plain, _ = merge_by_average_linkage(clusters, *all_pairs(33), threshold)
    assert len(np.unique(plain)) == 1
    group, _ = merge_by_average_linkage(clusters, *all_pairs(33), threshold, margin=0.1)
    assert len(np.unique(group)) == 2
    assert group[32] == group[0]


def test_a_pair_that_is_forbidden_does_not_hinder_others() -> None:
    """Two faces of one photo, and the person's other faces: each goes to one of them or to the rest."""
    vectors = faces(9, 1, 0.02, 0)
    clusters = Clusters.from_faces(vectors, np.zeros(9, np.float32))
    group, merged = merge_by_average_linkage(clusters, *all_pairs(9), 0.5, np.array([[4, 2]]))
    assert len(merged) == 2
    assert group[2] != group[4]
    none = merge_by_average_linkage(clusters, *all_pairs(9), 0.5, np.empty((0, 2), np.int64))[0]
    assert (none == 0).all()


@given(SEEDS, st.integers(1, 40), st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_sums_stand_for_all_pairs_of_faces(seed: int, count: int, groups: int) -> None:
    """linkage, cohesion, means, density and merged against the faces themselves."""
    rng = np.random.default_rng(seed)
    vectors, density = random_case(seed, count, True)
    single, group = Clusters.from_faces(vectors, density), renumber_labels(rng.integers(0, groups, count) % count)
    assert len(single) == count
    assert (single.compute_cohesion() == 1).all()
    merged = single.merge(group)
    similarity, cosine = brute(vectors, density), brute(vectors, np.zeros(count))
    held = [np.flatnonzero(group == n) for n in range(group.max() + 1)]
    assert merged.size.tolist() == [len(members) for members in held]
    assert np.allclose(merged.means, [vectors[members].mean(axis=0) for members in held], atol=1e-6)
    assert np.allclose(merged.density, [density[members].mean() for members in held], atol=1e-6)
    for members, found in zip(held, merged.compute_cohesion(), strict=True):
        inside = cosine[np.ix_(members, members)][~np.eye(len(members), dtype=bool)]
        assert found == pytest.approx(inside.mean() if inside.size else 1, abs=1e-5)
    u, v = all_pairs(len(held))
    expected = [similarity[np.ix_(held[a], held[b])].mean() for a, b in zip(u, v, strict=True)]
    assert np.allclose(merged.compute_linkage(u, v), expected, atol=1e-5)
    again = renumber_labels(rng.integers(0, groups, len(merged)) % len(merged))
    twice, once = merged.merge(again), single.merge(again[group])
    assert np.allclose(twice.sums, once.sums, atol=1e-4)
    assert np.allclose(twice.crowd, once.crowd, atol=1e-4)
    assert np.array_equal(twice.size, once.size)
    assert np.array_equal(single.sums, vectors), "merging leaves the clusters as they are"


def test_what_is_asked_in_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    clusters = Clusters.from_faces(faces(60, 3, 0.1, 1), np.linspace(0, 0.5, 60, dtype=np.float32))
    whole = clusters.compute_linkage(*all_pairs(60))
    monkeypatch.setattr("facepipe.curation.graph.clusters._CHUNK", 7)
    assert np.array_equal(clusters.compute_linkage(*all_pairs(60)), whole)


def test_faces_that_no_edge_joins_stay_alone() -> None:
    vectors = np.repeat(faces(1, 1, 0.1, 1), 4, axis=0)
    clusters = Clusters.from_faces(vectors, np.zeros(4, np.float32))
    for u, v in ((NONE, NONE), (np.array([1]), np.array([1]))):
        group, merged = merge_by_average_linkage(clusters, u, v, -1.0)
        assert group.tolist() == [0, 1, 2, 3]
        assert len(merged) == 4
    group, merged = merge_by_average_linkage(clusters, np.array([3]), np.array([1]), 0.9)
    assert group.tolist() == [0, 1, 2, 1]
    assert merged.size.tolist() == [1, 2, 1]


@pytest.mark.parametrize("count", [0, 1])
def test_no_face_and_one(count: int) -> None:
    vectors = np.zeros((count, 128), np.float32)
    group, merged = merge_by_average_linkage(Clusters.from_faces(vectors, np.zeros(count, np.float32)), NONE, NONE, 0.5)
    assert group.tolist() == list(range(count))
    assert len(merged) == len(merged.compute_cohesion()) == count


@pytest.mark.parametrize("count", [3, 4, 5, 64, 257])
@pytest.mark.parametrize("seed", range(2))
def test_a_ring_of_equal_weights_ends(count: int, seed: int) -> None:
    """Copies of one face in a ring and in a clique: all weights are equal, to the bit and nearly."""
    vectors = np.repeat(faces(1, 1, 0.1, 1), count, axis=0)
    order = np.random.default_rng(seed).permutation(count)
    u, v = order, np.roll(order, 1)
    group, merged = merge_by_average_linkage(Clusters.from_faces(vectors, np.zeros(count, np.float32)), u, v, 0.9)
    assert (group == 0).all()
    assert merged.size.tolist() == [count]
    if count < 100:
        assert (
            len(
                merge_by_average_linkage(
                    Clusters.from_faces(vectors, np.zeros(count, np.float32)), *all_pairs(count), 0.9
                )[1]
            )
            == 1
        )


@pytest.mark.parametrize("kind", ["star", "near"])
def test_a_large_identity_takes_few_rounds(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One big cluster is the nearest of all who are left: one merge per round would be 6,000 rounds."""
    count = 6_000
    edges_per_round: list[int] = []

    from facepipe.curation.graph import rounds

    one_round = rounds._find_merges

    def counted(state: Any, *rest: object) -> np.ndarray:
        edges_per_round.append(len(state.u))
        return one_round(state, *rest)

    monkeypatch.setattr(rounds, "_find_merges", counted)
    person, others = faces(count, 1, 0.05, 1), faces(count // 10, count // 10, 0.1, 2)[:, ::-1]
    vectors, density = np.concatenate([person, others]), np.zeros(count + len(others), np.float32)
    if kind == "star":
        u, v = np.zeros(count - 1, np.int64), np.arange(1, count)
    else:
        centres = np.random.default_rng(3).integers(0, count, (count, 20))
        u, v = np.repeat(np.arange(count), 20), centres.ravel()
        near = find_candidate_pairs(vectors[count:], density[count:], 0.5, 32)
        u, v = np.concatenate([u, near[0] + count]), np.concatenate([v, near[1] + count])
    group, merged = merge_by_average_linkage(Clusters.from_faces(vectors, density), u, v, 0.5)
    assert (group[:count] == 0).all()
    assert merged.size[0] == count
    assert (group[count:] > 0).all()
    assert len(edges_per_round) < 600
    assert max(edges_per_round) <= len(u), "a round adds no edges"
