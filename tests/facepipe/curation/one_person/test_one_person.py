"""Whether two groups of faces are one person: what is named is right, whatever the space, the region and the share."""

from dataclasses import dataclass

import numpy as np
import pytest
from hard_faces import EASY, ArcFaceLike, DlibLike

from facepipe.curation.graph.cohort import Cohort
from facepipe.curation.one_person.judge import (
    MIN_PROBABILITY,
    NEAR,
    SAME_NAME,
    SAME_PICTURE,
    GroupPairs,
    judge_pairs,
    judge_parts,
)
from facepipe.curation.one_person.model import OnePersonModel, SizedNormal, sum_groups
from facepipe.types import Float32, Int64

THRESHOLD = 0.03


@dataclass
class Corpus:
    """Faces, their labels, and the pairs of labels (m, 2) that are one person."""

    vectors: Float32
    density: Float32
    label: Int64
    truth: set[tuple[int, int]]


def split(vectors: np.ndarray, person: np.ndarray, count: int, seed: int = 0) -> Corpus:
    """Give the first `count` persons two names, half of their faces each."""
    rng = np.random.default_rng(seed)
    label = person.copy()
    truth = set()
    persons = int(person.max()) + 1
    for n in range(count):
        at = rng.permutation(np.flatnonzero(person == n))
        label[at[: len(at) // 2]] = persons + n
        truth.add((n, persons + n))
    return Corpus(vectors, Cohort.draw(vectors, 0).compute_density(vectors), label, truth)


def judge(corpus: Corpus, *, expected: float = 1.0) -> dict[tuple[int, int], float]:
    """Judge all pairs of labels that are near, and return their probabilities."""
    count = int(corpus.label.max()) + 1
    groups = sum_groups(corpus.vectors, corpus.density, corpus.label, count)
    u, v = np.triu_indices(count, 1)
    similarity = groups.compute_linkage(u, v)
    near = np.flatnonzero(similarity >= np.quantile(similarity, 0.99))
    ends = np.stack([u[near], v[near]], axis=1)
    model = OnePersonModel.fit(groups, corpus.vectors, corpus.density, corpus.label, compared=ends, threshold=THRESHOLD)
    pairs = GroupPairs(
        ends, similarity[near], groups.size[ends], np.full(len(near), NEAR), np.zeros(len(near), int), len(u), expected
    )
    return dict(zip(map(tuple, ends.tolist()), judge_pairs(model, pairs).tolist(), strict=True))


def named(corpus: Corpus) -> tuple[int, int, float]:
    """Count the pairs that are named, and those of them that are right; and add up their probabilities."""
    found = {pair: value for pair, value in judge(corpus).items() if value >= MIN_PROBABILITY}
    return len(found), len(corpus.truth & set(found)), sum(found.values())


@pytest.mark.parametrize("space", ["dlib", "arc"])
def test_what_is_named_is_right(space: str) -> None:
    """Half of the persons have a look-alike. Those with two names come first, and who is named has two."""
    drawn: DlibLike | ArcFaceLike = DlibLike(3) if space == "dlib" else ArcFaceLike(3)
    person = np.repeat(np.arange(400), 4)
    vectors = drawn.draw(drawn.draw_centres(400), person).vectors
    corpus = split(vectors, person, 12)
    found = judge(corpus)
    first = sorted(found, key=lambda pair: -found[pair])[:12]
    assert len(corpus.truth & set(first)) >= 8
    count, right, expected = named(corpus)
    assert count - right <= max(1, 0.4 * count)
    assert expected >= MIN_PROBABILITY * count
    assert named(split(vectors, person, 0))[0] <= 1, "and nobody is named if nobody has two names"


def test_every_person_twice() -> None:
    """Two corpora in one gallery: every row's most similar group is the same person, and no tail of strangers."""
    space = DlibLike(5, EASY)
    person = np.repeat(np.arange(150), 6)
    found, right, _ = named(split(space.draw(space.draw_centres(150), person).vectors, person, 150))
    assert right >= 120
    assert found - right <= 5


def test_relatives_are_no_persons_with_two_names() -> None:
    """Families are regions where strangers are alike: nobody of them is named because of that."""
    space = DlibLike(7)
    centres = space.draw_centres(300, relatives=5, kinship=0.5)
    person = np.repeat(np.arange(300), 4)
    found, right, _ = named(split(space.draw(centres, person).vectors, person, 10))
    assert found - right <= max(1, 0.3 * found)


def test_more_faces_say_more() -> None:
    model = OnePersonModel(
        genuine=SizedNormal(0.05, 0.0001, 0.0002),
        strangers=SizedNormal(-0.06, 0.0005, 0.0004),
        counts=np.zeros(400),
        pair_count=0.0,
        sampling=1.0,
        group_count=100,
        log_tail=None,
        regions=None,
        max_for=30.0,
        max_against=9.0,
    )
    similarity = np.array([0.04, 0.04, -0.05, -0.05])
    sizes = np.array([[1, 1], [5, 5], [1, 1], [5, 5]])
    pairs = GroupPairs(
        np.zeros((4, 2), int), similarity.astype(np.float32), sizes, np.full(4, NEAR), np.zeros(4, int), 10_000.0, 1.0
    )
    single_near, several_near, _, _ = judge_pairs(model, pairs)
    assert several_near > single_near
    single_far, several_far = judge_parts(model, similarity[2:].astype(np.float32), sizes[2:], 100)
    assert several_far > single_far
    # A face that is more similar is not less likely the same person.
    line = np.linspace(-0.1, 0.12, 50)
    assert (np.diff(model.compute_log_ratio(line, np.full(50, 0.5))) >= -1e-9).all()


@pytest.mark.parametrize(("similarity", "is_number", "likely"), [(0.04, 0, True), (-0.08, 0, False), (-0.08, 1, False)])
def test_names_say_as_much_as_their_faces_bear_out(similarity: float, is_number: int, likely: bool) -> None:
    """Ten names that two corpora have: the same persons, or two schemes that count from 1."""
    model = OnePersonModel(
        genuine=SizedNormal(0.05, 0.0001, 0.0002),
        strangers=SizedNormal(-0.06, 0.0005, 0.0004),
        counts=np.zeros(400),
        pair_count=0.0,
        sampling=1.0,
        group_count=100,
        log_tail=None,
        regions=None,
        max_for=30.0,
        max_against=9.0,
    )
    pairs = GroupPairs(
        np.zeros((10, 2), int),
        np.full(10, similarity, np.float32),
        np.full((10, 2), 2),
        np.full(10, SAME_NAME),
        np.full(10, is_number),
        100.0,
        1.0,
    )
    assert ((judge_pairs(model, pairs) >= MIN_PROBABILITY) == likely).all()


def test_corpora_that_show_nothing() -> None:
    """No pair, one group, and groups of one face and one picture: probabilities, and no error."""
    one = Corpus(np.eye(4, 128, dtype=np.float32), np.zeros(4, np.float32), np.zeros(4, int), set())
    pairs = GroupPairs(
        np.empty((0, 2), int), np.empty(0, np.float32), np.empty((0, 2), int), np.empty(0, int), np.empty(0, int), 0, 1
    )
    groups = sum_groups(one.vectors, one.density, one.label, 1)
    model = OnePersonModel.fit(
        groups, one.vectors, one.density, one.label, compared=np.empty(0, int), threshold=THRESHOLD
    )
    assert len(judge_pairs(model, pairs)) == 0
    assert len(judge_parts(model, np.empty(0, np.float32), np.empty((0, 2), int), 0)) == 0
    same = np.repeat(np.eye(1, 128, dtype=np.float32), 6, axis=0)
    found = judge(Corpus(same, np.zeros(6, np.float32), np.arange(6), set()))
    assert all(0 <= value <= 1 for value in found.values())
    groups = sum_groups(same, np.zeros(6, np.float32), np.arange(6), 6)
    model = OnePersonModel.fit(
        groups, same, np.zeros(6, np.float32), np.arange(6), compared=np.array([0, 1]), threshold=THRESHOLD
    )
    pairs = GroupPairs(
        np.array([[0, 1]]),
        np.zeros(1, np.float32),
        np.zeros((1, 2), int),
        np.array([SAME_PICTURE]),
        np.zeros(1, int),
        15.0,
        1.0,
    )
    assert judge_pairs(model, pairs)[0] >= MIN_PROBABILITY, "nothing is left to compare but one picture"
