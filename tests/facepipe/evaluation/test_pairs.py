"""Verification figures against brute force and scikit-style definitions, and the reading of pairs files."""

from pathlib import Path

import numpy as np
import pytest
from archives import write_verification_set
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.errors import EvaluationError
from facepipe.evaluation.pairs import score_pairs
from facepipe.evaluation.pairs_file import read_pairs
from facepipe.evaluation.roc import (
    compute_auc,
    compute_equal_error_rate,
    compute_roc,
    cross_validate,
    find_balanced_threshold,
    find_best_threshold,
    find_tar_at_far,
)

SCORES = st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=2, max_size=40).filter(
    lambda rows: len({same for _, same in rows}) == 2
)


@settings(max_examples=200, deadline=None)
@given(SCORES)
def test_curve_is_what_counting_says(rows: list[tuple[int, bool]]) -> None:
    distances, same = np.array([d for d, _ in rows], float), np.array([s for _, s in rows])
    curve = compute_roc(distances, same)
    for threshold, far, tar in zip(*curve, strict=True):
        assert tar == pytest.approx((distances[same] <= threshold).mean())
        assert far == pytest.approx((distances[~same] <= threshold).mean())
    pairs = [(a < b) + (a == b) / 2 for a in distances[same] for b in distances[~same]]
    assert compute_auc(curve) == pytest.approx(np.mean(pairs))
    assert (curve.far[-1], curve.tar[-1]) == (1, 1)
    best = max(np.mean((distances <= t) == same) for t in np.arange(-0.5, 13.5, 0.5))
    assert np.mean((distances <= find_best_threshold(distances, same)) == same) <= best
    assert 0 <= compute_equal_error_rate(curve) <= 1


def test_best_threshold_reaches_the_best_accuracy() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        distances, same = rng.random(40).round(int(rng.integers(1, 4))), rng.random(40) < 0.5
        best = max(np.mean((distances <= t) == same) for t in [-1, *distances])
        assert np.mean((distances <= find_best_threshold(distances, same)) == same) == best
    perfect = np.array([0.1, 0.2, 0.6, 0.8])
    assert find_best_threshold(perfect, perfect < 0.5) == pytest.approx(0.4)


def test_tar_at_far_never_exceeds_the_far() -> None:
    distances = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    same = np.array([True, True, False, True, False, True])
    assert find_tar_at_far(compute_roc(distances, same), 0.4) == (0.5, 0.2)
    assert find_tar_at_far(compute_roc(distances, same), 0.5) == (0.75, 0.4)
    assert find_tar_at_far(compute_roc(distances, same), 0.0)[0] == 0.5


def test_the_threshold_comes_from_the_other_folds() -> None:
    distances = np.array([0.1, 0.9, 0.1, 0.9, 0.6, 0.7])
    same = np.array([True, False, True, False, True, False])
    found = cross_validate(distances, same, np.array([0, 0, 1, 1, 2, 2]))
    assert found.thresholds[2] == pytest.approx(0.5)
    assert found.accuracies.tolist() == [1.0, 1.0, 0.5]
    assert found.standard_error == pytest.approx(np.std([1, 1, 0.5], ddof=1) / np.sqrt(3))


def test_rare_fars_need_enough_pairs() -> None:
    rng = np.random.default_rng(0)
    same = np.arange(400) % 2 == 0
    result = score_pairs(np.where(same, 0.3, 0.9) + rng.normal(0, 0.1, 400), same, np.arange(400) // 40)
    assert result.tar["0.01"] is not None
    assert result.tar["0.001"] is None
    assert result.folds == 10
    assert result.accuracy > 0.98


def test_lfw_file(tmp_path) -> None:
    (tmp_path / "pairs.txt").write_text("2\t1\nAnn\t1\t4\nAnn\t1\tBo\t12\nCy\t2\t3\nCy\t1\tDi\t1\n")
    pairs = read_pairs(tmp_path / "pairs.txt")
    assert pairs[1] == ("Ann/Ann_0001", "Bo/Bo_0012", False, 0)
    assert [pair.fold for pair in pairs] == [0, 0, 1, 1]
    (tmp_path / "pairs.txt").write_text("2\t1\nAnn\t1\t4\n")
    with pytest.raises(EvaluationError, match="announces 2 folds"):
        read_pairs(tmp_path / "pairs.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a,b\n1,2\n", "neither"),
        ("file_x,file_y,same\na.jpg,b.jpg,perhaps\n", "line 2"),
        ("1\t1\nAnn\tx\t4\nAnn\t1\tBo\t1\n", "line 2"),
    ],
)
def test_wrong_files_are_named(text: str, message: str, tmp_path) -> None:
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises(EvaluationError, match=message):
        read_pairs(tmp_path / "pairs.csv")


def test_csv(tmp_path) -> None:
    (tmp_path / "pairs.csv").write_text("file_x,file_y,same\n./a.jpg,f/b.png,1\nc.jpg,d.jpg,False\n")
    assert [(p.left, p.right, p.same) for p in read_pairs(tmp_path / "pairs.csv")] == [
        ("a", "f/b", True),
        ("c", "d", False),
    ]


def test_pairs_of_a_verification_set(tmp_path: Path) -> None:
    path = tmp_path / "lfw.bin"
    same = [n % 3 != 0 for n in range(40)]
    write_verification_set(path, [bytes([n]) for n in range(80)], same)
    pairs = read_pairs(path)
    assert [pair.same for pair in pairs] == same
    assert pairs[3][:2] == ("lfw.bin/000006", "lfw.bin/000007")
    assert [pair.fold for pair in pairs] == [n // 4 for n in range(40)]
    path.write_bytes(b"features")
    with pytest.raises(EvaluationError, match=r"lfw\.bin.*not a verification set"):
        read_pairs(path)


def test_lfw_lines_without_a_first_line(tmp_path: Path) -> None:
    """RFW's pairs: the same lines, ten folds."""
    path = tmp_path / "Asian_pairs.txt"
    path.write_text("m.01\t1\t2\n" * 10 + "m.01\t1\tm.02\t3\n" * 10)
    pairs = read_pairs(path)
    assert pairs[0] == ("m.01/m.01_0001", "m.01/m.01_0002", True, 0)
    assert pairs[-1] == ("m.01/m.01_0001", "m.02/m.02_0003", False, 9)


def test_a_balanced_threshold_does_not_follow_the_number_of_impostors() -> None:
    """With 14 impostors per genuine pair, the highest accuracy calls next to all pairs different."""
    rng = np.random.default_rng(0)
    genuine = rng.normal(1.15, 0.2, 2000)
    impostors = rng.normal(1.35, 0.15, 28_000)
    found = []
    for count in (2000, 28_000):
        distances = np.concatenate([genuine, impostors[:count]])
        found.append(find_balanced_threshold(distances, np.arange(len(distances)) < 2000))
    assert found[0] == pytest.approx(found[1], abs=0.03)
    assert (genuine < found[1]).mean() > 0.6
    accurate = find_best_threshold(distances, np.arange(len(distances)) < 2000)
    assert (genuine < accurate).mean() < 0.4
