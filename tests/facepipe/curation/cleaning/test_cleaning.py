"""Cleaning: evidence as by brute force, injected wrong labels found and put right, lists that read back the same."""

import csv
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bench.galleries import Faces as DrawnFaces
from hard_faces import DlibLike
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from facepipe.curation.cleaning import decide, evidence, lists
from facepipe.curation.cleaning.decide import (
    DECISIONS,
    REASONS,
    LabelVerdicts,
    decide_labels,
    estimate_errors,
    estimate_wrong,
    overrule_kept,
)
from facepipe.curation.cleaning.distributions import Normal
from facepipe.curation.cleaning.evidence import FaceVectors, IdentityCentres, LabelCandidates, find_candidates
from facepipe.curation.cleaning.identities import (
    IdentityParts,
    IdentitySummary,
    split_identities,
    summarise_identities,
)
from facepipe.curation.cleaning.model import (
    LabelPosteriors,
    compute_log_ratio,
    weigh_names,
)
from facepipe.curation.cleaning.near_identities import estimate_beyond_graph
from facepipe.curation.cleaning.strangers import StrangerTail
from facepipe.nearest import join as near
from facepipe.nearest.similarity import Pairs, refine_pairs
from facepipe.sources.labels import format_label
from facepipe.sources.list_file import ListSource
from facepipe.text import restore_cell
from facepipe.training.data.lists import read_label_list

THRESHOLD = 1 - 0.416**2 / 2
NO_PAIRS = Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
KEEP, OUTLIER, RELABEL, REVIEW = (DECISIONS.index(name) for name in ("keep", "outlier", "relabel", "review"))
BYSTANDER, UNVERIFIED = (DECISIONS.index(name) for name in ("bystander", "unverified"))


@dataclass
class Corpus:
    """n faces with their true identities and the labels given, -1 for none; copies (n,) the first equal vector."""

    faces: FaceVectors
    truth: np.ndarray
    label: np.ndarray

    @property
    def wrong(self) -> np.ndarray:
        return self.truth != self.label

    @property
    def copies(self) -> np.ndarray:
        return np.arange(len(self.label))

    def pairs(self) -> Pairs:
        vectors, density = self.faces.vectors, self.faces.density
        u, v = near.find_candidate_pairs(vectors, density, THRESHOLD, 32)
        return refine_pairs(vectors, density, u, v, THRESHOLD)


def corpus(truth: np.ndarray, label: np.ndarray | None = None, seed: int = 0) -> Corpus:
    truth = np.asarray(truth, np.int64)
    vectors = DrawnFaces(seed=seed).draw(truth, 0)
    given_ = truth if label is None else np.asarray(label, np.int64)
    return Corpus(FaceVectors(vectors, np.zeros(len(truth), np.float32)), truth, given_)


def flipped(share: float, identities: int = 100, seed: int = 1) -> Corpus:
    """Identities of 6 to 23 faces; a share of the labels is another identity's."""
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.repeat(np.arange(identities), rng.integers(6, 24, identities)))
    moved = rng.random(len(truth)) < share
    return corpus(truth, np.where(moved, (truth + rng.integers(1, identities, len(truth))) % identities, truth))


def judged(
    made: Corpus, photo: np.ndarray | None = None
) -> tuple[LabelCandidates, LabelPosteriors, LabelVerdicts, IdentityParts]:
    """As pipelines.clean does it, for faces that are each in a photo of their own."""
    pairs = made.pairs()
    inside = split_identities(made.faces, made.label, made.copies, [pairs], THRESHOLD)
    pool = find_candidates(made.label, [pairs])
    start = np.where(pool.is_own, np.where(inside.is_largest[pool.face], 1, 0.1), 0).astype(np.float32)
    prior = np.ones(len(made.label), np.float32)
    pool, belief = estimate_beyond_graph(made.faces, pool, prior, start, threshold=THRESHOLD)
    photo = np.arange(len(made.label)) if photo is None else photo
    return pool, belief, decide_labels(pool, belief, photo, prior), inside


def f_score(flagged: np.ndarray, wrong: np.ndarray) -> float:
    return float(2 * (flagged & wrong).sum() / (flagged.sum() + wrong.sum()))


# ------------------------------------------------------------------ evidence


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 30), faces=st.integers(1, 30), identities=st.integers(1, 6))
def test_candidates_are_the_own_label_and_the_neighbours(seed: int, faces: int, identities: int) -> None:
    rng = np.random.default_rng(seed)
    label = rng.integers(-1, identities, faces)
    u, v = np.divmod(rng.choice(faces * faces, min(20, faces * faces), replace=False), faces)
    u, v = u[u < v], v[u < v]
    wanted = {(f, int(label[f])) for f in range(faces)}
    wanted |= {(int(a), int(label[b])) for a, b in [*zip(u, v, strict=True), *zip(v, u, strict=True)]}
    wanted = {(f, k) for f, k in wanted if label[f] >= 0 and k >= 0}
    found = find_candidates(label, [Pairs(u, v, np.zeros(len(u), np.float32))])
    assert list(zip(found.face.tolist(), found.identity.tolist(), strict=True)) == sorted(wanted)
    assert (found.is_own == (found.identity == label[found.face])).all()
    assert found.identity_count == label.max() + 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1 << 30), parts=st.sampled_from([1, 2, 4, 16]), ranges=st.sampled_from([1, 2, 4, 16]))
def test_the_parts_that_pairs_come_in_do_not_count(seed: int, parts: int, ranges: int) -> None:
    rng = np.random.default_rng(seed)
    label = rng.integers(-1, 5, 40)
    ends = np.sort(rng.integers(0, 40, (100, 2)), axis=1)
    ends = ends[ends[:, 0] < ends[:, 1]]
    whole = Pairs(ends[:, 0], ends[:, 1], np.zeros(len(ends), np.float32))
    # Every pair is in some part, and some are in several.
    part_of_pair = rng.integers(0, parts, len(ends))
    repeated = [whole.take((part_of_pair == n) | (rng.random(len(ends)) < 0.2)) for n in range(parts)]
    expected = find_candidates(label, [whole])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "count_partitions", lambda rows: ranges)
        found = find_candidates(label, repeated)
    for name in ("face", "identity", "is_own", "is_near"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1 << 30), block=st.integers(1, 9))
def test_the_sums_of_an_identity_do_not_depend_on_the_faces_of_others(seed: int, block: int) -> None:
    """To the bit: else the identities could not be spread over partitions."""
    rng = np.random.default_rng(seed)
    made = corpus(np.sort(rng.integers(0, 6, 40)))
    candidates = find_candidates(made.label, [])
    share = rng.random(40).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "_BLOCK", block)
        whole = IdentityCentres.from_shares(made.faces, candidates, share)
        for identity in range(candidates.identity_count):
            alone = IdentityCentres.from_shares(made.faces, candidates, np.where(made.label == identity, share, 0))
            assert np.array_equal(alone.sums[identity], whole.sums[identity])
            assert alone.weight[identity] == whole.weight[identity]
            members = np.flatnonzero((made.label == identity) & (share > 1e-3))
            exact = (made.faces.vectors[members] * share[members, None]).sum(axis=0, dtype=np.float64)
            assert np.abs(whole.sums[identity] - exact).max() < 1e-5


def test_without_labels_there_is_no_candidate() -> None:
    found = find_candidates(np.full(3, -1), [Pairs(np.array([0]), np.array([1]), np.zeros(1, np.float32))])
    assert (len(found), found.identity_count) == (0, 0)
    assert len(find_candidates(np.empty(0, np.int64), [NO_PAIRS])) == 0


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 30), count=st.integers(2, 25), identities=st.integers(1, 4))
def test_fit_is_the_weighted_mean_over_the_others(seed: int, count: int, identities: int) -> None:
    """Against a double loop; what a face itself has in the identity is taken out."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(count, 128)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    faces = FaceVectors(vectors, rng.random(count).astype(np.float32))
    face, identity = (x.ravel() for x in np.meshgrid(np.arange(count), np.arange(identities), indexing="ij"))
    pool = LabelCandidates(face, identity, identity == 0, identities)
    share = rng.choice([0, 5e-4, 0.3, 0.7, 1], len(pool)).astype(np.float32)
    centres = IdentityCentres.from_shares(faces, pool, share)
    similarity, weight = centres.compute_fit(faces, face, identity, share)
    counts = np.where(share > 1e-3, share, 0).astype(np.float64).reshape(count, identities)
    density = faces.density.astype(np.float64)
    pairwise = vectors.astype(np.float64) @ vectors.T - (density[:, None] + density) / 2
    for n, (i, k) in enumerate(zip(face, identity, strict=True)):
        others = np.delete(np.arange(count), i)
        total = counts[others, k].sum()
        assert weight[n] == pytest.approx(total, abs=1e-4)
        if total > 0.25:
            assert similarity[n] == pytest.approx(counts[others, k] @ pairwise[i, others] / total, abs=1e-4)


def test_faces_of_one_image_do_not_vouch_for_each_other() -> None:
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(7, 128)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    density = rng.random(7).astype(np.float32)
    photo = np.array([0, 0, 2, 3, 3, 5, 6])
    label = np.array([0, 0, 0, 0, 0, 1, -1])
    pool = find_candidates(label, [Pairs(np.array([0]), np.array([5]), np.zeros(1, np.float32))])
    share = np.where(pool.is_own, 0.5 + 0.05 * pool.face, 0).astype(np.float32)
    faces = FaceVectors(vectors, density, photo)
    centres = IdentityCentres.from_shares(faces, pool, share)
    similarity, weight = centres.compute_fit(faces, pool.face, pool.identity, share)
    own = {int(f): s for f, s, mine in zip(pool.face, share, pool.is_own, strict=True) if mine}
    for n, (face, identity) in enumerate(zip(pool.face, pool.identity, strict=True)):
        rest = [f for f in own if label[f] == identity and f != face and photo[f] != photo[face]]
        total = sum(own[f] for f in rest)
        assert weight[n] == pytest.approx(total, abs=1e-5)
        if rest:
            each = [vectors[face] @ vectors[f] - (density[face] + density[f]) / 2 for f in rest]
            assert similarity[n] == pytest.approx(np.average(each, weights=[own[f] for f in rest]), abs=1e-5)


# ------------------------------------------------------------------ belief


@pytest.mark.parametrize("share", [0.1, 0.2, 0.4])
def test_flipped_labels_are_found_and_put_right(share: float) -> None:
    made = flipped(share)
    _, belief, found, _ = judged(made)
    flagged = (found.noise > 0.5) & np.isin(found.decision, [OUTLIER, RELABEL, REVIEW])
    assert f_score(flagged, made.wrong) > 0.95
    moved = found.decision == RELABEL
    assert (made.wrong & moved & (found.other == made.truth)).sum() / made.wrong.sum() > 0.85
    assert (found.other == made.truth)[moved].mean() > 0.95
    assert belief.swapped == pytest.approx(made.wrong.mean(), abs=0.04)
    assert belief.unknown < 0.05


def test_right_labels_stay() -> None:
    _, belief, found, _ = judged(flipped(0))
    assert (found.noise < 0.5).all()
    assert (found.decision == KEEP).mean() > 0.998
    assert belief.swapped < 0.01
    assert estimate_errors(found) < 1


def test_shares_are_probabilities() -> None:
    pool, belief, found, _ = judged(flipped(0.3, 60))
    total = belief.no_identity + np.bincount(pool.face, belief.probability, len(belief.no_identity))
    assert np.abs(total - 1).max() < 1e-3
    assert (belief.probability >= 0).all()
    assert ((found.noise >= 0) & (found.noise <= 1)).all()


@pytest.mark.parametrize("of", ["faces", "identities"])
def test_numbering_does_not_matter(of: str) -> None:
    """Only the sample of strangers follows the numbers."""
    made = flipped(0.2, 80)
    rng, n = np.random.default_rng(3), len(made.label)
    _, first, found, _ = judged(made)
    if of == "faces":
        order, names = rng.permutation(n), np.arange(80)
    else:
        order, names = np.arange(n), rng.permutation(80)
    faces = FaceVectors(made.faces.vectors[order], made.faces.density[order])
    _, second, again, _ = judged(Corpus(faces, names[made.truth[order]], names[made.label[order]]))
    assert np.abs(again.noise - found.noise[order]).max() < 0.02
    assert (again.decision == found.decision[order]).mean() > 0.999
    sure = found.decision[order] == RELABEL
    assert (again.other == names[found.other[order]])[sure].all()
    assert second.swapped == pytest.approx(first.swapped, abs=0.005)


def test_flips_are_put_right_among_thousands_of_identities() -> None:
    """The more identities, the less likely is each one: the evidence has to carry further."""
    rng = np.random.default_rng(1)
    truth = np.repeat(np.arange(2500), 4)
    label = np.where(rng.random(len(truth)) < 0.1, rng.integers(0, 2500, len(truth)), truth)
    made = corpus(truth, label)
    _, belief, found, _ = judged(made)
    moved = found.decision == RELABEL
    right = np.bincount(truth[~made.wrong], minlength=2500)[truth] >= 3
    assert (made.wrong & moved & right).sum() / (made.wrong & right).sum() > 0.95
    assert (found.other == made.truth)[moved].mean() > 0.98
    assert belief.swapped == pytest.approx(made.wrong.mean(), abs=0.02)


def weighed(truth: np.ndarray, label: np.ndarray) -> LabelVerdicts:
    made = corpus(truth, label)
    pool, belief, _, inside = judged(made)
    belief = weigh_names(made.faces, pool, belief, inside.part, np.ones(len(label), np.float32), threshold=THRESHOLD)
    return decide_labels(pool, belief, np.arange(len(label)), np.ones(len(label), np.float32))


@pytest.mark.parametrize("each", [1, 4])
def test_two_persons_half_each_are_for_a_person_to_tell_apart(each: int) -> None:
    """Persons 0 and 1 have the name of person 0, among 60 identities as they should be."""
    truth = np.concatenate([np.repeat([0, 1], each), np.repeat(np.arange(2, 62), 6)])
    found = weighed(truth, np.where(truth == 1, 0, truth))
    assert (found.decision[: 2 * each] == REVIEW).all()
    assert np.allclose(found.noise[: 2 * each], 0.5, atol=0.1)
    assert (found.decision[2 * each :] == KEEP).mean() > 0.98


def test_a_small_second_part_is_not_who_bears_the_name() -> None:
    truth = np.concatenate([np.repeat([0, 1], [9, 2]), np.repeat(np.arange(2, 62), 6)])
    found = weighed(truth, np.where(truth == 1, 0, truth))
    assert (found.decision[:9] == KEEP).all()
    assert (found.noise[9:11] > 0.8).all()


def test_a_further_part_is_as_doubtful_as_the_part_it_is_near() -> None:
    """A face of the second person that none of hers is quite near."""
    truth = np.concatenate([np.repeat([0, 1], [5, 5]), np.repeat(np.arange(2, 62), 6)])
    label = np.where(truth == 1, 0, truth)
    made = corpus(truth, label)
    pool, belief, _, inside = judged(made)
    part = inside.part.copy()
    part[9] = 2
    ones = np.ones(len(label), np.float32)
    found = decide_labels(
        pool, weigh_names(made.faces, pool, belief, part, ones, threshold=THRESHOLD), np.arange(len(label)), ones
    )
    assert (found.decision[:10] == REVIEW).all()
    assert found.noise[9] == pytest.approx(found.noise[8], abs=0.1)


def test_of_two_labels_of_one_face_each_neither_is_known_to_be_wrong() -> None:
    """Two names for one person, a photo each: either may be right."""
    truth = np.concatenate([[0, 0], np.repeat(np.arange(1, 121), 6)])
    label = truth + 1
    label[0] = 0
    _, _, found, _ = judged(corpus(truth, label))
    assert np.isin(found.decision[:2], [REVIEW, UNVERIFIED]).all()
    assert np.allclose(found.noise[:2], 0.5, atol=0.05)


def test_rates_are_those_of_identities_of_the_same_size() -> None:
    """Large identities with many wrong labels say nothing of those with one photo each."""
    rng = np.random.default_rng(4)
    truth = np.concatenate([np.repeat(np.arange(80), 12), np.arange(80, 480)])
    label = truth.copy()
    moved = (truth < 80) & (rng.random(len(truth)) < 0.4)
    label[moved] = (truth[moved] + rng.integers(1, 80, moved.sum())) % 80
    _, belief, found, _ = judged(corpus(truth, label))
    assert belief.swapped == pytest.approx(moved[truth < 80].mean(), abs=0.04)
    assert (found.decision[truth >= 80] == UNVERIFIED).all()
    assert found.noise[truth >= 80].mean() < 0.1


def test_a_tail_falls_and_is_lighter_than_a_normal_one() -> None:
    rng = np.random.default_rng(0)
    similarity = rng.uniform(-1, 1, 200_000).astype(np.float32)  # no tail at all
    weight = np.ones(len(similarity), np.float32)
    normal = Normal(0.0, float(similarity.var()), 0.0)
    tail = StrangerTail.fit(similarity, weight, normal)
    assert tail is not None
    deviation = np.linspace(0, 20, 200, dtype=np.float32)
    density = tail.compute_log_density(deviation)
    assert (np.diff(density) <= 0).all()
    assert density[0] == pytest.approx(np.log(0.5 / np.sqrt(3)), abs=0.2)
    assert density[50] < -0.5 * deviation[50] ** 2
    assert StrangerTail.fit(similarity[:1000], weight[:1000], normal) is None
    assert StrangerTail.fit(np.zeros(10_000, np.float32), np.ones(10_000, np.float32), normal) is None


def test_strangers_belong_to_nobody() -> None:
    """Faces of 80 persons who have one face each, under the labels of others."""
    truth = np.concatenate([np.repeat(np.arange(60), 10), np.arange(60, 140)])
    label = np.concatenate([np.repeat(np.arange(60), 10), np.random.default_rng(0).integers(0, 60, 80)])
    _, belief, found, _ = judged(corpus(truth, label))
    strangers = truth >= 60
    assert (found.decision[strangers] == OUTLIER).mean() > 0.9
    assert (found.reason[found.decision == OUTLIER] == decide.FITS_NONE).all()
    assert (found.decision[~strangers] == KEEP).mean() > 0.99
    assert belief.unknown == pytest.approx(strangers.mean(), abs=0.03)


@pytest.mark.parametrize("truth", [np.zeros(1, int), np.zeros(60, int), np.arange(60), np.arange(4) // 2])
def test_corpora_that_show_little(truth: np.ndarray) -> None:
    """One face, one identity, one face an identity, two identities of two: nothing is thrown away, nothing breaks."""
    _, belief, found, _ = judged(corpus(truth))
    assert np.isfinite(belief.probability).all()
    alone = np.bincount(truth)[truth] == 1
    assert (found.decision == np.where(alone, UNVERIFIED, KEEP)).all()
    assert found.is_kept.all()
    assert (found.reason == np.where(alone, decide.ONLY_FACE, decide.FITS)).all()


def test_identical_faces_under_two_names() -> None:
    made = corpus(np.arange(40) % 2)
    made.faces.vectors[:] = made.faces.vectors[0]
    _, belief, found, _ = judged(made)
    assert np.isfinite(belief.probability).all()
    assert np.isfinite(found.noise).all()


def test_a_better_fit_never_counts_against_a_face() -> None:
    genuine, impostor = Normal(0.95, 1e-4, 2e-4), Normal(0.8, 1e-3, 1e-4)
    x = np.linspace(0.83, 1.05, 200, dtype=np.float32)
    ratio = compute_log_ratio(genuine, impostor, x, np.full(200, 5, np.float32))
    assert (np.diff(ratio) >= 0).all()
    assert (np.abs(ratio) <= 20).all()
    assert (compute_log_ratio(genuine, impostor, x, np.zeros(200, np.float32)) == 0).all(), (
        "nothing to rest on says nothing"
    )


# ------------------------------------------------------------------ verdicts


def verdict(
    rows: list[tuple[int, int, bool, float]],
    nobody: list[float],
    photo: list[int] | None = None,
    weight: float = 5,
    prior: list[float] | None = None,
) -> LabelVerdicts:
    """LabelVerdicts from rows of (face, identity, own, share)."""
    face, identity, own, share = (np.array(column) for column in zip(*rows, strict=True)) if rows else ((),) * 4
    pool = LabelCandidates(np.asarray(face, np.int64), np.asarray(identity, np.int64), np.asarray(own, bool), 9)
    shares = np.asarray(share, np.float32)
    rest = np.full(len(rows), weight, np.float32)
    normal = Normal(0.9, 1e-3, 0)
    belief = LabelPosteriors(shares, np.array(nobody, np.float32), shares, rest, normal, normal, 0.1, 0.1)
    number = np.array(photo if photo else range(len(nobody)), np.int64)
    before = np.array(prior if prior else [1] * len(nobody), np.float32)
    return decide_labels(pool, belief, number, before)


@pytest.mark.parametrize(
    ("own", "other", "nobody", "decision", "reason"),
    [
        (0.99, 0.005, 0.005, "keep", decide.FITS),
        (0.7, 0.2, 0.1, "review", decide.PROBABLY_RIGHT),
        (0.02, 0.95, 0.03, "relabel", decide.FITS_OTHER),
        (0.02, 0.03, 0.95, "outlier", decide.FITS_NONE),
        (0.3, 0.6, 0.1, "review", decide.PROBABLY_WRONG),
        (0.3, 0.1, 0.6, "review", decide.PROBABLY_WRONG),
        (0.01, 0.5, 0.49, "review", decide.WRONG_OF_WHOM),
        (0.01, 0.49, 0.5, "review", decide.WRONG_OF_WHOM),
    ],
)
def test_what_is_likely_decides(own: float, other: float, nobody: float, decision: str, reason: int) -> None:
    found = verdict([(0, 1, True, own), (0, 2, False, other)], [nobody])
    assert (DECISIONS[found.decision[0]], REASONS[found.reason[0]]) == (decision, REASONS[reason])
    assert found.noise[0] == pytest.approx(1 - own)
    assert (found.other[0], found.other_probability[0]) == (2, pytest.approx(other))


def test_the_best_other_identity_is_shown() -> None:
    found = verdict([(0, 1, True, 0.1), (0, 2, False, 0.2), (0, 3, False, 0.6), (1, 1, True, 1.0)], [0.1, 0.0])
    assert found.other.tolist() == [3, -1]
    assert np.isnan(found.other_similarity[1])


def test_faces_without_a_label_and_alone() -> None:
    found = verdict([(1, 0, True, 0.9)], [0, 0.1, 0], weight=0)
    assert found.decision.tolist() == [-1, UNVERIFIED, -1]
    assert [REASONS[r] for r in found.reason] == ["no label", REASONS[decide.ONLY_FACE], "no label"]
    assert np.isnan(found.noise).tolist() == [True, False, True]
    assert verdict([], [0, 0]).decision.tolist() == [-1, -1]


def test_of_faces_that_share_photo_and_label_one_bears_it() -> None:
    """The best fit stays, and the others are bystanders: also one that is known elsewhere."""
    rows = [(0, 1, True, 0.9), (1, 1, True, 0.97), (2, 1, True, 0.02), (2, 5, False, 0.97), (3, 1, True, 0.96)]
    found = verdict(rows, [0.1, 0.03, 0.01, 0.04], photo=[7, 7, 7, 3])
    assert found.decision.tolist() == [BYSTANDER, KEEP, BYSTANDER, KEEP]
    assert found.reason[0] == decide.OTHER_FACE
    assert found.noise[0] == pytest.approx(0.97), "as sure as the other face bears it"
    assert found.other[2] == 5
    assert found.image_noise.tolist() == pytest.approx([0, 0, 0, 0.04])
    assert estimate_errors(found) == pytest.approx(0.03 + 0.04)
    twins = verdict([(0, 1, True, 0.98), (1, 1, True, 0.96), (1, 5, False, 0.03)], [0.02, 0.01], photo=[7, 7])
    assert twins.decision.tolist() == [KEEP, BYSTANDER], "however well it fits, and little as it fits elsewhere"
    other_label = verdict([(0, 1, True, 0.9), (1, 2, True, 0.97)], [0.1, 0.03], photo=[7, 7])
    assert other_label.decision.tolist() == [KEEP, KEEP]


def test_a_label_is_right_if_any_face_of_its_image_bears_it() -> None:
    """Which of the two it is remains open, and costs the image nothing."""
    rows = [(0, 1, True, 0.48), (1, 1, True, 0.47), (2, 1, True, 0.9)]
    found = verdict(rows, [0.5, 0.5, 0.1], photo=[7, 7, 3])
    assert found.decision.tolist() == [KEEP, BYSTANDER, KEEP]
    assert found.image_noise[0] == pytest.approx(0.05)
    assert found.noise[0] == pytest.approx(0.52)
    alone = verdict(rows[:2], [0.5, 0.5], photo=[7, 7], weight=0)
    assert alone.decision.tolist() == [UNVERIFIED, BYSTANDER]


def test_a_wrong_label_of_an_image_counts_once() -> None:
    """Neither face fits: the one that the label was likely meant for stands for it."""
    rows = [(0, 1, True, 0.02), (1, 1, True, 0.01), (1, 5, False, 0.98), (2, 1, True, 0.99)]
    found = verdict(rows, [0.98, 0.01, 0.01], photo=[7, 7, 3], prior=[0.1, 0.9, 1])
    assert found.decision.tolist() == [BYSTANDER, RELABEL, KEEP]
    assert estimate_wrong(found) == pytest.approx(0.97 + 0.01, abs=1e-6)


def test_overruling_touches_only_what_was_kept() -> None:
    found = verdict([(0, 1, True, 0.99), (1, 1, True, 0.01), (2, 1, True, 0.99)], [0.01, 0.99, 0.01, 0])
    changed = overrule_kept(found, np.array([True, True, False, True]), decide.LOW_QUALITY, decide.SMALL)
    assert [DECISIONS[d] if d >= 0 else "" for d in changed.decision] == ["low_quality", "outlier", "keep", ""]
    assert (changed.reason[0], changed.reason[2]) == (decide.SMALL, decide.FITS)
    rest = [f.name for f in fields(LabelVerdicts) if f.name not in ("decision", "reason")]
    assert all(getattr(changed, name) is getattr(found, name) for name in rest)


def test_expected_errors_are_the_probabilities_of_being_wrong() -> None:
    rows = [(0, 1, True, 0.9), (1, 1, True, 0.2), (2, 1, True, 0.5), (3, 1, True, 0.01), (3, 2, False, 0.85)]
    found = verdict(rows, [0.1, 0.8, 0.5, 0.14, 0])
    assert found.decision.tolist() == [KEEP, OUTLIER, REVIEW, RELABEL, -1]
    assert estimate_errors(found) == pytest.approx(0.1 + 0.2 + 0.15, abs=1e-6), "what is reviewed is not decided"


def test_expected_errors_are_about_the_real_ones() -> None:
    """Small identities and many strangers, so that mistakes are made."""
    rng = np.random.default_rng(5)
    truth = np.concatenate([np.repeat(np.arange(150), 4), np.arange(150, 250)])
    label = np.where(rng.random(len(truth)) < 0.1, rng.integers(0, 150, len(truth)), truth)
    label[truth >= 150] = rng.integers(0, 150, 100)
    space = DlibLike(5)
    vectors = space.draw(space.draw_centres(250), truth).vectors
    made = Corpus(FaceVectors(vectors, np.zeros(len(truth), np.float32)), truth, label)
    _, _, found, _ = judged(made)
    errors = int(((found.noise > 0.5) != made.wrong).sum())
    assert errors > 0, "there is something to expect"
    assert errors / 3 - 3 < estimate_errors(found) < 3 * errors + 3


# ------------------------------------------------------------------ identities


def summed(made: Corpus) -> tuple[IdentitySummary, IdentityParts]:
    _, _, found, inside = judged(made)
    count = int(made.label.max()) + 1
    return summarise_identities(
        made.faces, made.label, found, inside, [made.pairs()], identity_count=count, threshold=THRESHOLD
    ), inside


def test_two_persons_under_one_name_and_one_person_under_two() -> None:
    """Label 0 holds persons 0 and 1; person 2 is split into the labels 1 and 2; 40 more are as they should be."""
    truth = np.concatenate([np.repeat([0, 1], [14, 7]), np.repeat(2, 16), np.repeat(np.arange(3, 43), 8)])
    label = np.concatenate([np.zeros(21), np.ones(8), np.full(8, 2), np.repeat(np.arange(3, 43), 8)])
    found, inside = summed(corpus(truth, label))
    assert found.face_count.tolist() == [21, 8, 8] + [8] * 40
    assert np.flatnonzero(found.apart_count).tolist() == [0]
    assert found.apart_count[0] == 7
    assert found.apart_similarity[0] < THRESHOLD
    assert np.isnan(found.apart_similarity[1:]).all()
    assert (inside.part[:14] == 0).all()
    assert (inside.part[14:21] == 1).all()
    assert (inside.size[14:21] == 7).all()
    assert list(zip(found.merges.left.tolist(), found.merges.right.tolist(), strict=True)) == [(1, 2)]
    assert found.merges.similarity[0] > THRESHOLD


def test_parts_of_unlabelled_faces_and_copies() -> None:
    made = corpus(np.array([0, 0, 0, 1, 1]), np.array([0, 0, 0, -1, -1]))
    made.faces.vectors[1] = made.faces.vectors[0]
    found = split_identities(made.faces, made.label, np.array([0, 0, 2, 3, 4]), [NO_PAIRS], THRESHOLD)
    assert found.part.tolist() == [0, 0, 1, -1, -1], "copies hold together without an edge"
    assert found.size[:3].tolist() == [2, 2, 1]
    assert found.is_largest.tolist() == [True, True, False, False, False]


def test_an_empty_identity_has_figures_too() -> None:
    made = corpus(np.repeat([0, 2], 5))
    _, _, found, inside = judged(made)
    figures = summarise_identities(
        made.faces, made.label, found, inside, [made.pairs()], identity_count=4, threshold=THRESHOLD
    )
    assert figures.face_count.tolist() == figures.kept_count.tolist() == [5, 0, 5, 0]
    assert len(figures.merges) == len(figures.look_alikes) == 0


# ------------------------------------------------------------------ lists


def decisions(rows: list[dict[str, Any]], folder: Path) -> None:
    plain = {"decision": "keep", "reason": "", "suggested": None, "noise": 0.01}
    filled = [{**plain, "face_id": n, **row} for n, row in enumerate(rows)]
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(filled, lists.DECISION_SCHEMA), folder / "decisions.parquet")


def read_back(path: Path, root: str | None = None) -> list[tuple[str, str | None]]:
    items = list(ListSource(str(path), "label", root=root))
    assert [item.listing_error for item in items] == [None] * len(items)
    return [(item.uri, item.identity) for item in items]


PLAIN = {"uri": "/data/a/first.jpg", "identity": "first"}  # where hostile names come alone, nothing shows the layout
AWKWARD = [
    *("a b", "it's", 'say "x"', '"', "a,b", "a;b", "tab\there", "ends ", " begins", "\u3000wide", "é\u0301", "日本 語"),
    *("🙂", "\u202egpj", "\u2028line", "\x85", "\x1c", "\x0b\x0c", "\ufeffmark", "#1", "%20", "-", "a.jpg 3", "0"),
    *("line\nbreak", "carriage\rreturn", "both\r\nof them", "<script>", "x" * 200, "back\\slash"),
    *("=1+1", "+1", "-1", "@SUM(A1)", "'=1", "''", "\uff1d1"),
]
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=12)
# In a spreadsheet some of them would be formulas.
LABELS = st.builds(
    lambda first, name: format_label(f"{first}{name}>"), st.sampled_from(["<", *"=+-@'", "'=", "\uff1d"]), NAMES
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(NAMES | st.sampled_from(AWKWARD), st.sampled_from("kkor"), LABELS), max_size=12))
def test_clean_lists_read_back(rows: list[tuple[str, str, str]], tmp_path: Path) -> None:
    """Exactly the kept images with their labels, in every layout that can hold their names."""
    kinds = {"k": "keep", "o": "outlier", "r": "relabel"}
    table = [PLAIN] + [
        {"uri": f"/data/a/{name}{n}/{name}.jpg", "identity": who, "decision": kinds[kind], "suggested": "first"}
        for n, (name, kind, who) in enumerate(rows)
    ]
    decisions(table, tmp_path / "r")
    written = lists.write_lists(str(tmp_path / "r"), relabels=False)
    kept = [(row["uri"], row["identity"]) for row in table if row.get("decision", "keep") == "keep"]
    assert read_back(tmp_path / "r" / "clean.csv") == kept
    with open(tmp_path / "r" / "labels.csv", newline="", encoding="utf-8") as file:
        cells = dict(csv.reader(file))
    assert not any(cell.startswith(("=", "+", "-", "@")) for cell in cells.values())
    names = {number: restore_cell(name) for number, name in cells.items()}
    on_a_line = [(uri, who) for uri, who in kept if "\n" not in uri and "\r" not in uri]
    for name, root in (("clean.txt", None), ("msceleb.txt", "/data/a/")):
        found = read_back(tmp_path / "r" / name, root)
        assert [(uri, names[label or ""]) for uri, label in found] == on_a_line
    # Trainers read the same names, by face and by image.
    for name, listed in (("clean.csv", kept), ("clean.txt", on_a_line)):
        assert set(read_label_list(str(tmp_path / "r" / name), None).names) == {who for _, who in listed}, name
    assert (written.kept, written.unlisted) == (len(kept), len(kept) - len(on_a_line))
    assert written.relabelled == sum(kind == "r" for _, kind, _ in rows)


def test_relabelled_faces_are_listed_where_that_was_asked_for(tmp_path: Path) -> None:
    moved = {"uri": "/data/b/2.jpg", "identity": "wrong", "suggested": "first", "decision": "relabel", "noise": 0.875}
    other = [
        {"uri": f"/data/b/{d}.jpg", "identity": "x", "decision": d}
        for d in DECISIONS
        if d not in ("keep", "relabel", "unverified")
    ]
    decisions([PLAIN, moved, *other], tmp_path / "r")
    assert lists.write_lists(str(tmp_path / "r"), relabels=False).kept == 1
    assert (tmp_path / "r" / "clean.txt").read_text() == "/data/a/first.jpg 0\n"
    assert lists.write_lists(str(tmp_path / "r"), relabels=True).kept == 2
    assert (tmp_path / "r" / "clean.txt").read_text() == "/data/a/first.jpg 0\n/data/b/2.jpg 0\n"
    assert (tmp_path / "r" / "msceleb.txt").read_text() == "a/first.jpg 0\nb/2.jpg 0\n"
    with open(tmp_path / "r" / "relabel.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [
            {
                "path": "/data/b/2.jpg",
                "identity": "wrong",
                "suggested": "first",
                "probability": "0.8750",
                "face_id": "1",
            }
        ]


def test_only_images_of_identities_are_listed_unless_they_are_unwanted(tmp_path: Path) -> None:
    alone = {"uri": "/data/b/2.jpg", "identity": "alone", "decision": "unverified"}
    decisions([PLAIN, alone], tmp_path / "r")
    assert lists.write_lists(str(tmp_path / "r"), relabels=False).kept == 2
    assert lists.write_lists(str(tmp_path / "r"), relabels=False, unverified=False).kept == 1


def test_open_questions_have_a_list_of_their_own(tmp_path: Path) -> None:
    doubtful = {"uri": "/data/b/2.jpg", "identity": "=a", "decision": "review", "noise": 0.625, "reason": "why"}
    likely = {**doubtful, "uri": "/data/b/3.jpg", "nearest_identity": "b"}
    decisions([PLAIN, doubtful, likely], tmp_path / "r")
    assert lists.write_lists(str(tmp_path / "r"), relabels=False).to_review == 2
    with open(tmp_path / "r" / "review.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    common = {"identity": "'=a", "probability": "0.6250", "reason": "why"}
    assert rows == [
        {"path": "/data/b/2.jpg", "nearest_identity": "", "face_id": "1", **common},
        {"path": "/data/b/3.jpg", "nearest_identity": "b", "face_id": "2", **common},
    ]


@pytest.mark.parametrize(
    ("uris", "short"),
    [
        (["/data/a/1.jpg"], ["1.jpg"]),
        (["/data/ab/1.jpg", "/data/ac/1.jpg"], ["ab/1.jpg", "ac/1.jpg"]),
        (["s3://bucket/a/1.jpg", "s3://bucket/b.jpg"], ["a/1.jpg", "b.jpg"]),
        (["/a/1.jpg", "file:///a/%FF.jpg"], ["/a/1.jpg", "file:///a/%FF.jpg"]),
        (["file:///a/%FE.jpg", "file:///a/%FF.jpg"], ["file:///a/%FE.jpg", "file:///a/%FF.jpg"]),
        (["/a/ 1.jpg", "/a/2.jpg", "/a/"], ["/a/ 1.jpg", "2.jpg", "/a/"]),
        ([], []),
    ],
)
def test_the_root_of_relative_paths(uris: list[str], short: list[str], tmp_path: Path) -> None:
    """What all decided images share, whether they are kept or not."""
    decisions([{"uri": uri, "identity": "x"} for uri in uris], tmp_path / "r")
    lists.write_lists(str(tmp_path / "r"), relabels=False)
    assert (tmp_path / "r" / "msceleb.txt").read_text() == "".join(f"{name} 0\n" for name in short)


def test_what_no_text_list_can_hold_is_counted(tmp_path: Path) -> None:
    rows = [
        {"uri": uri, "identity": "x"} for uri in ("", " ", "/data/ends.jpg ", "/data/two\nlines.jpg", "/data/ok.jpg")
    ]
    decisions(rows, tmp_path / "r")
    written = lists.write_lists(str(tmp_path / "r"), relabels=False)
    assert (written.kept, written.unlisted) == (5, 4)
    assert (tmp_path / "r" / "clean.txt").read_text() == "/data/ok.jpg 0\n"
    with open(tmp_path / "r" / "clean.csv", newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == [row["uri"] for row in rows]
