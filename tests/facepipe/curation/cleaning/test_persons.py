"""Names that two persons or many copies of an outsider's picture share: persons told apart, names inferred by pictures."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from bench.galleries import CONTRACT
from hard_faces import ArcFaceLike, DlibLike, DrawnFaces, make_hard_gallery

from facepipe.curation.cleaning.distributions import Normal
from facepipe.curation.cleaning.evidence import FaceVectors, find_candidates
from facepipe.curation.cleaning.identities import split_identities
from facepipe.curation.cleaning.model import LabelPosteriors
from facepipe.curation.cleaning.persons import NamedPersons, number_persons
from facepipe.curation.cleaning.strangers import NearStrangers, StrangerTail
from facepipe.gallery import Contract
from facepipe.nearest.similarity import Pairs
from pipelines.clean import CleanConfig, run

DLIB = Contract("synthetic", "0" * 64, "dlib-resnet", "0" * 64, "none", False)


def draw(kind: str, sizes: np.ndarray, seed: int) -> DrawnFaces:
    space = ArcFaceLike(seed) if kind == "arc" else DlibLike(seed)
    return space.draw(space.draw_centres(len(sizes)), np.repeat(np.arange(len(sizes)), sizes))


def clean(faces: DrawnFaces, kind: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Clean a gallery of drawn faces. Return the decision and the noise of each face, (n,)."""
    gallery = make_hard_gallery(folder / "G", faces, CONTRACT if kind == "arc" else DLIB)
    run(CleanConfig(), gallery.path)
    table = pq.read_table(f"{gallery.path}/reports/clean/decisions.parquet", columns=["uri", "decision", "noise"])
    photo = np.array([int(uri[-13:-4]) for uri in table["uri"].to_pylist()])
    decision = np.empty(len(faces), object)
    decision[photo] = table["decision"].to_pylist()
    noise = np.zeros(len(faces))
    noise[photo] = table["noise"].to_numpy()
    return decision, noise


@pytest.mark.parametrize(("kind", "seed"), [("dlib", 5), ("arc", 6)])
def test_names_of_two_persons_half_each_are_all_in_review(kind: str, seed: int, tmp_path: Path) -> None:
    """Sixty names of two persons, beside as many of one: no face of the former is decided on."""
    each = np.random.default_rng(seed).integers(3, 8, 60)
    drawn = draw(kind, np.concatenate([each, each, np.full(60, 6)]), seed)
    label = np.where((drawn.person >= 60) & (drawn.person < 120), drawn.person - 60, drawn.person)
    decision, noise = clean(DrawnFaces(drawn.person, drawn.vectors, drawn.noise, label), kind, tmp_path)
    shared = label < 60
    assert (decision[shared] == "review").mean() > 0.97
    assert not np.isin(decision[shared], ["relabel", "outlier"]).any()
    assert noise[shared].mean() == pytest.approx(0.5, abs=0.03)
    assert (decision[~shared] == "keep").mean() > 0.97


@pytest.mark.parametrize(("kind", "seed", "copies"), [("dlib", 7, 10), ("arc", 8, 30)])
def test_near_copies_of_an_outsider_do_not_outvote_an_identity(
    kind: str, seed: int, copies: int, tmp_path: Path
) -> None:
    """The copies have hashes of their own, so that only their faces tell that they are one picture."""
    rng = np.random.default_rng(seed)
    drawn = draw(kind, np.concatenate([np.full(60, 7), np.ones(20, np.int64)]), seed)
    outsider = np.repeat(np.flatnonzero(drawn.person >= 60), copies)
    spread = 0.09 * (2.3 if kind == "arc" else 1)
    vectors = drawn.vectors[outsider]
    vectors = vectors + spread / np.sqrt(2 * vectors.shape[1]) * rng.standard_normal(vectors.shape)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    right = drawn.take(drawn.person < 60)
    right = DrawnFaces(right.person, right.vectors, right.noise)
    added = DrawnFaces(
        np.full(len(outsider), -1),
        vectors.astype(np.float32),
        np.ones(len(outsider)),
        drawn.person[outsider] - 60,
    )
    faces = right.concatenate(added)
    decision, _ = clean(faces, kind, tmp_path)
    # Single faces far from their person are dropped without any copies too. Copies would take whole names.
    is_lost = np.isin(decision[: len(right)], ["relabel", "outlier"])
    assert is_lost.mean() < 0.01
    lost_per_name = np.bincount(right.person[is_lost], minlength=60)
    assert lost_per_name.max() <= 1
    assert not np.isin(decision[len(right) :], ["keep", "duplicate"]).any()


def all_pairs(vectors: np.ndarray, threshold: float) -> Pairs:
    similarity = np.triu(vectors @ vectors.T, 1)
    u, v = np.nonzero(similarity > threshold)
    distance = np.linalg.norm(vectors[u] - vectors[v], axis=1)
    return Pairs(u, v, distance.astype(np.float32))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_further_persons_are_numbered_unless_they_fit_another_identity(seed: int) -> None:
    """Person 30 has no name of their own, and two faces with that of person 0. Two of person 2 bear that of person 1."""
    sizes = np.full(31, 6)
    drawn = draw("arc", sizes, seed)
    label = drawn.person.copy()
    label[np.flatnonzero(drawn.person == 30)] = 0
    faces = FaceVectors(drawn.vectors, np.zeros(len(label), np.float32))
    pairs = [all_pairs(drawn.vectors, 0.4)]
    parts = split_identities(faces, label, np.arange(len(label)), pairs, 0.4)
    found = number_persons(faces, label, parts, pairs, name_count=30, threshold=0.4)
    assert found.name.tolist() == [*range(30), 0]
    assert (found.person == np.where((label == 0) & (parts.part == 1), 30, label)).all()
    # Swapped labels are left where they are.
    swapped = drawn.person.copy()
    swapped[np.flatnonzero(drawn.person == 2)[:2]] = 1
    swapped[np.flatnonzero(drawn.person == 30)] = 4
    swapped[np.flatnonzero(drawn.person == 7)[:2]] = 8
    parts = split_identities(faces, swapped, np.arange(len(label)), pairs, 0.4)
    found = number_persons(faces, swapped, parts, pairs, name_count=30, threshold=0.4)
    assert (found.person[np.isin(swapped, [1, 8])] < 30).all()


def test_names_are_put_together_again() -> None:
    rng = np.random.default_rng(0)
    person = np.array([0, 0, 1, 1, 2, 2])
    persons = NamedPersons(person, np.array([0, 1, 0]))
    both = Pairs(np.array([0, 0]), np.array([2, 4]), np.zeros(2, np.float32))
    candidates = find_candidates(person, [both])
    probability = rng.random(len(candidates)).astype(np.float32)
    zeros = np.zeros(len(candidates), np.float32)
    normal = Normal(0.0, 1.0, 0.0)
    posteriors = LabelPosteriors(probability, np.zeros(6, np.float32), zeros, zeros, normal, normal, 0.0, 0.0)
    merged, together = persons.merge_names(candidates, posteriors, 2)
    assert merged.identity_count == 2
    assert (merged.is_own == (merged.identity == persons.name[person][merged.face])).all()
    for face in range(6):
        for name in range(2):
            expected = probability[(candidates.face == face) & (persons.name[candidates.identity] == name)].sum()
            found = together.probability[(merged.face == face) & (merged.identity == name)].sum()
            assert found == pytest.approx(expected, abs=1e-6)


def test_near_strangers_show_a_tail_that_a_sample_does_not() -> None:
    """One pair in ten thousand is of look-alikes: the measured tail has them, the extrapolated one does not."""
    normal = Normal(0.0, 1.0, 0.0)
    edges = np.arange(0, 60.1, 0.1)
    rng = np.random.default_rng(1)
    deviation = rng.normal(4, 0.5, 2000)
    counts, _ = np.histogram(deviation, edges)
    near = NearStrangers(counts.astype(float), counts.astype(float), 2e7, 30)
    sample = rng.standard_normal(200_000).astype(np.float32)
    tail = StrangerTail.fit(sample, np.ones(len(sample), np.float32), normal)
    assert tail is not None
    measured = StrangerTail(near.continue_tail(tail.log_density))
    assert measured.compute_share_above(np.array([4.0], np.float32))[0] == pytest.approx(5e-5, rel=0.3)
    assert (np.diff(measured.log_density) <= 1e-9).all()
    assert (np.diff(measured.log_density)[:25] == np.diff(tail.log_density)[:25]).all()
