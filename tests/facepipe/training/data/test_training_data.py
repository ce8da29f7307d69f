"""Sampling, augmentation, splits, and verification: properties on small made-up sets, no images but a few arrays."""

from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.config import build
from facepipe.errors import ConfigError, EvaluationError, SourceError
from facepipe.evaluation.pairs_file import read_pairs
from facepipe.training.data.augment import AugmentConfig, augment_chip
from facepipe.training.data.config import DataConfig
from facepipe.training.data.image_names import ImageNames
from facepipe.training.data.sampling import BatchSampler, SampleConfig
from facepipe.training.data.split import SplitConfig, split_rows
from facepipe.training.validation import PairSet, ValidateConfig, _decode_pairs, select_held_pairs, verify_pairs

COUNTS = st.lists(st.integers(1, 9), min_size=4, max_size=30)


def labels_of(counts: list[int], seed: int = 0) -> np.ndarray:
    """Labels of identities with so many images, shuffled."""
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


def mixed(sampler: BatchSampler, step: int, world: int) -> np.ndarray:
    return np.concatenate([sampler.draw_rows(step, rank, world) for rank in range(world)])


@settings(deadline=None, max_examples=40)
@given(COUNTS, st.integers(1, 5), st.integers(0, 99), st.sampled_from([1, 2, 4]))
def test_balanced_batches(counts: list[int], images: int, seed: int, world: int) -> None:
    labels = labels_of(counts, seed)
    sampler = BatchSampler(labels, SampleConfig(identities=4, images=images), seed)
    epochs = 3
    for epoch in range(epochs):
        seen = Counter[int]()
        for step in range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch):
            rows = sampler.draw_rows(step)
            people = labels[rows].reshape(4, images)
            assert (people == people[:, :1]).all()
            assert len(set(people[:, 0])) == 4, "full batches of distinct identities, also where an epoch ends"
            for who, chosen in zip(people[:, 0], rows.reshape(4, images), strict=True):
                times = Counter(chosen.tolist())
                assert len(times) == min(images, counts[who])
                assert max(times.values()) - min(times.values()) <= 1, "what must be repeated is repeated evenly"
            assert np.array_equal(mixed(sampler, step, world), rows), "a batch does not depend on the number of ranks"
            seen.update(people[:, 0].tolist())
        assert set(seen) == set(range(len(counts))), "an epoch visits everyone"
        assert sum(seen.values()) == sampler.steps_per_epoch * 4
        assert max(seen.values()) <= 2


def test_images_come_again_only_when_all_have_come() -> None:
    labels = labels_of([7, 7, 7, 7])
    sampler = BatchSampler(labels, SampleConfig(identities=2, images=3), 5)
    rounds = -(-7 // 3)
    for first in (0, rounds):
        steps = range(first * sampler.steps_per_epoch, (first + rounds) * sampler.steps_per_epoch)
        seen = Counter(np.concatenate([sampler.draw_rows(step) for step in steps]).tolist())
        assert len(seen) == len(labels)
        assert max(seen.values()) <= 2


@settings(deadline=None, max_examples=30)
@given(st.integers(8, 60), st.sampled_from([1, 2, 4]), st.integers(0, 9))
def test_shuffled_batches(count: int, world: int, seed: int) -> None:
    sampler = BatchSampler(np.zeros(count, np.int64), SampleConfig(batch=8), seed)
    steps = sampler.steps_per_epoch
    for epoch in range(2):
        batches = [sampler.draw_rows(step) for step in range(epoch * steps, (epoch + 1) * steps)]
        assert all(len(set(batch.tolist())) == 8 for batch in batches)
        assert set(np.concatenate(batches).tolist()) == set(range(count))
        assert len(np.concatenate(batches)) - count < 8
    assert np.array_equal(mixed(sampler, 1, world), sampler.draw_rows(1))


def test_batches_are_a_function_of_seed_and_step() -> None:
    labels, config = labels_of([3] * 20), SampleConfig(identities=4, images=2)
    one, other = BatchSampler(labels, config, 1), BatchSampler(labels, config, 1)
    backwards = {step: other.draw_rows(step) for step in reversed(range(17))}
    assert all(np.array_equal(one.draw_rows(step), rows) for step, rows in backwards.items())
    assert not np.array_equal(one.draw_rows(0), BatchSampler(labels, config, 2).draw_rows(0))
    assert not np.array_equal(one.draw_rows(0), one.draw_rows(one.steps_per_epoch)), "epochs are shuffled anew"


def test_identities_with_one_image() -> None:
    labels = labels_of([1, 1, 3, 3, 3])
    repeated = BatchSampler(labels, SampleConfig(identities=5, images=2))
    assert repeated.singles == 2
    assert "2 of 5 identities" in repeated.notes[0]
    dropped = BatchSampler(labels, SampleConfig(identities=3, images=2, singles="drop"))
    assert set(labels[np.concatenate([dropped.draw_rows(step) for step in range(4)])].tolist()) == {2, 3, 4}
    with pytest.raises(ConfigError, match="2 identities have one image"):
        BatchSampler(labels, SampleConfig(identities=3, images=2, singles="refuse"))
    with pytest.raises(ConfigError, match="but only 3 identities"):
        BatchSampler(labels, SampleConfig(identities=4, images=2, singles="drop"))
    assert BatchSampler(labels, SampleConfig(identities=3, images=1, singles="refuse")).notes == ()


def test_batches_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="but there are only 5 images"):
        BatchSampler(np.zeros(5, np.int64), SampleConfig(batch=6))
    with pytest.raises(ConfigError, match="does not divide by 3 ranks"):
        BatchSampler(labels_of([2] * 9), SampleConfig(identities=4, images=3)).draw_rows(0, 0, 3)


def test_a_step_costs_no_more_in_a_large_set() -> None:
    labels = np.repeat(np.arange(200_000), 5)
    sampler = BatchSampler(labels, SampleConfig(identities=64, images=4))
    sampler.draw_rows(0)
    assert sampler._by_identity is None, "labels in order need no table"
    people = labels[sampler.draw_rows(sampler.steps_per_epoch * 3 // 2)]
    assert len(set(people.tolist())) == 64


EVERYTHING = AugmentConfig(flip=1, crop=1, colour=1, grey=1, blur=1, jpeg=1)


@pytest.mark.parametrize("shape", [(112, 112), (112, 96), (150, 150), (7, 5)])
def test_augmentation_is_pure(shape: tuple[int, int]) -> None:
    chip = np.random.default_rng(0).integers(0, 255, (*shape, 3)).astype(np.uint8)
    before = chip.copy()
    for config in (AugmentConfig(), EVERYTHING):
        first = augment_chip(chip, config, np.random.default_rng(3))
        assert first.shape == chip.shape
        assert first.dtype == np.uint8
        assert first.flags.c_contiguous
        assert not np.shares_memory(first, chip)
        assert np.array_equal(first, augment_chip(chip, config, np.random.default_rng(3)))
    assert np.array_equal(chip, before)


def test_each_augmentation_does_what_it_says() -> None:
    chip = cv2.GaussianBlur(np.random.default_rng(1).integers(0, 255, (64, 64, 3)).astype(np.uint8), (0, 0), 2)
    off = AugmentConfig(flip=0)

    def one(**settings: float) -> np.ndarray:
        return augment_chip(chip, build(AugmentConfig, {"flip": 0, **settings}), np.random.default_rng(0)).astype(int)

    assert np.array_equal(augment_chip(chip, off, np.random.default_rng(0)), chip)
    assert np.array_equal(one(flip=1), chip[:, ::-1])
    grey = one(grey=1)
    assert (grey == grey[..., :1]).all()
    assert one(blur=1, blur_sigma=3).std() < chip.std()
    assert 0 < np.abs(one(jpeg=1) - chip).mean() < 20
    still = {"shift": 0, "zoom": 0}
    assert np.array_equal(one(crop=1, **still), chip)
    assert not np.array_equal(one(crop=1), chip)
    plain = {"brightness": 0, "contrast": 0, "saturation": 0}
    assert np.abs(one(colour=1, **plain) - chip).max() <= 1
    brighter = one(colour=1, **{**plain, "brightness": 0.5})
    assert abs(brighter.mean() / chip.mean() - 1) > 0.02


def test_flips_are_as_frequent_as_asked() -> None:
    chip = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    rng = np.random.default_rng(0)
    flipped = sum(not np.array_equal(augment_chip(chip, AugmentConfig(flip=0.25), rng), chip) for _ in range(1000))
    assert 200 < flipped < 300


@pytest.mark.parametrize("by", ["identities", "images"])
def test_splits_do_not_move_when_data_is_added(by: str) -> None:
    names = [f"person {n}" for n in range(200)]
    labels = labels_of([1 + n % 5 for n in range(200)])
    faces = np.random.default_rng(1).integers(0, 1 << 62, len(labels))
    config = build(SplitConfig, {"by": by, "held": 0.3})
    train, held = split_rows(labels, config, 0, names, faces)
    assert np.array_equal(np.sort(np.concatenate([train, held])), np.arange(len(labels)))
    sides = (set(labels[train].tolist()), set(labels[held].tolist()))
    if by == "identities":
        assert not sides[0] & sides[1]
        assert 0.2 < len(sides[1]) / 200 < 0.4
        keep = labels % 2 == 0
        codes = np.unique(labels[keep], return_inverse=True)[1]
        fewer, _ = split_rows(codes, config, 0, names[::2], faces[keep])
        assert set(np.flatnonzero(keep)[fewer].tolist()) == set(train.tolist()) & set(np.flatnonzero(keep).tolist())
    else:
        assert 0.25 < len(held) / len(labels) < 0.35
        assert len(sides[0] & sides[1]) > 100, "identities on both sides"
        more = np.random.default_rng(3).integers(0, 1 << 62, 400)
        grown = split_rows(np.append(labels, np.repeat(np.arange(200), 2)), config, 0, names, np.append(faces, more))[1]
        assert grown[grown < len(labels)].tolist() == held.tolist(), "two images more of everybody move nobody"
        order = np.random.default_rng(2).permutation(len(labels))
        again = split_rows(labels[order], config, 0, names, faces[order])[1]
        assert set(order[again].tolist()) == set(held.tolist()), "not by position"
    other = split_rows(labels, config, 1, names, faces)[1]
    assert not np.array_equal(other, held)


@pytest.mark.parametrize("seed", range(20))
def test_two_identities_at_least_are_held_out(seed: int) -> None:
    names = [f"person {n}" for n in range(12)]
    held = split_rows(labels_of([3] * 12), SplitConfig(held=0.05), seed, names)[1]
    assert len(held) in (6, 9, 12)


def test_pairs_of_held_images_with_images_that_are_trained_on() -> None:
    labels = labels_of([4] * 50 + [1] * 10)
    held = np.sort(np.random.default_rng(0).choice(len(labels), 30, replace=False))
    chips = MadeUp(labels.tolist())
    pairs = PairSet.draw(chips, ValidateConfig(impostors=200), 1, held)  # type: ignore[arg-type]
    inside = np.isin(pairs.left, held) | np.isin(pairs.right, held)
    assert inside.all()
    assert (np.equal(labels[pairs.left], labels[pairs.right]) == pairs.same).all()
    with_friends = (labels[held] < 50).sum()
    assert 0.8 * with_friends <= pairs.same.sum() <= with_friends
    assert (~pairs.same).sum() == 200
    keys = {tuple(sorted(pair)) for pair in zip(pairs.left.tolist(), pairs.right.tolist(), strict=True)}
    assert len(keys) == len(pairs)


def test_a_split_by_names(tmp_path: Path) -> None:
    labels, names = np.array([0, 1, 2, 1]), ["Ann", "Bo", "Cy"]
    (tmp_path / "names.txt").write_text("Bo\n\nnobody\n")
    train, held = split_rows(labels, SplitConfig(names=str(tmp_path / "names.txt")), 0, names)
    assert (train.tolist(), held.tolist()) == ([0, 2], [1, 3])
    (tmp_path / "names.txt").write_text("nobody\n")
    with pytest.raises(SourceError, match="none of the 1 names"):
        split_rows(labels, SplitConfig(names=str(tmp_path / "names.txt")), 0, names)
    (tmp_path / "names.txt").write_text("Ann\nBo\nCy\n")
    with pytest.raises(ConfigError, match="nothing to train on"):
        split_rows(labels, SplitConfig(names=str(tmp_path / "names.txt")), 0, names)
    assert split_rows(labels, SplitConfig(by="none"))[1].size == 0


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({}, "none is set"),
        ({"gallery": "g", "source": "s"}, "both are set"),
        ({"source": "s", "list": "clean.csv"}, "data.list restricts a gallery"),
        ({"gallery": "g", "aligned": True}, "data.aligned"),
        ({"source": "s", "identity": "none"}, "no labels"),
        ({"source": "s", "min_images": 5, "max_images": 4}, "is less than"),
    ],
)
def test_data_that_contradicts_itself(settings_: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(DataConfig, settings_).check()


class MadeUp:
    """A chip set of grey chips: chip n has the level of row n."""

    size = (4, 4)

    def __init__(self, labels: list[int], uris: list[str] | None = None):
        self.labels, self.uris = np.array(labels), uris or []

    def load_chips(self, rows: np.ndarray) -> np.ndarray:
        chips = np.repeat(rows.astype(np.uint8), 48).reshape(-1, 4, 4, 3).copy()
        chips[:, :, :2] += 100  # not its own mirror image
        return chips


def told(chips: np.ndarray) -> np.ndarray:
    """Vectors that tell who a chip of MadeUp shows: three rows a person."""
    person = (chips[:, 0, 0, 0] % 100 + chips[:, 0, 3, 0] % 100) // 2 // 3
    angle = person.astype(np.float32) * 0.7
    return np.stack([np.cos(angle), np.sin(angle)], 1) * 5


def test_drawn_pairs() -> None:
    chips = MadeUp([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    pairs = PairSet.draw(chips, ValidateConfig(genuine=9, impostors=30), 4)  # type: ignore[arg-type]
    assert (pairs.same.sum(), len(pairs)) == (9, 39)
    assert (np.equal(chips.labels[pairs.left], chips.labels[pairs.right]) == pairs.same).all()
    assert len({(int(a), int(b)) for a, b in zip(pairs.left, pairs.right, strict=True)}) == 39
    everything = PairSet.draw(chips, ValidateConfig())  # type: ignore[arg-type]
    assert (everything.same.sum(), (~everything.same).sum()) == (12, 54), "all there are"
    scores = verify_pairs(told, everything, batch=5)
    assert (scores["accuracy"], scores["auc"], scores["eer"], scores["score"]) == (1, 1, 0, 1)
    assert "tar_at_far_1e-3" not in scores, "too few impostors for that"
    with pytest.raises(EvaluationError, match="0 genuine"):
        PairSet.draw(MadeUp([0, 1, 2]), ValidateConfig())  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match="diverged"):
        verify_pairs(lambda chips: told(chips) * np.nan, everything)


def test_the_mirror_image_is_averaged_in() -> None:
    chips = MadeUp([0, 0, 0, 1, 1, 1])
    pairs = PairSet.draw(chips, ValidateConfig())  # type: ignore[arg-type]
    seen: list[np.ndarray] = []

    def embed(chips: np.ndarray) -> np.ndarray:
        seen.append(chips)
        return told(chips)

    verify_pairs(embed, pairs)
    assert len(seen[0]) == 12
    assert np.array_equal(seen[0][6:], seen[0][:6, :, ::-1])
    seen.clear()
    verify_pairs(embed, pairs, flip=False)
    assert len(seen[0]) == 6


def test_every_pair_has_a_number() -> None:
    i, j = _decode_pairs(np.arange(45))
    assert {(int(a), int(b)) for a, b in zip(i, j, strict=True)} == {(a, b) for b in range(10) for a in range(b)}


def test_pairs_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "pairs.txt").write_text("2\t1\nAnn\t1\t2\nAnn\t1\tBo\t1\nCy\t1\t2\nCy\t1\tBo\t2\n")
    pairs = read_pairs(tmp_path / "pairs.txt")
    uris = ["/x/Ann/Ann_0001.jpg", "/x/Ann/Ann_0002.jpg", "/x/Bo/Bo_0001.jpg", "/x/Cy/Cy_0001.jpg", "/x/Cy/Cy_0002.jpg"]
    found = PairSet.from_names(MadeUp([0, 0, 1, 2, 2], uris), pairs, "pairs")  # type: ignore[arg-type]
    assert found.left.tolist() == [0, 0, 3, 3]
    assert found.right.tolist() == [1, 2, 4, -1], "Bo_0002 has no face"
    scores = verify_pairs(lambda chips: np.ones((len(chips), 3), np.float32), found)
    assert scores["accuracy"] == 0.75, "only the pair without a face is told apart"
    assert scores["score"] == scores["accuracy"]
    assert [pair.left for pair in select_held_pairs(pairs, ["bo"])] == ["Ann/Ann_0001", "Cy/Cy_0001"]
    with pytest.raises(EvaluationError, match="0 genuine"):
        PairSet.from_names(MadeUp([0], uris[:1]), pairs, "pairs")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"validate\.source or validate\.gallery"):
        _ = ValidateConfig(pairs="pairs.txt").data


def test_names_of_images() -> None:
    names = ImageNames(["Ann/1", "x"])
    assert names.find_name("/data/Ann/1.jpg") == "Ann/1"
    assert names.find_name("/data/a.tar#Ann/1.jpg") == "Ann/1"
    assert names.find_name("/data/x.png") == "x"
    assert names.find_name("/data/Bo/1.jpg") is None
