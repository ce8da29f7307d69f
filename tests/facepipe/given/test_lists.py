"""Lists of faces: any order gives the same files, a large one takes little memory, and hostile ones end in a message."""

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import measure_peak_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.errors import SourceError
from facepipe.given import json_stream
from facepipe.given.join import derive_boxes
from facepipe.given.json_stream import JsonStreamError, iterate_elements
from facepipe.given.lists import FILES, read_lists
from facepipe.given.records import Kind
from facepipe.given.table import GivenFaces
from facepipe.imaging.alignment import ARCFACE_112
from facepipe.models.detectors.aligned import BOX_112


def read(*paths: Path) -> tuple[dict[str, bytes], Any]:
    """Read lists: the bytes of the files that they become, and the figures."""
    with read_lists([str(path) for path in paths]) as folder:
        files = {name: (Path(folder) / name).read_bytes() for name in FILES}
        return files, GivenFaces(folder).figures


def test_the_order_of_lines_changes_nothing_but_their_numbers(tmp_path: Path) -> None:
    """Several boxes and landmarks per image, in two lists."""
    rng = random.Random(4)
    boxes = []
    points = []
    for image in range(60):
        for _ in range(rng.randint(1, 4)):
            x, y = rng.randint(0, 500), rng.randint(0, 500)
            boxes.append(f"{image}.jpg,{x},{y},{x + 60},{y + 80}")
            if rng.random() < 0.7:
                marks = [(20, 30), (40, 30), (30, 45), (22, 60), (38, 60)]
                points.append(f"{image}.jpg," + ",".join(f"{x + dx},{y + dy}" for dx, dy in marks))
    found = []
    for seed in range(3):
        order = random.Random(seed)
        order.shuffle(boxes)
        order.shuffle(points)
        (tmp_path / "b.csv").write_text("\n".join(boxes))
        (tmp_path / "p.csv").write_text("\n".join(points))
        with read_lists([str(tmp_path / "b.csv"), str(tmp_path / "p.csv")]) as folder:
            faces = GivenFaces(folder)
            records = [faces.read(n) for n in range(len(faces.keys))]
        found.append(np.concatenate(records)[["key", "box", "points", "score", "label"]].tolist())
        assert len(found[-1]) == len(boxes)
        assert sum(not np.isnan(record[2][0]) for record in found[-1]) == len(points)
    assert str(found[0]) == str(found[1]) == str(found[2])


def test_boxes_follow_from_landmarks_however_a_face_lies() -> None:
    template = np.array(ARCFACE_112)
    (box,) = derive_boxes((template * 2 + (30, 40))[None].astype(np.float32))
    assert np.allclose(box, np.ravel(np.array(BOX_112) * 2 + (30, 40)), atol=1e-3)
    turned = np.stack([112 - template[:, 1], template[:, 0]], axis=1)
    (box,) = derive_boxes(turned[None].astype(np.float32))
    (x1, y1), (x2, y2) = BOX_112
    assert np.allclose(box, (112 - y2, x1, 112 - y1, x2), atol=1e-3)


def test_landmarks_alone_are_faces_with_scores(tmp_path: Path) -> None:
    """The lists of IJB's test suites."""
    points = " ".join(f"{value:.2f}" for value in (np.array(ARCFACE_112) * 3 + 10).ravel())
    (tmp_path / "ijbb_name_5pts_score.txt").write_text(f"1.jpg {points} 0.98\n2.jpg {points} 0.5\n")
    with read_lists([str(tmp_path / "ijbb_name_5pts_score.txt")]) as folder:
        faces = GivenFaces(folder)
        at = faces.find(["/data/IJBB/loose_crop/1.jpg", "/data/IJBB/loose_crop/2.jpg", "/data/3.jpg"])
        assert (at >= 0).tolist() == [True, True, False]
        record = faces.read(int(at[0]))[0]
    assert record["score"] == np.float32(0.98)
    assert np.allclose(record["box"], np.ravel(np.array(BOX_112) * 3 + 10), atol=0.02)


def test_names_are_compared_with_the_ends_of_paths(tmp_path: Path) -> None:
    """With and without extensions, members of containers, Windows' paths, and two forms of one letter."""
    lines = ["a/1.jpg", "a/2", "set.tar/b/3.png", r"c\d\4.jpg", "Jose\u0301/5.jpg", "/abs/6.jpg", "a/1.png"]
    (tmp_path / "list.csv").write_text("\n".join(f"{name},{n},0,{n + 9},9" for n, name in enumerate(lines)))
    uris = ["/x/a/1.jpg", "/x/a/2.webp", "s3://x/set.tar#b/3.png", "/y/c/d/4.jpg", "/y/Jos\u00e9/5.jpg", "/abs/6.jpg"]
    with read_lists([str(tmp_path / "list.csv")]) as folder:
        faces = GivenFaces(folder)
        at = faces.find([*uris, "/x/a/1.png", "/x/a/1.gif", "/x/b/1.jpg", "1.jpg", "", "/6.jpg"])
        lefts = [faces.read(n)[0]["box"][0] if n >= 0 else None for n in at.tolist()]
    assert lefts == [0, 1, 2, 3, 4, 5, 6, None, None, None, None, None]


def test_a_large_list_takes_little_memory(tmp_path: Path) -> None:
    """Names are never all in memory: some 350 bytes per line as text are less than 50 bytes."""
    count = 60_000
    with (tmp_path / "list.csv").open("w") as file:
        for n in range(count):
            file.write(f"{'x' * 120}/n{n % 900:06}/{n:07}.jpg,10.5,20.5,{60 + n % 40},90\n")
    (_, figures), peak = measure_peak_bytes(lambda: read(tmp_path / "list.csv"))
    assert figures.images == figures.faces == count
    assert peak < 22 << 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("path,kind\n1.jpg,cat\n", "are not known"),
        ("1.jpg,1,2\n", "are not known"),
        ("1.jpg,.1,.1,.5,.5\n2.jpg,.2,.2,.9,.9\n", "shares of the picture"),
        ("1.jpg,50,60,20,20\n2.jpg,50,60,20,30\n", "give the list a header such as path,x,y,w,h"),
        ('path,x,y,w,h\n"1.jpg,1,2,3,4\n' + "2.jpg,1,2,3,4\n" * 40_000, "cannot be read to its end"),
        ('{"annotations": []}', "without images"),
        ('{"images": [', "damaged"),
        ('{"images": [1]}', "is no object"),
        ('["a"]', "no JSON of COCO"),
        ('{"images": [], "info": ' + "[" * 100_000, "nested too deeply"),
        (
            '{"images": [{"id": 1}], "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]}',
            "none is 'face'",
        ),
    ],
)
def test_lists_that_cannot_be_used_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "list.csv"
    path.write_text(text)
    with pytest.raises(SourceError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_lines_of_any_length_and_numbers_of_any_size_are_counted(tmp_path: Path) -> None:
    good = [f"{n}.jpg,1,2,30,40" for n in range(9)]
    bad = ["a.jpg,1,2,1e300,40", f"b.jpg,{'9' * 5_000_000},2,30,40", "c.jpg,inf,2,30,40", "d.jpg,x,2,30,40", "e.jpg,1"]
    (tmp_path / "list.csv").write_text("\n".join([*good, *bad, "/".join("x" * 100) + ",1,2,30,40"]))
    (_, figures), peak = measure_peak_bytes(lambda: read(tmp_path / "list.csv"))
    assert (figures.faces, figures.images, figures.unusable) == (9, 14, 6)
    assert peak < 20 << 20


def test_annotations_of_crowds_other_things_and_other_images_are_counted(tmp_path: Path) -> None:
    coco = {
        "categories": [{"id": 7, "name": "Face"}, {"id": "x", "name": "car"}],
        "images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(4)] + [{"id": 9}],
        "annotations": [
            {"image_id": 0, "category_id": 7, "bbox": [1, 2, 30, 40], "score": 0.5},
            {"image_id": 0, "category_id": "x", "bbox": [1, 2, 30, 40]},
            {"image_id": 1, "category_id": 7, "bbox": [1, 2, 30, 40], "iscrowd": 1},
            {"image_id": 2, "category_id": 7, "bbox": [1, 2, 30]},
            {"image_id": "0", "category_id": 7, "bbox": [1, 2, 30, 40]},
            {"image_id": 0, "category_id": 7, "bbox": [9, 9, 30, 40], "keypoints": [0.0] * 15},
            {"image_id": 0, "category_id": 7, "bbox": [19, 9, 30, 40], "keypoints": [3.0] * 51},
        ],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    with read_lists([str(tmp_path / "coco.json")]) as folder:
        faces = GivenFaces(folder)
        at = faces.find([f"/x/{n}.jpg" for n in range(4)])
        kinds = [faces.read(n)["kind"].tolist() for n in at.tolist()]
        figures = faces.figures
    assert kinds == [[Kind.FACE] * 3, [Kind.EMPTY], [Kind.UNUSABLE], [Kind.EMPTY]]
    assert (figures.crowds, figures.others, figures.unusable) == (1, 1, 3)


@given(st.binary(max_size=300))
@settings(max_examples=150)
def test_any_bytes_are_a_list_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "list.csv"
    path.write_bytes(data)
    try:
        read(path)
    except SourceError as error:
        message = str(error)
        assert str(path) in message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4), st.integers(1, 9), st.sampled_from([None, 1]))
@settings(max_examples=150)
def test_a_stream_gives_the_values_of_the_whole_file(tree: dict[str, Any], chunk: int, indent: int | None) -> None:
    """Whatever is cut by the ends of pieces; and a text that ends too early is an error."""
    text = json.dumps(tree, indent=indent)
    expected = []
    for key, value in tree.items():
        expected += [(key, element) for element in value] if isinstance(value, list) else [(key, value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_CHUNK", chunk)
        assert list(iterate_elements(io.StringIO(text))) == expected
        with pytest.raises(JsonStreamError):
            list(iterate_elements(io.StringIO(text[: len(text) // 2])))
