"""Suspected merges and splits: the level and the order of their probabilities."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from bench.galleries import Faces
from hypothesis import given
from hypothesis import strategies as st

from facepipe.curation.clusters.ranking import _set_level, rank_merges, rank_splits
from facepipe.curation.clusters.review import SuspectedMerges, SuspectedSplits
from facepipe.curation.one_person.model import sum_groups

scores = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=50)


@given(scores, st.floats(0.01, 0.9), st.floats(0.5, 3))
def test_probabilities_have_the_share_as_mean_and_the_order_of_the_scores(
    values: list[float], share: float, slope: float
) -> None:
    score = np.array(values)
    probability = _set_level(score, share, slope=slope)
    assert probability.mean() == pytest.approx(share, abs=1e-6)
    order = np.argsort(score, kind="stable")
    assert (np.diff(probability[order]) >= 0).all()


def test_nothing_to_rank() -> None:
    nothing = np.empty(0, np.int64)
    merges = SuspectedMerges(nothing, nothing, np.empty(0, np.float32))
    assert len(rank_merges(cast(Any, None), nothing, cast(Any, None), merges, np.empty(0, bool))) == 0
    assert len(rank_splits(SuspectedSplits(nothing, nothing, np.empty(0, np.float32), nothing))) == 0


def test_one_person_in_two_clusters_comes_before_strangers_and_poor_faces() -> None:
    # Person 0 is in two clusters, all others in one each.
    truth = np.repeat(np.arange(300), 6)
    labels = truth.copy()
    labels[:3] = 300
    vectors = Faces().draw(truth, 0)
    density = np.zeros(len(vectors), np.float32)
    clusters = sum_groups(vectors, density, labels, 301)
    left = np.concatenate([np.arange(1, 60), [0, 60]])
    right = np.concatenate([np.arange(101, 160), [300, 61]])
    merges = SuspectedMerges(left, right, clusters.compute_linkage(left, right))
    graph: Any = SimpleNamespace(
        nodes=SimpleNamespace(vectors=vectors),
        density=density,
        info=SimpleNamespace(threshold=SimpleNamespace(similarity=0.9)),
    )
    nobody = np.zeros(len(labels), bool)
    ranked = rank_merges(graph, labels, clusters, merges, nobody)
    assert (ranked.left[0], ranked.right[0]) == (0, 300)
    assert (np.diff(ranked.probability) <= 0).all()
    assert sorted(zip(ranked.left.tolist(), ranked.right.tolist(), strict=True)) == sorted(
        zip(left.tolist(), right.tolist(), strict=True)
    )
    # The same pair of clusters, if one has poor faces alone, is hardly ever right.
    is_poor = labels == 300
    ranked = rank_merges(graph, labels, clusters, merges, is_poor)
    at = np.flatnonzero(ranked.right == 300)[0]
    assert ranked.probability[at] < 0.01


def test_the_least_similar_parts_come_first() -> None:
    similarity = np.array([0.3, 0.1, 0.2], np.float32)
    splits = SuspectedSplits(np.arange(3), np.array([1, 2, 3]), similarity, np.zeros(9, np.int64))
    ranked = rank_splits(splits)
    assert ranked.cluster.tolist() == [1, 2, 0]
    assert ranked.leaving.tolist() == [2, 3, 1]
    assert ranked.probability.mean() == pytest.approx(1 / 3, abs=1e-5)
