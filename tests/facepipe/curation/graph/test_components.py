"""Connected components and the numbering of clusters: any order of the edges, odd graphs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.curation.graph.components import GrowingComponents, find_components, renumber_labels

Graph = tuple[int, np.ndarray, np.ndarray]


def build_graph(count: int, edges: set[tuple[int, int]]) -> Graph:
    ends = np.array(sorted(edges), np.int64).reshape(-1, 2)
    return count, ends[:, 0], ends[:, 1]


def draw_groups(seed: int) -> tuple[np.ndarray, Graph]:
    """Draw 40 groups of 400 nodes, and a graph that joins each by a path and four of five of its other pairs."""
    rng = np.random.default_rng(seed)
    truth = renumber_labels(rng.integers(0, 40, 400))
    edges = set()
    for label in np.unique(truth):
        members = np.flatnonzero(truth == label).tolist()
        for n, u in enumerate(members):
            edges |= {(u, v) for v in members[n + 1 :] if v == members[n + 1] or rng.random() < 0.8}
    return truth, build_graph(len(truth), edges)


def assert_canonical(labels: np.ndarray, count: int) -> None:
    assert labels.shape == (count,)
    assert labels.dtype == np.int64
    names, first = np.unique(labels, return_index=True)
    assert np.array_equal(names, np.arange(len(names)))
    assert (np.diff(first) > 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_groups_that_do_not_touch_are_found(seed: int) -> None:
    truth, graph = draw_groups(seed)
    assert np.array_equal(find_components(*graph), truth)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 30), m=st.integers(0, 60))
def test_labels_do_not_depend_on_the_order_of_edges(seed: int, count: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    ends = rng.integers(0, count, (m, 2)).tolist()
    _, u, v = build_graph(count, {(min(e), max(e)) for e in ends if e[0] != e[1]})
    before = [u.copy(), v.copy()]
    labels = find_components(count, u, v)
    assert_canonical(labels, count)
    assert (labels[u] == labels[v]).all()
    order = rng.permutation(len(u))
    assert np.array_equal(find_components(count, u[order], v[order]), labels)
    assert all(np.array_equal(a, b) for a, b in zip(before, (u, v), strict=True)), "arguments are not changed"


def test_odd_graphs() -> None:
    for count in (0, 1, 5):
        labels = find_components(*build_graph(count, set()))
        assert labels.dtype == np.int64
        assert np.array_equal(labels, np.arange(count))
    assert np.array_equal(find_components(*build_graph(2, {(0, 1)})), [0, 0])
    assert np.array_equal(find_components(*build_graph(6, {(1, 3), (1, 5), (3, 5)})), [0, 1, 2, 1, 3, 1])
    assert find_components(*build_graph(200, {(n, n + 1) for n in range(199)})).max() == 0


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), max_size=21))
def test_numbering(labels: list[int]) -> None:
    before = np.array(labels, np.int64) % max(1, len(labels))
    after = renumber_labels(before)
    assert_canonical(after, len(labels))
    assert np.array_equal(after[:, None] == after[None], before[:, None] == before[None])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=40), st.integers(1, 7))
def test_components_that_grow_are_those_of_all_edges(edges: list[tuple[int, int]], part: int) -> None:
    growing = GrowingComponents(20)
    ends = np.array(edges, np.int64).reshape(-1, 2)
    for at in range(0, len(ends), part):
        growing.link(ends[at : at + part, 0], ends[at : at + part, 1])
    labels = find_components(20, ends[:, 0], ends[:, 1])
    roots = growing.find(np.arange(20))
    assert all(roots[n] == np.flatnonzero(labels == labels[n])[0] for n in range(20))
    assert (growing.find_linked() == (np.bincount(labels)[labels] > 1)).all()
