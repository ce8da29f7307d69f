"""Groups of look-alikes do not join, if the groups of one person are far above them."""

from dataclasses import replace

import numpy as np
import pytest
from hard_faces import EASY, ArcFaceLike, DlibLike, draw_uneven, draw_zipf

from facepipe.curation.graph.calibration import Calibration, CalibrationOptions, calibrate
from facepipe.curation.graph.clusters import Clusters
from facepipe.curation.graph.dendrogram import find_group_gap
from facepipe.curation.graph.linkage import merge_by_average_linkage
from facepipe.curation.graph.neighbourhoods import gather_neighbourhoods
from facepipe.errors import ThresholdError
from facepipe.evaluation.clusters import score_clusters
from facepipe.nearest.join import find_candidate_pairs
from facepipe.types import Float32, Int64

OPTIONS = CalibrationOptions(threshold=None, impostors=0.25, model_threshold=None, embedder="mine", seed=0)
CARD = CalibrationOptions(threshold=None, impostors=0.25, model_threshold=0.416, embedder="dlib-resnet", seed=0)


def draw_look_alikes(persons: int, faces: int, seed: int) -> tuple[Int64, Float32]:
    """Draw persons of an angular margin, of whom a third looks like somebody else. Some faces are poor."""
    person = draw_uneven(faces, persons, seed)
    space = ArcFaceLike(seed)
    return person, space.draw(space.draw_centres(persons), person).vectors


def score(person: Int64, vectors: Float32, found: Calibration, margin: float = 0.0) -> float:
    u, v = find_candidate_pairs(vectors, found.density, found.threshold.similarity, 32)
    single = Clusters.from_faces(vectors, found.density)
    labels, _ = merge_by_average_linkage(single, u, v, found.threshold.similarity, margin=margin)
    return float(score_clusters(person, labels).bcubed.f)


@pytest.mark.parametrize("persons", [30, 300])
def test_look_alikes_stay_apart(persons: int) -> None:
    """Few of them were refused, and of many the look-alikes were joined: a BCubed F of 0.935."""
    person, vectors = draw_look_alikes(persons, 3000, 5)
    found = calibrate(vectors, OPTIONS)
    assert score(person, vectors, found) > 0.97


def test_groups_of_look_alikes_stay_apart_if_single_faces_lie_in_the_gap() -> None:
    """Nearly half of the persons have one or two faces here, which a higher threshold would leave alone."""
    person = draw_zipf(6000, 700, 32)
    space = ArcFaceLike(32)
    vectors = space.draw(space.draw_centres(int(person.max()) + 1), person).vectors
    found = calibrate(vectors, OPTIONS)
    assert score(person, vectors, found) < 0.97
    assert score(person, vectors, found, found.threshold.margin) > 0.985


@pytest.mark.parametrize("seed", [31, 32, 33])
def test_groups_of_hard_look_alikes_join_less_often_than_single_faces(seed: int) -> None:
    """The mean of two groups varies less than the similarity of two faces, so that it can tell more."""
    person = draw_uneven(3000, 250, seed)
    space = DlibLike(seed)
    vectors = space.draw(space.draw_centres(250), person).vectors
    found = calibrate(vectors, CARD)
    assert found.threshold.margin > 0
    assert score(person, vectors, found, found.threshold.margin) > score(person, vectors, found) + 0.002


def test_a_given_threshold_has_no_margin() -> None:
    person = draw_uneven(2000, 250, 31)
    space = DlibLike(31)
    vectors = space.draw(space.draw_centres(250), person).vectors
    assert calibrate(vectors, replace(CARD, threshold=0.4)).threshold.margin == 0


def test_a_threshold_is_not_raised_if_there_is_no_gap() -> None:
    """Where qualities differ much, the groups of one person reach down to those of two."""
    person = np.repeat(np.arange(300), 10)
    space = DlibLike(1)
    vectors = space.draw(space.draw_centres(300), person).vectors
    found = calibrate(vectors, OPTIONS)
    assert found.threshold.estimated
    assert score(person, vectors, found) > 0.9


def test_two_persons_are_two_although_the_model_states_a_stricter_threshold() -> None:
    person = np.arange(1000) % 2
    space = DlibLike(1)
    vectors = space.draw(space.draw_centres(2), person).vectors
    found = calibrate(vectors, CARD)
    assert found.threshold.estimated
    assert 0.7 * 0.416 <= np.sqrt(2 - 2 * found.threshold.similarity) <= 1.3 * 0.416
    assert score(person, vectors, found) > 0.999


@pytest.mark.parametrize(("persons", "faces"), [(10, 9), (20, 8), (30, 7), (100, 6)])
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_persons_of_few_faces_each_are_no_groups_of_one_person(persons: int, faces: int, seed: int) -> None:
    """All merges of groups are of two persons then: a gap among those would join persons, and take in newcomers."""
    space = DlibLike(seed, EASY)
    vectors = space.draw(space.draw_centres(persons), np.repeat(np.arange(persons), faces)).vectors
    assert find_group_gap(vectors) is None


@pytest.mark.parametrize("seed", [1, 2])
def test_well_separated_persons_of_two_faces_are_all_found(seed: int) -> None:
    """The threshold by strangers lies below the gap that parts them, and joined a few."""
    rng = np.random.default_rng(seed)
    person = np.repeat(np.arange(160), 2)
    vectors = rng.normal(size=(160, 128))[person] + 0.1 * rng.normal(size=(320, 128))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    assert score(person, vectors, calibrate(vectors, OPTIONS)) == 1


@pytest.mark.parametrize("seed", [1, 2])
def test_one_person_has_no_gap(seed: int) -> None:
    space = ArcFaceLike(seed, hardness=EASY)
    vectors = space.draw(space.draw_centres(1), np.zeros(800, np.int64)).vectors
    assert find_group_gap(vectors) is None
    with pytest.raises(ThresholdError):
        calibrate(vectors, OPTIONS)


def test_few_faces_have_no_groups() -> None:
    _, vectors = draw_look_alikes(5, 20, 1)
    for count in range(20):
        assert find_group_gap(vectors[:count]) is None or count >= 10


def test_neighbourhoods_are_what_comparing_everything_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    _, vectors = draw_look_alikes(40, 900, 2)
    density: Float32 = np.random.default_rng(0).uniform(0, 0.1, 900).astype(np.float32)
    is_fit = np.arange(900) % 3 > 0
    sample = np.flatnonzero(is_fit)[:20]
    near = gather_neighbourhoods(vectors, density, sample, 0.4, is_fit, 0)
    similarity = vectors[sample] @ vectors.T - (density[sample][:, None] + density) / 2
    reaching = (similarity >= 0.4) & is_fit
    assert set(near.tolist()) <= set(np.flatnonzero(reaching.any(axis=0)).tolist())
    assert set(near.tolist()) >= set(np.flatnonzero(reaching[reaching.sum(axis=1) <= 48].any(axis=0)).tolist())
    assert (np.diff(near) > 0).all()
    # However the faces are cut into blocks, and however often a full neighbourhood is cut down.
    monkeypatch.setattr("facepipe.curation.graph.neighbourhoods._BLOCK_COLUMNS", 7)
    monkeypatch.setattr("facepipe.curation.graph.neighbourhoods._MAX_HELD", 50)
    assert gather_neighbourhoods(vectors, density, sample, 0.4, is_fit, 0).tolist() == near.tolist()
