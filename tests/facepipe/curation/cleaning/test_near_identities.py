"""Identities beyond the graph: the nearest means as by brute force, more candidates, and how far strangers reach."""

import numpy as np
import pytest
from hard_faces import DlibLike
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.curation.cleaning import near_identities
from facepipe.curation.cleaning.evidence import FaceVectors, IdentityCentres, LabelCandidates, find_candidates
from facepipe.curation.cleaning.model import LabelPosteriors, estimate_label_posteriors
from facepipe.curation.cleaning.near_identities import IdentityMeans, add_near_identities, estimate_beyond_graph
from facepipe.nearest.similarity import Pairs

THRESHOLD = 1 - 0.416**2 / 2
NO_PAIRS = Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))


def draw(persons: int, each: int, seed: int = 1) -> tuple[FaceVectors, np.ndarray]:
    space = DlibLike(seed)
    drawn = space.draw(space.draw_centres(persons), np.arange(persons * each) % persons)
    return FaceVectors(drawn.vectors, np.zeros(len(drawn), np.float32)), drawn.person


def own_candidates(label: np.ndarray) -> LabelCandidates:
    """The own labels only: as if the graph had no edge."""
    return find_candidates(label, [NO_PAIRS])


def swapped(person: np.ndarray, share: float, seed: int = 2) -> np.ndarray:
    rng = np.random.default_rng(seed)
    count = int(person.max()) + 1
    return np.where(rng.random(len(person)) < share, (person + rng.integers(1, count, len(person))) % count, person)


def estimate(faces: FaceVectors, candidates: LabelCandidates) -> LabelPosteriors:
    ones = np.ones(len(faces.density), np.float32)
    start = np.where(candidates.is_own, np.float32(1), np.float32(0))
    return estimate_label_posteriors(faces, candidates, ones, start, threshold=THRESHOLD, max_rounds=4)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), persons=st.integers(2, 30), each=st.integers(1, 4), share=st.floats(0.35, 1))
def test_the_nearest_means_are_those_of_brute_force(seed: int, persons: int, each: int, share: float) -> None:
    faces, label = draw(persons, each, seed)
    density = np.random.default_rng(seed).uniform(0, 0.1, len(label)).astype(np.float32)
    faces = FaceVectors(faces.vectors, density)
    candidates = own_candidates(label)
    probability = np.full(len(candidates), share, np.float32)
    means = IdentityMeans.compute(faces, candidates, probability)
    found, similarity = means.find_nearest(
        means.build_search(1), faces, np.arange(len(label)), min(3, len(means.identity))
    )
    # Compare each face with all identities, as the estimation does.
    centres = IdentityCentres.from_shares(faces, candidates, probability)
    face, identity = np.divmod(np.arange(len(label) * len(means.identity)), len(means.identity))
    fit, _ = centres.compute_fit(faces, face, means.identity[identity], np.zeros(len(face), np.float32))
    table = fit.reshape(len(label), -1)
    assert np.allclose(similarity, -np.sort(-table, axis=1)[:, : similarity.shape[1]], atol=1e-5)
    assert np.allclose(np.take_along_axis(table, found, axis=1), similarity, atol=1e-5)


def test_cells_find_nearly_what_a_comparison_with_all_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    faces, label = draw(6000, 2)
    candidates = own_candidates(label)
    means = IdentityMeans.compute(faces, candidates, np.ones(len(candidates), np.float32))
    face = np.arange(0, len(label), 20)
    exact, _ = means.find_nearest(means.build_search(len(face)), faces, face, 4)
    monkeypatch.setattr(near_identities, "_MAX_PRODUCTS", 0)
    by_cells, similarity = means.find_nearest(means.build_search(len(face)), faces, face, 4)
    assert (by_cells[:, 0] == exact[:, 0]).mean() > 0.98
    assert np.mean([len(np.intersect1d(*rows)) / 4 for rows in zip(by_cells, exact, strict=True)]) > 0.9
    assert np.isfinite(similarity).all()


def test_candidates_keep_what_is_known_of_them() -> None:
    faces, person = draw(400, 5)
    label = swapped(person, 0.2)
    rng = np.random.default_rng(0)
    pairs = Pairs(rng.integers(0, 900, 500), rng.integers(1000, 1900, 500), np.zeros(500, np.float32))
    candidates = find_candidates(label, [pairs])
    posteriors = estimate(faces, candidates)
    near = add_near_identities(faces, candidates, posteriors)
    keys = near.candidates.face * 400 + near.candidates.identity
    assert (np.diff(keys) > 0).all()
    at = np.searchsorted(keys, candidates.face * 400 + candidates.identity)
    assert (near.candidates.face[at] == candidates.face).all()
    assert (near.candidates.is_own[at] == candidates.is_own).all()
    assert near.candidates.is_own.sum() == candidates.is_own.sum()
    assert (near.probability[at] == posteriors.probability).all()
    is_new = np.ones(len(keys), bool)
    is_new[at] = False
    assert (near.probability[is_new] == 0).all()
    # Faces that fit their names are not compared with anybody.
    is_sure = np.zeros(len(label), bool)
    is_sure[candidates.face[candidates.is_own & (posteriors.probability > 0.9)]] = True
    assert candidates.is_near is not None
    known = np.zeros(len(label), bool)
    known[candidates.face[candidates.is_own & candidates.is_near]] = True
    assert not (is_sure & known)[near.candidates.face[is_new]].any()


def test_without_an_edge_the_right_name_is_found() -> None:
    """The graph gives no candidate at all: no face is near any single face of its person."""
    faces, person = draw(1200, 5)
    label = swapped(person, 0.15)
    wrong = label != person
    candidates = own_candidates(label)
    ones = np.ones(len(label), np.float32)
    found, posteriors = estimate_beyond_graph(
        faces, candidates, ones, np.ones(len(candidates), np.float32), threshold=THRESHOLD
    )
    best = np.full(len(label), -1)
    order = np.argsort(posteriors.probability, kind="stable")
    best[found.face[order]] = found.identity[order]
    sure = np.zeros(len(label), bool)
    sure[found.face[posteriors.probability > 0.8]] = True
    assert (best[wrong] == person[wrong]).mean() > 0.9
    assert (best == person)[sure].mean() > 0.98
    assert posteriors.swapped == pytest.approx(wrong.mean(), abs=0.02)
    assert posteriors.has_settled


def test_what_people_have_rejected_is_no_candidate() -> None:
    faces, person = draw(600, 5)
    label = swapped(person, 0.1)
    candidates = own_candidates(label)
    start = np.ones(len(candidates), np.float32)
    ones = np.ones(len(label), np.float32)

    def settle(found: LabelCandidates) -> LabelCandidates:
        kept = found.is_own | (found.identity != person[found.face])
        assert found.is_near is not None
        return LabelCandidates(
            found.face[kept], found.identity[kept], found.is_own[kept], found.identity_count, found.is_near[kept]
        )

    found, posteriors = estimate_beyond_graph(faces, candidates, ones, start, threshold=THRESHOLD, settle=settle)
    assert len(found) == len(posteriors.probability) > len(candidates)
    wrong = label != person
    assert not ((found.identity == person[found.face]) & wrong[found.face]).any()
    assert (posteriors.no_identity[wrong] > 0.5).mean() > 0.7


def test_strangers_reach_farther_in_a_dense_region() -> None:
    """Half of the persons are alike. Where they are, a similarity says less."""
    rng = np.random.default_rng(3)
    persons = 1000
    centres = rng.standard_normal((persons, 128))
    centres[: persons // 2] += 0.8 * rng.standard_normal(128)
    person = np.arange(persons * 4) % persons
    vectors = centres[person] + 0.5 * rng.standard_normal((len(person), 128))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    faces = FaceVectors(vectors, np.zeros(len(person), np.float32))
    label = swapped(person, 0.3)
    posteriors = estimate(faces, own_candidates(label))
    spread = add_near_identities(faces, own_candidates(label), posteriors).spread
    wrong = label != person
    dense = person < persons // 2
    assert np.median(spread[wrong & dense]) > np.median(spread[wrong & ~dense]) + 0.05
    assert (spread > 0.5).all()
    assert (spread < 2).all()


@pytest.mark.parametrize("persons", [1, 2, 12])
def test_few_identities_show_nothing_of_a_region(persons: int) -> None:
    faces, person = draw(persons, 6)
    candidates = own_candidates(person)
    near = add_near_identities(faces, candidates, estimate(faces, candidates))
    assert (near.spread == 1).all()
    assert len(near.candidates) >= len(candidates)
