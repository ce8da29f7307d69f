"""Judging in blocks: what is found does not depend, in any bit, on how many faces or candidates are handled at a time."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
from hard_faces import DlibLike
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.curation.cleaning import distributions, evidence, model
from facepipe.curation.cleaning.decide import decide_labels
from facepipe.curation.cleaning.distributions import MIN_WEIGHT, add_to_bins, fit_normal
from facepipe.curation.cleaning.evidence import FaceVectors, LabelCandidates, find_candidates
from facepipe.curation.cleaning.identities import split_identities
from facepipe.curation.cleaning.model import weigh_names
from facepipe.curation.cleaning.near_identities import estimate_beyond_graph
from facepipe.curation.cleaning.persons import number_persons
from facepipe.nearest import join as near
from facepipe.nearest.similarity import Pairs, refine_pairs
from facepipe.storage import mapped

THRESHOLD = 1 - 0.416**2 / 2


def use_blocks(patch: pytest.MonkeyPatch, rows: int) -> None:
    """Handle so many rows at a time, and keep all columns in files."""
    patch.setattr(mapped, "_MIN_FILE_BYTES", 1)
    patch.setattr(mapped, "_COPIED_ROWS", rows)
    patch.setattr(evidence, "_PAIRS_PER_BLOCK", rows)
    patch.setattr(model, "_ROWS", rows)
    patch.setattr(distributions, "_ROWS", rows)


class Gallery:
    """600 faces of 60 persons: wrong labels, two persons under one name, photos of several faces, faces without names."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        space = DlibLike(seed)
        drawn = space.draw(space.draw_centres(60), rng.integers(0, 60, 600))
        count = len(drawn)
        label = np.where(rng.random(count) < 0.1, rng.integers(0, 50, count), drawn.person % 50)
        self.label = np.where(rng.random(count) < 0.05, -1, label)
        photo = np.arange(count)
        photo[1::7] = photo[0::7][: len(photo[1::7])]
        self.faces = FaceVectors(drawn.vectors, rng.uniform(0, 0.05, count).astype(np.float32), photo)
        self.prior = np.where(self.faces.shares_photo, np.float32(0.5), np.float32(1))
        u, v = near.find_candidate_pairs(drawn.vectors, self.faces.density, THRESHOLD, 32)
        self.pairs = refine_pairs(drawn.vectors, self.faces.density, u, v, THRESHOLD)
        self.certain = rng.choice(np.flatnonzero(self.label >= 0), 5, replace=False)

    def confirm(self, candidates: LabelCandidates) -> LabelCandidates:
        """Confirm some labels, as people do: their faces have no other candidate."""
        is_certain = np.isin(candidates.face, self.certain)
        kept = np.flatnonzero(candidates.is_own | ~is_certain)
        return replace(candidates.take(kept), is_certain=is_certain[kept])

    def judge(self, *, confirms: bool) -> list[Any]:
        """Judge all labels, as `judge_labels` does, and return everything that was found on the way."""
        count = len(self.label)
        settle = self.confirm if confirms else lambda candidates: candidates
        parts = split_identities(self.faces, self.label, np.arange(count), [self.pairs], THRESHOLD, same_picture=0.1)
        persons = number_persons(self.faces, self.label, parts, [self.pairs], name_count=50, threshold=THRESHOLD)
        pool = settle(find_candidates(persons.person, [self.pairs]))
        start = np.where(pool.is_own, np.float32(0.9), np.float32(0))
        pool, found = estimate_beyond_graph(self.faces, pool, self.prior, start, threshold=THRESHOLD, settle=settle)
        merged, posteriors = persons.merge_names(pool, found, 50)
        weighed = weigh_names(
            self.faces,
            merged,
            posteriors,
            parts.part,
            self.prior,
            threshold=THRESHOLD,
            pictures=parts.pictures,
            is_further_person=persons.person >= 50,
        )
        verdicts = decide_labels(merged, weighed, np.asarray(self.faces.photo), self.prior)
        return [pool, found, merged, weighed, verdicts]


def list_values(found: Any) -> list[Any]:
    """List all arrays and numbers of what was found, field by field."""
    if is_dataclass(found) and not isinstance(found, type):
        return [value for item in fields(found) for value in list_values(getattr(found, item.name))]
    if isinstance(found, list):
        return [value for item in found for value in list_values(item)]
    return [np.empty(0) if found is None else np.asarray(found)]


@pytest.mark.parametrize("confirms", [False, True])
def test_the_number_of_blocks_does_not_count(confirms: bool) -> None:
    gallery = Gallery(3)
    expected = list_values(gallery.judge(confirms=confirms))
    pairs = len(expected[0])  # the faces of all candidates
    assert pairs > 1000
    assert (gallery.faces.shares_photo & (gallery.label >= 0)).sum() > 50
    for partitions in (2, 4, 16):  # all is one block without them
        with pytest.MonkeyPatch.context() as patch:
            use_blocks(patch, -(-pairs // partitions))
            found = list_values(gallery.judge(confirms=confirms))
        for value, wanted in zip(found, expected, strict=True):
            assert np.array_equal(value, wanted, equal_nan=True), partitions


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1 << 30), faces=st.integers(0, 40), rows=st.integers(1, 20))
def test_blocks_hold_every_face_once_with_all_its_pairs(seed: int, faces: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    face, identity = np.nonzero(rng.random((faces, 5)) < rng.choice([0.02, 0.4, 0.9]))
    candidates = LabelCandidates(face, identity, rng.random(len(face)) < 0.5, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "_PAIRS_PER_BLOCK", rows)
        blocks = list(candidates.iterate_blocks(faces))
        assert np.array_equal(candidates.by_identity, np.argsort(identity, kind="stable"))
        assert np.array_equal(candidates.label_counts, np.bincount(identity[candidates.is_own], minlength=5))
    seen = np.zeros((faces, 5), bool)
    end = 0
    for block in blocks:
        assert block.faces.start == end
        assert block.faces.stop - block.faces.start <= rows
        end = block.faces.stop
        seen[block.faces][block.candidates.face, block.candidates.identity] = True
        assert len(block.candidates) <= max(rows, 5)
    assert end == faces
    assert np.array_equal(np.nonzero(seen), (face, identity))
    asked = rng.integers(0, max(1, faces), 30), rng.integers(0, 5, 30)
    keys = (face * 5 + identity).tolist()
    wanted = [keys.index(key) if key in keys else -1 for key in (asked[0] * 5 + asked[1]).tolist()]
    assert candidates.find(*asked).tolist() == wanted


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1 << 30), count=st.integers(10, 3000), rows=st.sampled_from([1, 7, 128, 1000]))
def test_sums_in_blocks_are_those_of_whole_arrays(seed: int, count: int, rows: int) -> None:
    """To the bit: NumPy adds up a whole array in an order of its own."""
    rng = np.random.default_rng(seed)
    similarity = rng.normal(0.8, 0.05, count).astype(np.float32)
    weight = rng.choice([0, 0.5, 1, 3, 6, 20], count).astype(np.float32)
    share = rng.random(count).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributions, "_ROWS", rows)
        normal = fit_normal(similarity, weight, share)
    used = (weight >= MIN_WEIGHT) & (share > 0.01)
    x = similarity[used].astype(np.float64)
    shares = share[used].astype(np.float64)
    if shares.sum() < 8:
        assert normal is None
        return
    assert normal is not None
    assert normal.mean == (x * shares).sum() / shares.sum()
    bins = rng.integers(0, 6, len(x))
    sums = np.zeros(6)
    for at in range(0, len(x), rows):
        sums = add_to_bins(sums, bins[at : at + rows], x[at : at + rows])
    assert np.array_equal(sums, np.bincount(bins, x, 6))


def test_no_pair_at_all() -> None:
    nothing = Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    candidates = find_candidates(np.full(3, -1), [nothing])
    assert [block.faces for block in candidates.iterate_blocks(3)] == [slice(0, 3)]
    assert not list(candidates.iterate_blocks(0))
