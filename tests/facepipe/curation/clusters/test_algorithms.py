"""Clusterings of a graph: planted partitions are found, the order of the edges does not matter, odd graphs work."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.curation.clusters.chinese_whispers import whispers
from facepipe.curation.clusters.louvain import communities
from facepipe.curation.graph.components import adjacency, components, numbered
from facepipe.errors import ConfigError

Clustering = Callable[[int, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
Graph = tuple[int, np.ndarray, np.ndarray, np.ndarray]
ALL = pytest.mark.parametrize("cluster", [components, whispers, communities], ids=lambda f: f.__name__)
SOFT = pytest.mark.parametrize("cluster", [whispers, communities], ids=lambda f: f.__name__)


def graph(count: int, edges: dict[tuple[int, int], float]) -> Graph:
    ends = np.array(sorted(edges), np.int64).reshape(-1, 2)
    return count, ends[:, 0], ends[:, 1], np.array([edges[tuple(e)] for e in ends.tolist()], np.float32)


def planted(truth: np.ndarray, inside: float, across: int, seed: int) -> Graph:
    """A share of the pairs inside each group with weights .2 to .6, and some weak edges between any nodes."""
    rng, edges = np.random.default_rng(seed), {}
    for u, v in rng.integers(0, len(truth), (across, 2)).tolist():
        edges[min(u, v), max(u, v)] = rng.uniform(0.01, 0.1)
    for label in np.unique(truth):
        members = np.flatnonzero(truth == label).tolist()
        for a, u in enumerate(members):
            for v in members[a + 1 :]:
                if v == members[a + 1] or rng.random() < inside:  # a path, so that no group falls apart
                    edges[u, v] = rng.uniform(0.2, 0.6)
    return graph(len(truth), {(u, v): w for (u, v), w in edges.items() if u < v})


def groups(seed: int, count: int = 400, identities: int = 40) -> np.ndarray:
    return numbered(np.random.default_rng(seed).integers(0, identities, count))


def canonical(labels: np.ndarray, count: int) -> None:
    assert labels.shape == (count,)
    assert labels.dtype == np.int64
    names, first = np.unique(labels, return_index=True)
    assert np.array_equal(names, np.arange(len(names)))
    assert (np.diff(first) > 0).all()


@ALL
@pytest.mark.parametrize("seed", range(3))
def test_groups_that_do_not_touch_are_found(cluster: Clustering, seed: int) -> None:
    truth = groups(seed)
    assert np.array_equal(cluster(*planted(truth, 0.8, 0, seed)), truth)


@SOFT
@pytest.mark.parametrize("seed", range(3))
def test_groups_under_noise_are_found(cluster: Clustering, seed: int) -> None:
    truth = groups(seed)
    noisy = planted(truth, 0.8, 400, seed)
    assert components(*noisy).max() == 0
    assert np.array_equal(cluster(*noisy), truth)


def test_communities_do_not_depend_on_the_size_of_the_graph() -> None:
    """Modularity joins such triangles in pairs once there are enough of them."""
    count = 3 * 2000
    edges = {(3 * n + a, 3 * n + b): 0.5 for n in range(2000) for a, b in ((0, 1), (0, 2), (1, 2))}
    edges |= {(3 * n, 3 * n + 3): 0.1 for n in range(1999)}
    assert np.array_equal(communities(*graph(count, edges)), np.arange(count) // 3)


@ALL
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 30), m=st.integers(0, 60))
def test_any_graph(cluster: Clustering, seed: int, count: int, m: int) -> None:
    """Canonical labels; the same for any order of the edges and in every run; no cluster across components."""
    rng = np.random.default_rng(seed)
    ends = rng.integers(0, count, (m, 2)).tolist()
    weights = rng.choice([0.1, 0.2, 0.3], m)
    found = graph(count, {(min(e), max(e)): w for e, w in zip(ends, weights, strict=True) if e[0] != e[1]})
    before = [part.copy() for part in found[1:]]
    labels = cluster(*found)
    canonical(labels, count)
    order = rng.permutation(len(found[1]))
    assert np.array_equal(cluster(count, *(part[order] for part in found[1:])), labels)
    assert np.array_equal(cluster(*found), labels)
    assert all(np.array_equal(a, b) for a, b in zip(before, found[1:], strict=True)), "arguments stay as they are"
    parts = components(*found)
    assert len(np.unique(parts[np.unique(labels, return_index=True)[1]])) == parts.max() + 1
    assert len(np.unique(np.stack([labels, parts]), axis=1).T) == labels.max() + 1


@ALL
def test_odd_graphs(cluster: Clustering) -> None:
    for count in (0, 1, 5):
        labels = cluster(*graph(count, {}))
        assert labels.dtype == np.int64
        assert np.array_equal(labels, np.arange(count))
    assert np.array_equal(cluster(*graph(2, {(0, 1): 0.5})), [0, 0])
    assert np.array_equal(cluster(*graph(6, {(1, 3): 0.5, (1, 5): 0.5, (3, 5): 0.5})), [0, 1, 2, 1, 3, 1])


def test_a_chain() -> None:
    """Single linkage follows it to its end; the others need not, and communities do not."""
    chain = graph(200, {(n, n + 1): 0.5 for n in range(199)})
    assert components(*chain).max() == 0
    canonical(whispers(*chain), 200)
    assert 20 <= communities(*chain).max() < 150


def test_whispers_hear_sums_and_end() -> None:
    """Two weak neighbours of one label outweigh one strong neighbour; pairs do not swap labels for ever."""
    triangle = {(0, 1): 0.9, (0, 2): 0.9, (1, 2): 0.9}
    pair = {(4, 5): 0.9}
    joined = whispers(*graph(6, triangle | pair | {(0, 3): 0.2, (1, 3): 0.2, (3, 4): 0.3}))
    assert np.array_equal(joined, [0, 0, 0, 0, 1, 1])
    pairs = graph(20_000, {(2 * n, 2 * n + 1): 0.5 for n in range(10_000)})
    assert np.array_equal(whispers(*pairs), np.arange(20_000) // 2)
    assert np.array_equal(whispers(*pairs, sweeps=0), np.arange(20_000))


def test_weights_are_symmetric_and_kept() -> None:
    found = adjacency(*planted(groups(1), 0.5, 200, 1))
    assert found.dtype == np.float32
    assert (found != found.T).nnz == 0


@given(st.lists(st.integers(0, 20), max_size=21))
def test_numbering(labels: list[int]) -> None:
    given_ = np.array(labels, np.int64) % max(1, len(labels))
    found = numbered(given_)
    canonical(found, len(labels))
    assert np.array_equal(found[:, None] == found[None], given_[:, None] == given_[None])


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("sknetwork"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return importlib.import_module(name, *rest, **named)

    monkeypatch.setattr("facepipe.curation.clusters.louvain.import_module", absent)
    with pytest.raises(ConfigError, match=r"pip install 'facepipe\[communities\]'"):
        communities(*graph(3, {(0, 1): 0.5}))
