"""What a page shows of very many faces: slices give what sorting all of them gives."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from facepipe.reports import histogram, top
from facepipe.reports.histogram import count_values
from facepipe.reports.top import BestMembers, find_highest


@pytest.fixture(params=[1, 3, 7, 1000], ids=lambda size: f"slices of {size}")
def sliced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(top, "SLICE", request.param)
    monkeypatch.setattr(histogram, "SLICE", request.param)
    return int(request.param)


CASES = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@CASES
@given(st.integers(0, 60), st.integers(0, 20), st.integers(0, 2**16))
def test_the_highest_are_those_of_a_sort(sliced: int, n: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 5, n).astype(np.float32)  # many ties
    scores[rng.random(n) < 0.2] = np.nan
    among = rng.random(n) < 0.7
    order = np.lexsort((np.arange(n), -scores))
    assert find_highest(scores, count).tolist() == order[:count].tolist()
    assert find_highest(scores, count, among).tolist() == order[among[order]][:count].tolist()


@CASES
@given(st.integers(0, 80), st.integers(1, 5), st.integers(0, 2**16))
def test_the_best_members_are_those_of_a_sort(sliced: int, n: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, 6, n)
    fits = rng.integers(0, 4, n)
    is_other = rng.random(n) < 0.5
    best = BestMembers(
        n, np.array([0, 2, 5, 5, 9]), count, lambda part: labels[part], lambda rows: (-fits[rows], is_other[rows])
    )
    order = np.lexsort((-fits, is_other, labels))
    for group in range(7):
        expected = order[labels[order] == group][:count] if group in (0, 2, 5) else []
        assert best.list_members(group).tolist() == list(expected)


@CASES
@given(st.integers(0, 60), st.integers(0, 2**16))
def test_histograms_are_summed(sliced: int, n: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(0, 2, n)
    values[::7] = np.nan
    edges = np.linspace(-1, 1, 9)
    known = np.clip(values[~np.isnan(values)], -1, 1)
    assert count_values("x", values, edges).counts == tuple(np.histogram(known, edges)[0].tolist())
