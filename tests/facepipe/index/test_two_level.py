"""k-means in two levels: as many centroids as lists, about as good as plain ones, and the same every time."""

import numpy as np
import pytest
from bench.galleries import Faces
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.index.centroids import find_given_up, read_centroids
from facepipe.index.plan import IndexPlan
from facepipe.index.template import train_template
from facepipe.index.two_level import MIN_CENTROIDS, share_out, train_centroids
from facepipe.nearest.faiss_engine import faiss


@given(st.lists(st.integers(0, 500), min_size=1, max_size=60), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_centroids_are_shared_out_by_size(sizes: list[int], part: float) -> None:
    vectors = np.array(sizes)
    count = int(part * vectors.sum())
    shares = share_out(vectors, count)
    assert shares.sum() == count
    assert (shares >= 0).all()
    assert (shares <= vectors).all()
    # A cell has what its size says, to one or two.
    assert (np.abs(shares - count * vectors / max(1, vectors.sum())) < 2).all()


@pytest.fixture(scope="module")
def sample() -> np.ndarray:
    return Faces().draw(np.arange(20_000) // 4, 0)


def measure_error(vectors: np.ndarray, centroids: np.ndarray) -> float:
    index = faiss.IndexFlatL2(vectors.shape[1])
    index.add(centroids)
    return float(index.search(vectors, 1)[0].mean())


def test_centroids_are_about_as_good_as_plain_ones(sample: np.ndarray) -> None:
    found = train_centroids(sample, 256)
    assert found.shape == (256, 128)
    assert np.array_equal(found, train_centroids(sample, 256))
    plain = faiss.Clustering(128, 256)
    plain.niter = 10
    plain.train(sample, faiss.IndexFlatL2(128))
    centroids = faiss.vector_to_array(plain.centroids).reshape(256, 128)
    assert measure_error(sample, found) < 1.03 * measure_error(sample, centroids)


@pytest.mark.parametrize("count", [1, 7, 499, 500])
def test_few_vectors_and_odd_numbers(sample: np.ndarray, count: int) -> None:
    found = train_centroids(sample[:500], count)
    assert found.shape == (count, 128)
    assert np.isfinite(found).all()


def test_equal_vectors(sample: np.ndarray) -> None:
    found = train_centroids(np.repeat(sample[:3], 400, axis=0), 50)
    assert np.isfinite(found).all()


def test_a_template_of_many_lists_has_all_of_them(sample: np.ndarray) -> None:
    factory = f"IVF{MIN_CENTROIDS},PQ64x4fs"
    few = sample[:: len(sample) // 8192]
    plan = IndexPlan(len(few), factory, MIN_CENTROIDS, len(few), 1, 1, 40, 0, 0, 0)
    index = train_template(few, plan)
    centroids = read_centroids(index)
    assert index.is_trained
    assert centroids.shape == (MIN_CENTROIDS, 128)
    # Four vectors for a list are few, so that many lists are given up; none that stays is far from the faces.
    kept = centroids[~find_given_up(centroids)]
    assert len(kept) > 100
    assert measure_error(few, kept) < 0.5
