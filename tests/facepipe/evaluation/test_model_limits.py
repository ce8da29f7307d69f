"""Limits of a model: the distance of one person with labels and without, and of copies."""

import numpy as np
import pytest
from hard_faces import ArcFaceLike, DlibLike

from facepipe.evaluation.model_limits import alter_chips, estimate_same_person, measure_copy_limits


def draw(space: DlibLike | ArcFaceLike, persons: int, each: int) -> tuple[np.ndarray, np.ndarray]:
    person = np.repeat(np.arange(persons), each)
    return space.draw(space.draw_centres(persons), person).vectors, person


@pytest.mark.parametrize("space", [DlibLike, ArcFaceLike])
def test_one_person_with_labels_and_without(space: type[DlibLike] | type[ArcFaceLike]) -> None:
    """Both tell most pairs of one person from those of two, and say between what the distance lies."""
    vectors, person = draw(space(3), 250, 3)
    labelled = estimate_same_person(vectors, person)
    alone = estimate_same_person(vectors, None)
    assert (labelled.basis, alone.basis) == ("labels", "strangers")
    assert labelled.same == 750
    distance = np.linalg.norm(vectors[:, None] - vectors[None], axis=2)
    is_pair = np.triu(np.ones_like(distance, bool), 1)
    same = distance[is_pair & (person[:, None] == person)]
    different = distance[is_pair & (person[:, None] != person)]
    for found in (labelled, alone):
        assert found.low <= found.distance <= found.high
        assert (same < found.distance).mean() > 0.85
        assert (different < found.distance).mean() < 0.03
    # The extrapolated share is about the real one, although some of the pairs are of one person.
    assert (different < alone.distance).mean() == pytest.approx(0.005, abs=0.004)


def test_few_labels_are_no_labels() -> None:
    vectors, person = draw(DlibLike(3), 250, 1)
    person[:20] = np.arange(20) // 2
    assert estimate_same_person(vectors, person).basis == "strangers"
    assert estimate_same_person(vectors, np.full(250, -1)) == estimate_same_person(vectors, None)


def test_copies_are_nearer_than_strangers() -> None:
    vectors, _ = draw(DlibLike(3), 300, 1)
    rng = np.random.default_rng(0)

    def move(distance: float) -> np.ndarray:
        moved = vectors[:100] + distance * rng.normal(size=(100, 128)) / np.sqrt(128)
        return (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float32)

    at = np.arange(100)
    found = measure_copy_limits(vectors, {"moved": [(at, move(0.02)), (at, move(0.1))], "degraded": [(at, move(0.2))]})
    assert found.copies == 300
    assert 0.08 < found.near < 0.13 < 0.17 < found.close_near < 0.23
    assert found.near < found.same_shot
    # Copies that a model cannot tell from strangers move no limit as far.
    wild = measure_copy_limits(vectors, {"moved": [(at, move(2.0))], "degraded": [(at, move(2.0))]})
    assert max(wild.near, wild.close_near, wild.same_shot) < estimate_same_person(vectors, None).distance


def test_altered_chips_are_chips() -> None:
    chips = np.random.default_rng(0).integers(0, 256, (3, 40, 30, 3)).astype(np.uint8)
    for sets in alter_chips(chips).values():
        for made in sets:
            assert (made.shape, made.dtype) == (chips.shape, chips.dtype)
            assert (made != chips).any()
