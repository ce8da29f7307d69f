"""Pairs that are drawn from a gallery: nobody dominates, no image meets itself, and a file of them gives the same."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from bench.galleries import CONTRACT, Faces, append
from helpers import measure_peak_bytes, run_facepipe
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.arrow import to_float_lists
from facepipe.errors import EvaluationError
from facepipe.evaluation import draw_pairs as drawing
from facepipe.evaluation.draw_pairs import choose_quotas, draw_pairs, write_pairs
from facepipe.evaluation.pairs import evaluate_list, evaluate_pairs
from facepipe.evaluation.pairs_file import read_pairs
from facepipe.gallery import Gallery
from facepipe.schema import OK, conform


def make_gallery(path: Path, images: list[dict[str, Any]]) -> Gallery:
    """A gallery with a row per face: person, uri, image (its bytes), size of the face's box."""
    people = sorted({image["person"] or "" for image in images})
    vectors = Faces().draw(np.array([people.index(image["person"] or "") for image in images]), 1)
    half = [image.get("size", 50) / 2 for image in images]
    table = {
        "face_id": pa.array(range(1, len(images) + 1), pa.int64()),
        "image_id": [image.get("image", image["uri"]) for image in images],
        "uri": [image["uri"] for image in images],
        "status": [OK] * len(images),
        "identity": pa.array([image["person"] for image in images], pa.string()),
        "box": pa.array([[50 - n, 50 - n, 50 + n, 50 + n] for n in half], pa.list_(pa.float32())),
        "width": pa.array([100] * len(images), pa.int32()),
        "height": pa.array([100] * len(images), pa.int32()),
        "embedding": to_float_lists(vectors),
    }
    append(Gallery.create(str(path), CONTRACT), [conform(pa.table(table))], "first")
    return Gallery(str(path))


def photos_of(person: str, count: int) -> list[dict[str, Any]]:
    return [{"person": person, "uri": f"/lfw/{person}/{person}_{n:04d}.jpg"} for n in range(1, count + 1)]


SIZES = {"George": 60, "Colin": 12, "Tony": 6} | {f"p{n}": 2 for n in range(20)} | {f"single{n}": 1 for n in range(30)}


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    """One person has a third of all images, and many have one."""
    images = [image for person, count in SIZES.items() for image in photos_of(person, count)]
    return make_gallery(tmp_path_factory.mktemp("uneven") / "g", images)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=40), st.integers(1, 400), st.integers(0, 3))
def test_quotas_are_even(possible: list[int], count: int, seed: int) -> None:
    most = np.array(possible)
    quotas = choose_quotas(most, count, np.random.default_rng(seed))
    total = int(quotas.sum())
    assert (quotas >= 0).all()
    assert (quotas <= most).all()
    assert total <= count
    givers = int((most > 0).sum())
    assert total >= min(givers, count)
    if total:
        assert quotas.max() <= max(1, total / 2)
        assert quotas.max() <= max(1, 2 * total / givers)
    # Whoever gives less than another has no more to give, or is one behind.
    for one, other in zip(*np.where(quotas[:, None] + 1 < quotas[None]), strict=True):
        assert quotas[one] == most[one], (one, other)


@pytest.mark.parametrize("count", [2, 7, 60, 5000])
def test_drawn_pairs_are_sound(uneven: Gallery, count: int) -> None:
    pairs = draw_pairs(uneven, count, seed=3)
    assert 2 <= len(pairs) <= max(2, count)
    assert [pair.same for pair in pairs] == [n % 2 == 0 for n in range(len(pairs))]
    assert all((pair.left.split("/")[2] == pair.right.split("/")[2]) == pair.same for pair in pairs)
    assert all(pair.left != pair.right for pair in pairs)
    assert len({frozenset((pair.left, pair.right)) for pair in pairs}) == len(pairs)
    assert all(0 <= later.fold - earlier.fold <= 1 for earlier, later in pairwise(pairs))
    assert pairs[-1].fold <= 9


def test_nobody_dominates(uneven: Gallery) -> None:
    pairs = draw_pairs(uneven, 5000)
    genuine = Counter(pair.left.split("/")[2] for pair in pairs if pair.same)
    assert len(genuine) == 23, "everybody who has two images"
    assert max(genuine.values()) <= 2 * sum(genuine.values()) / len(genuine)
    impostors = Counter(name.split("/")[2] for pair in pairs if not pair.same for name in (pair.left, pair.right))
    assert max(impostors.values()) - min(impostors.values()) <= 2
    assert len(impostors) > 40


def test_the_draw_follows_from_the_seed_and_not_from_the_order(uneven: Gallery, tmp_path: Path) -> None:
    images = [image for person, count in SIZES.items() for image in photos_of(person, count)]
    shuffled = make_gallery(tmp_path / "g", [images[n] for n in np.random.default_rng(0).permutation(len(images))])
    assert draw_pairs(shuffled, 60, seed=1) == draw_pairs(uneven, 60, seed=1)
    assert draw_pairs(uneven, 60, seed=2) != draw_pairs(uneven, 60, seed=1)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many identities with many images, those with the lowest hashes are kept, whatever came first."""
    rows = [(f"/{person}/{n}.jpg", f"p{person}") for person in range(400) for n in range(30)]
    monkeypatch.setattr(drawing, "_MAX_IMAGES", 5)

    def collect(order: np.ndarray) -> list[tuple[str, str]]:
        candidates = drawing._Candidates(10, 0)
        for part in np.array_split(order, 50):
            candidates.add([rows[n][0] for n in part], [rows[n][1] for n in part])
        return list(candidates.iterate_images())

    forwards, peak = measure_peak_bytes(lambda: collect(np.arange(len(rows))))
    assert len(forwards) == 50
    assert len({identity for identity, _ in forwards}) == 10
    assert collect(np.random.default_rng(0).permutation(len(rows))) == forwards
    assert peak < 500_000


def test_an_image_stands_for_its_subject(tmp_path: Path) -> None:
    """No pair holds two faces of one image, a copy under another name, or an image that its name does not find."""
    images = [image for person in ("Ann", "Bo", "Cy") for image in photos_of(person, 4)]
    # Two people in one photo, each with a label: it shows the larger one. A large face without a label hides the small.
    images += [{"person": "Ann", "uri": "/both.jpg", "size": 30}, {"person": "Bo", "uri": "/both.jpg", "size": 60}]
    images += [{"person": "Cy", "uri": "/hidden.jpg", "size": 30}, {"person": None, "uri": "/hidden.jpg", "size": 60}]
    # The same bytes: under two labels, and twice under one.
    images += [{"person": "Ann", "uri": "/x/1.jpg", "image": "x"}, {"person": "Bo", "uri": "/y/1.jpg", "image": "x"}]
    images += [{"person": "Cy", "uri": f"/cy/{n}.jpg", "image": "twice"} for n in range(2)]
    # Names that a pairs file cannot tell apart, or cannot hold.
    images += [{"person": "Ann", "uri": "/n/1.jpg"}, {"person": "Bo", "uri": "/n/1.png"}]
    images += [{"person": "Cy", "uri": uri} for uri in ("/a\nb.jpg", " c.jpg", "/d\\e.jpg", "=f.jpg", "/g.jpg.png")]
    gallery = make_gallery(tmp_path / "g", images)
    seen = dict[str, str]()
    for seed in range(6):
        pairs = draw_pairs(gallery, 200, seed)
        for pair in pairs:
            assert not {pair.left, pair.right} & {"/hidden", "/x/1", "/y/1", "/n/1", "/a\nb", " c", "/d\\e", "=f"}
            assert not {pair.left, pair.right} >= {"/cy/0", "/cy/1"}
            if "/both" in (pair.left, pair.right):
                other = pair.left if pair.right == "/both" else pair.right
                assert pair.same == ("Bo" in other), pair
            seen |= {pair.left: "", pair.right: ""}
        assert evaluate_list(gallery, pairs, "drawn").without_face == 0
    assert "/both" in seen


def test_a_file_of_drawn_pairs_gives_the_same_figures(uneven: Gallery, tmp_path: Path) -> None:
    pairs = draw_pairs(uneven, 60)
    write_pairs(str(tmp_path / "pairs.csv"), pairs)
    assert read_pairs(tmp_path / "pairs.csv") == pairs
    assert evaluate_pairs(uneven, tmp_path / "pairs.csv") == evaluate_list(uneven, pairs, "drawn")


@pytest.mark.parametrize("sizes", [{}, {"Ann": 5}, {"Ann": 1, "Bo": 1}, {"": 3}])
def test_a_gallery_without_pairs_is_an_error(tmp_path: Path, sizes: dict[str, int]) -> None:
    images = [
        image | {"person": person or None} for person, count in sizes.items() for image in photos_of(person, count)
    ]
    gallery = make_gallery(tmp_path / "g", images) if images else Gallery.create(str(tmp_path / "g"), CONTRACT)
    with pytest.raises(EvaluationError, match=r"pairs need 2 identities, one of them with 2 images"):
        draw_pairs(gallery, 10)


def test_the_command(uneven: Gallery, tmp_path: Path) -> None:
    words = ("evaluate", "pairs", uneven.path, "--draw", "40")
    code, out, _ = run_facepipe(*words, "--seed", "5", "--write", tmp_path / "pairs.csv", "--json")
    summary = json.loads(out)
    assert (code, summary["pairs"], summary["requested"], summary["seed"]) == (0, 40, 40, 5)
    of_file = json.loads(run_facepipe("evaluate", "pairs", uneven.path, tmp_path / "pairs.csv", "--json")[1])
    assert of_file == {name: summary[name] for name in of_file}
    code, out, _ = run_facepipe(*words)
    assert (code, "40 of 40 requested" in out) == (0, True)
    for wrong in ((), (tmp_path / "pairs.csv", "--draw", "4"), (tmp_path / "pairs.csv", "--write", "x.csv")):
        code, _, error = run_facepipe("evaluate", "pairs", uneven.path, *wrong)
        assert code == 2
        assert "--draw COUNT" in error
