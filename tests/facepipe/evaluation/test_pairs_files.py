"""Pairs files as they are published: two lines per pair, two images per line, folders of CFP; bad lines are told."""

from pathlib import Path

import pytest

from facepipe.errors import EvaluationError
from facepipe.evaluation.pairs_file import Pair, read_pairs


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_cplfw(tmp_path: Path) -> None:
    lines = [f"Ann_{n}.jpg 1\nAnn_{n + 1}.jpg 1\nAnn_{n}.jpg 0\nBob_{n}.jpg 0\n" for n in range(10)]
    pairs = read_pairs(write(tmp_path / "pairs_CPLFW.txt", "".join(lines)))
    assert len(pairs) == 20
    assert pairs[:2] == [Pair("Ann_0", "Ann_1", True, 0), Pair("Ann_0", "Bob_0", False, 0)]
    assert [pair.fold for pair in pairs] == [n // 2 for n in range(20)]


def test_calfw_numbers_of_folds(tmp_path: Path) -> None:
    pairs = read_pairs(write(tmp_path / "pairs_CALFW.txt", "A_1.jpg 3\nA_2.jpg 3\nA_1.jpg 0\nB_1.jpg 0\n"))
    assert [pair.same for pair in pairs] == [True, False]


@pytest.mark.parametrize("order", ["{0} {1} {2}", "{2} {0} {1}", "{0} {1}  {2} "])
def test_two_images_and_a_flag(tmp_path: Path, order: str) -> None:
    text = "".join(order.format(f"imgs/{n}.jpg", f"imgs/{n + 1}.png", n % 2) + "\r\n" for n in range(20))
    pairs = read_pairs(write(tmp_path / "agedb_30_pair.txt", text))
    assert pairs[1] == Pair("imgs/1", "imgs/2", True, 0)
    assert sum(pair.same for pair in pairs) == 10


@pytest.mark.parametrize("kind", ["FP", "FF"])
def test_cfp(tmp_path: Path, kind: str) -> None:
    lists = {"F": "frontal", "P": "profile"}
    for letter, folder in lists.items():
        lines = "".join(f"{n} ../Data/Images/{n:03d}/{folder}/01.jpg\n" for n in range(1, 5))
        write(tmp_path / "Protocol" / f"Pair_list_{letter}.txt", lines)
    for fold in range(1, 11):
        write(tmp_path / "Protocol" / "Split" / kind / f"{fold:02d}" / "same.txt", "1,1\n2,2\n")
        write(tmp_path / "Protocol" / "Split" / kind / f"{fold:02d}" / "diff.txt", "1,2\n3,4\n")
    pairs = read_pairs(tmp_path / "Protocol" / "Split" / kind)
    assert len(pairs) == 40
    second = "profile" if kind == "FP" else "frontal"
    assert pairs[2] == Pair("001/frontal/01", f"002/{second}/01", False, 0)
    assert sorted({pair.fold for pair in pairs}) == list(range(10))
    write(tmp_path / "Protocol" / "Split" / kind / "03" / "diff.txt", "1,2\n3,99\n")
    with pytest.raises(EvaluationError, match=r"03/diff\.txt, line 2: two numbers of the lists expected: '3,99'"):
        read_pairs(tmp_path / "Protocol" / "Split" / kind)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a.jpg 1\nb.jpg 1\nc.jpg 0\n", "3 images, of which two make a pair"),
        ("a.jpg 1\nb.jpg 0\n", "line 2: 0 after 1"),
        ("a.jpg 1\nb.jpg one\n", "line 2: an image and a number expected"),
        ("a.jpg b.jpg 1\nc.jpg d.jpg\n", "line 2: two images and 1 or 0 expected"),
        ("a.jpg b.jpg 1\nc.jpg d.jpg 5\n", "line 2: two images and 1 or 0 expected"),
    ],
)
def test_bad_lines_are_told(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(EvaluationError, match=reason):
        read_pairs(write(tmp_path / "pairs.txt", text))


def test_a_folder_that_is_not_cfps_is_told(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="nor CFP's folder"):
        read_pairs(tmp_path)
    with pytest.raises(EvaluationError, match="Pair_list_F"):
        read_pairs(write(tmp_path / "Protocol" / "Split" / "FP" / "x.txt", "").parent)
