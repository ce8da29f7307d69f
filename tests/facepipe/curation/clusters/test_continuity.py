"""Numbers of clusters stay with their persons, and few strangers stand out as much as a person must."""

import numpy as np
import pytest
from hard_faces import EASY, DlibLike

from facepipe.curation.clusters.assign import assign_faces
from facepipe.curation.clusters.continuity import keep_numbers
from facepipe.curation.clusters.placement import StrangerLimit, stand_out
from facepipe.curation.graph.clusters import Clusters
from facepipe.curation.graph.cohort import Cohort

NO_PAIRS = np.empty((0, 2), np.int64)


@pytest.mark.parametrize("seed", range(5))
def test_every_number_is_given_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.unique(rng.integers(0, 30, 200), return_inverse=True)[1]
    earlier = rng.integers(-1, 25, 200)
    count = int(labels.max()) + 1
    numbers = keep_numbers(labels, count, earlier, rng.permutation(count), 25)
    assert len(np.unique(numbers)) == count
    kept = np.flatnonzero(numbers < 25)
    assert np.array_equal(np.sort(numbers[numbers >= 25]), 25 + np.arange(count - len(kept)))
    for cluster in kept:
        # No other earlier number is more common in it.
        shared = np.bincount(earlier[(labels == cluster) & (earlier >= 0)], minlength=25)
        assert shared[numbers[cluster]] == shared.max() > 0


def test_what_splits_and_joins() -> None:
    """The larger part of a cluster keeps its number, and so does the larger of two that become one."""
    earlier = np.array([4, 4, 4, 4, 4, 7, 7, 7, 2, -1])
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 3])
    assert keep_numbers(labels, 4, earlier, np.arange(4), 9).tolist() == [4, 9, 7, 10]
    nothing = np.full(10, -1)
    assert keep_numbers(labels, 4, nothing, np.array([2, 0, 1, 3]), 0).tolist() == [1, 2, 0, 3]


def test_few_strangers_stand_out() -> None:
    """A limit that is found among known persons holds for new ones, and known persons still find their clusters."""
    space = DlibLike(4, EASY)
    centres = space.draw_centres(900)
    known = np.repeat(np.arange(600), 3)
    vectors = space.draw(centres, known).vectors
    cohort = Cohort.draw(vectors, 0)
    density = cohort.compute_density(vectors)
    clusters = Clusters.from_faces(vectors, density).merge(known)
    limit = StrangerLimit.measure(vectors, density, known, clusters)
    later = space.draw(centres, np.concatenate([np.arange(600), np.repeat(np.arange(600, 900), 2)])).vectors
    faces = Clusters.from_faces(later, cohort.compute_density(later))
    min_lead = limit.find_threshold(600)
    placed = assign_faces(faces, clusters, -1.0, NO_PAIRS, min_lead=min_lead).known
    assert (placed[600:] >= 0).mean() <= 0.03
    assert (placed[:600] == np.arange(600)).mean() >= 0.9
    assert limit.find_threshold(6000) > min_lead
    assert limit.find_threshold(60) == pytest.approx(min_lead)


def test_without_clusters_nothing_has_to_stand_out() -> None:
    few = StrangerLimit.measure(np.eye(3, 128, dtype=np.float32), np.zeros(3, np.float32), np.arange(3), _singles(3))
    assert few.find_threshold(10) == -np.inf
    nearest = np.full((2, 10), -np.inf)
    nearest[0, :2] = (0.5, 0.2)
    assert stand_out(nearest).tolist() == [0.4, -np.inf]


def _singles(count: int) -> Clusters:
    return Clusters.from_faces(np.eye(count, 128, dtype=np.float32), np.zeros(count, np.float32))
