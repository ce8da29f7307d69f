"""Faces that lists give: the same rows whatever their layout and order, no detector, and a message for what cannot be."""

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import embed, rows, run_facepipe
from PIL import Image

from facepipe.errors import ContractError, SourceError
from facepipe.gallery import Gallery
from facepipe.given.records import ListFigures
from facepipe.given.source import require_named
from facepipe.models.fakes import FakeDetector
from facepipe.sources.item import WorkItem
from pipelines.embed import EmbedSummary

FAKE = {"detect": {"model": "fake-detector", "min_face": 4}, "embed": {"model": "fake-embedder"}}
# Images of 200x160, and the boxes of their faces: x, y, w, h.
FACES = {
    "train/ann/0001_01.png": [(20, 30, 60, 70)],
    "train/ann/0002_01.png": [(90, 10, 50, 60)],
    "train/bob/0001_01.png": [(15, 20, 50, 60), (110, 40, 70, 80)],
}
SHARES = np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]])


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Write the images, in which the fake detector finds each face."""
    folder = tmp_path / "corpus"
    rng = np.random.default_rng(3)
    for name, boxes in FACES.items():
        pixels = rng.integers(100, 160, (160, 200, 3), np.uint8)
        for x, y, w, h in boxes:
            pixels[y : y + h, x : x + w] = (220, 20, 20)
            pixels[y + h // 2 :, x : x + w // 2] //= 2
            pixels[y : y + h, x : x + w, 0] = 220
            pixels[y : y + h, x : x + w, 1:] %= 70
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def landmarks_of(box: tuple[int, ...]) -> np.ndarray:
    return np.array(box[:2]) + SHARES * np.array(box[2:])


def write_layouts(folder: Path, order: random.Random) -> dict[str, list[Path]]:
    """Write the same faces in every layout, in any order."""
    folder.mkdir(exist_ok=True)
    faces = [(name, box) for name, boxes in FACES.items() for box in boxes]
    order.shuffle(faces)
    stems = {name: name.removeprefix("train/").removesuffix(".png") for name in FACES}

    def write(title: str, lines: list[str]) -> Path:
        (folder / title).write_text("\n".join(lines) + "\n")
        return folder / title

    boxes = [f'"{stems[n]}",{x},{y},{w},{h}' for n, (x, y, w, h) in faces]
    points = [f'"{stems[n]}",' + ",".join(f"{v:g}" for v in landmarks_of(b).ravel()) for n, b in faces]
    titles = ",".join(f"P{point}{axis}" for point in range(1, 6) for axis in "XY")
    order.shuffle(points)
    vgg = [
        write("loose_bb.csv", ["NAME_ID,X,Y,W,H", *boxes]),
        write("loose_landmark.csv", [f"NAME_ID,{titles}", *points]),
    ]
    plain = [
        f"{n},{x},{y},{x + w},{y + h}," + ",".join(f"{v:g}" for v in landmarks_of((x, y, w, h)).ravel())
        for n, (x, y, w, h) in faces
    ]
    celeba = [f"{n} {x} {y} {w} {h}" for n, (x, y, w, h) in faces]
    celeba_points = [f"{n} " + " ".join(f"{v:g}" for v in landmarks_of(b).ravel()) for n, b in faces]
    parts = ("lefteye", "righteye", "nose", "leftmouth", "rightmouth")
    titles = " ".join(f"{part}_{axis}" for part in parts for axis in "xy")
    numbers = {name: n for n, name in enumerate(FACES, 1)}
    annotations = [
        {
            "id": n,
            "image_id": numbers[name],
            "category_id": 1,
            "bbox": list(box),
            # The person's left eye comes first.
            "keypoints": [v for p in landmarks_of(box)[[1, 0, 2, 4, 3]].tolist() for v in (*p, 2)],
        }
        for n, (name, box) in enumerate(faces, 1)
    ]
    coco = {
        "info": {"description": "faces"},
        "annotations": annotations,
        "images": [{"id": n, "file_name": name, "width": 200, "height": 160} for name, n in numbers.items()],
        "categories": [{"id": 1, "name": "face"}],
    }
    (folder / "coco.json").write_text(json.dumps(coco))
    return {
        "vggface2": vgg,
        "plain": [write("plain.csv", plain)],
        "celeba": [
            write("list_bbox.txt", [str(len(faces)), "image_id x_1 y_1 width height", *celeba]),
            write("list_landmarks.txt", [str(len(faces)), titles, *celeba_points]),
        ],
        "coco": [folder / "coco.json"],
    }


def embed_boxes(corpus: Path, gallery: Path, lists: list[Path], **source: Any) -> EmbedSummary:
    source = {"boxes": tuple(map(str, lists)), "identity": "folder"} | source
    return embed(corpus, gallery, FAKE, {"source": source}, runner="inline")


def compare(gallery: Path | str) -> list[dict[str, Any]]:
    return rows(gallery, ("ingested_at", "thumb"))


@pytest.mark.parametrize("layout", ["vggface2", "plain", "celeba", "coco"])
def test_every_layout_and_order_gives_the_same_rows(
    corpus: Path, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With boxes and landmarks no detector runs, and the rows are those of a detector that finds the same."""
    embed(corpus, tmp_path / "detected", FAKE, {"source": {"identity": "folder"}}, runner="inline")
    monkeypatch.setattr(FakeDetector, "detect", lambda *_: pytest.fail("the detector ran"))
    expected = None
    for seed in range(3):
        lists = write_layouts(tmp_path / str(seed), random.Random(seed))[layout]
        gallery = tmp_path / f"{layout}{seed}"
        summary = embed_boxes(corpus, gallery, lists, boxes_frame="displayed")
        assert (summary.images, summary.faces) == (3, 4)
        found = compare(gallery)
        expected = expected or found
        assert found == expected
    detected = {(row["uri"], *row["box"]): row for row in compare(tmp_path / "detected")}
    for row in expected or []:
        same = detected[row["uri"], *row["box"]]
        assert np.allclose(row["landmarks"], same["landmarks"], atol=1e-3)
        assert np.allclose(row["embedding"], same["embedding"], atol=1e-3)
        assert (row["identity"], row["det_score"]) == (same["identity"], 1.0)


def test_landmarks_are_searched_inside_a_box_only(corpus: Path, tmp_path: Path) -> None:
    """Of a picture with two faces one is given: the other is no row. What is not found has a score of 0."""
    path = tmp_path / "boxes.csv"
    lines = ["bob/0001_01.png,12,18,66,82", "ann/0001_01.png,100,100,140,140", "ann/0002_01.png,85,5,145,75"]
    path.write_text("\n".join(lines) + "\n")
    summary = embed_boxes(corpus, tmp_path / "gallery", [path])
    assert (summary.images, summary.faces) == (3, 3)
    by_name = {Path(row["uri"]).parent.name + Path(row["uri"]).stem: row for row in compare(tmp_path / "gallery")}
    bob = by_name["bob0001_01"]
    assert bob["box"] == [12, 18, 66, 82], "the given box stays"
    assert np.allclose(np.reshape(bob["landmarks"], (5, 2)), landmarks_of((15, 20, 50, 60)), atol=1)
    assert bob["det_score"] > 0.5
    nobody = by_name["ann0001_01"]
    assert nobody["det_score"] == 0
    points = np.reshape(nobody["landmarks"], (5, 2))
    assert ((points > 100) & (points < 140)).all()


def test_each_face_has_the_label_that_the_list_gives_it(corpus: Path, tmp_path: Path) -> None:
    """Several persons per picture; a second run with the same list changes nothing, and new labels arrive."""
    path = tmp_path / "boxes.csv"
    lines = [
        "path,x1,y1,x2,y2,identity",
        "train/bob/0001_01.png,15,20,65,80,Bob",
        "train/bob/0001_01.png,110,40,180,120,Carl",
        "train/ann/0001_01.png,20,30,80,100,Ann",
        "train/ann/0002_01.png,90,10,140,70,",
    ]
    path.write_text("\n".join(lines) + "\n")
    gallery = tmp_path / "gallery"
    embed_boxes(corpus, gallery, [path], identity="auto", label_prefix="x-")
    expected = [("0001_01.png", "x-Ann"), ("0002_01.png", None), ("0001_01.png", "x-Carl"), ("0001_01.png", "x-Bob")]
    assert [(Path(row["uri"]).name, row["identity"]) for row in compare(gallery)] == expected
    summary = embed_boxes(corpus, gallery, [path], identity="auto", label_prefix="x-")
    assert (summary.skipped, summary.relabelled) == (3, 0)
    path.write_text("\n".join(lines).replace(",Ann", ",Zoe").replace(",Bob", ",Ben") + "\n")
    summary = embed_boxes(corpus, gallery, [path], identity="auto", label_prefix="x-")
    assert (summary.skipped, summary.relabelled) == (3, 1)
    labels = [row["identity"] for row in compare(gallery)]
    assert labels == ["x-Zoe", None, "x-Carl", "x-Bob"], "of several persons in a picture none is changed"
    assert any("several persons" in note for note in summary.notes)


def test_what_cannot_be_used_is_counted_and_images_become_rows(corpus: Path, tmp_path: Path) -> None:
    """Boxes without area or outside, lines of no image, images of no line, and what is listed twice."""
    path = tmp_path / "boxes.csv"
    lines = [
        "path,x,y,w,h",
        "ann/0001_01.png,20,30,0,70",
        "ann/0002_01.png,500,10,50,60",
        "bob/0001_01.png,15,20,50,60",
        "bob/0001_01.png,15,20,50,60",
        "bob/0009_01.png,15,20,50,60",
        "bob/0010_01.png,15,20,50,60",
        "bob/0001_01.png,110,40,70,nan",
        ",1,2,3,4",
    ]
    path.write_text("\n".join(lines) + "\n")
    Image.new("RGB", (50, 50)).save(corpus / "train/ann/0003_01.png")
    summary = embed_boxes(corpus, tmp_path / "gallery", [path])
    assert summary.statuses == {"ok": 1, "no_face": 3}
    found = {Path(row["uri"]).parent.name + Path(row["uri"]).stem: row for row in compare(tmp_path / "gallery")}
    assert found["ann0001_01"]["error"] == "its box in the list of boxes cannot be used"
    assert "lies outside the picture of 200x160" in found["ann0002_01"]["error"]
    assert found["ann0003_01"]["error"] is None
    assert summary.faces == 1
    notes = "\n".join(summary.notes)
    assert "names 3 of 4 images" in notes
    assert "1 images are not in the list" in notes
    assert f"2 images of '{path}' are not in the source ({path} line " in notes
    assert "3 lines of boxes cannot be used" in notes
    assert f"{path} line 2: a box of 0 x 70 pixels" in notes
    assert "1 lines of boxes say the same as another one" in notes
    again = embed_boxes(corpus, tmp_path / "other", [path], boxes_unlisted="none")
    assert again.statuses == {"ok": 1, "no_face": 3}
    found = {Path(row["uri"]).stem: row for row in compare(tmp_path / "other")}
    assert found["0003_01"]["error"] == "the list of boxes does not name it"


def test_images_of_no_line_are_detected(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "boxes.csv"
    path.write_text("bob/0001_01.png,110,40,180,120\n")
    summary = embed_boxes(corpus, tmp_path / "gallery", [path])
    assert (summary.images, summary.faces) == (3, 3)
    assert any("2 images are not in the list" in note and "boxes_unlisted=none" in note for note in summary.notes)


def test_a_list_that_fits_nothing_or_means_two_images_is_refused(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "boxes.csv"
    path.write_text("other/0001_01.png,1,1,40,40\n")
    with pytest.raises(SourceError, match=r"names none of the 3 images of the source, such as '.*0001_01\.png'"):
        embed_boxes(corpus, tmp_path / "gallery", [path])
    assert not (tmp_path / "gallery").exists(), "it is found before there is a gallery"
    path.write_text("0001_01.png,1,1,40,40\n0002_01.png,1,1,40,40\n")
    with pytest.raises(SourceError, match="and another image by one name"):
        embed_boxes(corpus, tmp_path / "gallery", [path])
    assert not rows(tmp_path / "gallery")
    # The folder of the photo in the list tells the two apart.
    path.write_text("0002_01.png,1,1,40,40\nbob/0001_01.png,1,1,40,40\nann/0001_01.png,1,1,40,40\n")
    assert embed_boxes(corpus, tmp_path / "gallery", [path]).faces == 3


def test_a_source_is_listed_until_a_list_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = []

    class Names:
        def __iter__(self) -> Iterator[WorkItem]:
            for number in range(300):
                listed.append(number)
                yield WorkItem(f"/photos/{number}.jpg", b"")

    class Lists:
        figures = ListFigures(["boxes.csv"])

        def __init__(self, named: str):
            self.named = named

        def find(self, uris: list[str]) -> np.ndarray:
            return np.array([0 if uri == self.named else -1 for uri in uris], np.int64)

    monkeypatch.setattr("facepipe.given.source._BATCH_ITEMS", 100)
    for named, count in (("/photos/3.jpg", 64), ("/photos/299.jpg", 300), ("/photos/100.jpg", 164)):
        listed.clear()
        require_named(Names(), Lists(named))  # type: ignore[arg-type]
        assert len(listed) == count
    with pytest.raises(
        SourceError, match=r"'boxes.csv' names none of the 300 images .* '/photos/0.jpg', '/photos/1.jpg'"
    ):
        require_named(Names(), Lists("/elsewhere/3.jpg"))  # type: ignore[arg-type]


def test_a_run_says_that_known_images_keep_their_faces_if_the_list_changed(corpus: Path, tmp_path: Path) -> None:
    lists = write_layouts(tmp_path / "lists", random.Random(0))["vggface2"]
    gallery = tmp_path / "gallery"

    def find_note(paths: list[Path]) -> str:
        notes = embed_boxes(corpus, gallery, paths).notes
        return next((note for note in notes if "keep their faces" in note), "")

    assert not find_note(lists), "no image was known"
    before = compare(gallery)
    assert not find_note(lists[::-1]), "the same lists in another order"
    copies = [path.rename(path.with_name(f"copy-{path.name}")) for path in lists]
    assert not find_note(copies), "the same lists under other names"
    with copies[0].open("a") as file:
        file.write('"ann/0001_01",1,1,40,40\n')
    assert "3 images were in the gallery already and keep their faces, which another list gave" in find_note(copies)
    assert compare(gallery) == before
    assert not find_note(copies), "it has been told"


def test_a_gallery_that_knows_no_lists_says_so(corpus: Path, tmp_path: Path) -> None:
    """Faces of a detector, and galleries of older versions, which did not note their lists."""
    lists = write_layouts(tmp_path / "lists", random.Random(0))["vggface2"]
    named = {"detect": {"model": "given-faces+fake-detector"}}
    embed(corpus, tmp_path / "gallery", FAKE, named, runner="inline")
    summary = embed_boxes(corpus, tmp_path / "gallery", lists)
    assert any("keep their faces, which this list may not have given" in note for note in summary.notes)


def test_the_contract_says_that_faces_are_given(corpus: Path, tmp_path: Path) -> None:
    """A gallery of a detector takes no given faces, and the other way round, unless the user says so."""
    lists = write_layouts(tmp_path / "lists", random.Random(0))["plain"]
    embed_boxes(corpus, tmp_path / "given", lists)
    assert Gallery(str(tmp_path / "given")).contract.detector == "given-faces+fake-detector"
    embed(corpus, tmp_path / "detected", FAKE, runner="inline")
    with pytest.raises(ContractError, match="detector"):
        embed_boxes(corpus, tmp_path / "detected", lists)
    with pytest.raises(ContractError, match="detector"):
        embed(corpus, tmp_path / "given", FAKE, runner="inline")
    named = {"detect": {"model": "given-faces+fake-detector"}}
    assert embed(corpus, tmp_path / "given", FAKE, named, runner="inline").skipped == 3


def test_boxes_of_stored_pixels_are_turned_with_the_picture(tmp_path: Path) -> None:
    """EXIF: a list of COCO says by its sizes in which frame it is, and a box beyond a side does, too."""
    pixels = np.full((100, 200, 3), 128, np.uint8)
    pixels[20:60, 130:180] = (220, 20, 20)
    displayed: dict[int, tuple[float, float, float, float]] = {}
    for orientation in range(1, 9):
        folder = tmp_path / str(orientation)
        folder.mkdir()
        picture = Image.fromarray(pixels)
        exif = picture.getexif()
        exif[0x0112] = orientation
        data = io.BytesIO()
        picture.save(data, "JPEG", quality=100, exif=exif)
        (folder / "1.jpg").write_bytes(data.getvalue())
        image = {"id": 1, "file_name": "1.jpg", "width": 200, "height": 100}
        annotation = {"id": 1, "image_id": 1, "bbox": [130, 20, 49, 39]}
        coco = {"images": [image], "annotations": [annotation]}
        (tmp_path / "boxes.json").write_text(json.dumps(coco))
        frame = "auto" if orientation >= 5 else "stored"
        source = {"boxes": str(tmp_path / "boxes.json"), "boxes_frame": frame}
        gallery = tmp_path / f"g{orientation}"
        embed(folder, gallery, FAKE, {"source": source}, runner="inline")
        (row,) = compare(gallery)
        assert row["det_score"] > 0.5, "the detector finds a face in the box"
        displayed[orientation] = tuple(row["box"])
        # The same without sizes.
        (tmp_path / "boxes.csv").write_text("1.jpg,130,20,179,59\n")
        source = {"boxes": str(tmp_path / "boxes.csv"), "boxes_frame": frame}
        embed(folder, tmp_path / f"c{orientation}", FAKE, {"source": source}, runner="inline")
        assert tuple(compare(tmp_path / f"c{orientation}")[0]["box"]) == displayed[orientation]
    assert displayed[1] == (130, 20, 179, 59)
    assert displayed[3] == (20, 40, 69, 79)
    assert displayed[6] == (40, 130, 79, 179)
    assert displayed[8] == (20, 20, 59, 69)
    image["width"] = 100
    (tmp_path / "boxes.json").write_text(json.dumps(coco))
    source = {"boxes": str(tmp_path / "boxes.json")}
    summary = embed(tmp_path / "1", tmp_path / "wrong", FAKE, {"source": source}, runner="inline")
    assert summary.statuses == {"no_face": 1}
    assert "is of a picture of 100x100, and this one has 200x100" in compare(tmp_path / "wrong")[0]["error"]


def test_workers_and_batches_do_not_change_the_rows(corpus: Path, tmp_path: Path) -> None:
    lists = write_layouts(tmp_path / "lists", random.Random(0))["vggface2"]
    source = {"source": {"boxes": tuple(map(str, lists[:1])), "identity": "folder"}}
    embed(corpus, tmp_path / "one", FAKE, source, runner="inline")
    embed(corpus, tmp_path / "two", FAKE, source, runner="local", workers=2, batch=1, block_smallest=1)
    assert compare(tmp_path / "one") == compare(tmp_path / "two")
    assert [path.name for path in (tmp_path / "two" / "runs").iterdir() if path.is_dir()] == []


@pytest.mark.slow
def test_ray_gives_the_rows_of_one_process(corpus: Path, tmp_path: Path) -> None:
    """Workers find the faces in the run's folder, also if others decode than detect."""
    lists = write_layouts(tmp_path / "lists", random.Random(0))["vggface2"]
    # Landmarks of some boxes are searched, and one image is in no list.
    lists[0].write_text("\n".join(lists[0].read_text().splitlines()[:-1]) + "\n")
    for name, settings in (
        ("one", {"runner": "inline"}),
        ("fused", {"runner": "ray", "block_smallest": 1}),
        ("split", {"runner": "ray", "layout": "split", "batch": 1, "block_smallest": 1}),
    ):
        source = {"source": {"boxes": tuple(map(str, lists))}}
        summary = embed(corpus, tmp_path / name, FAKE, source, **settings)
        assert summary.images == 3
        assert any(note.startswith("faces are given: ") for note in summary.notes)
    expected = compare(tmp_path / "one")
    assert compare(tmp_path / "fused") == expected
    assert compare(tmp_path / "split") == expected
    assert Gallery(str(tmp_path / "split")).contract.detector == "given-faces+fake-detector"


def test_a_gallery_in_a_store_takes_given_faces(corpus: Path, tmp_path: Path, bucket: Any) -> None:
    lists = write_layouts(tmp_path / "lists", random.Random(0))["vggface2"][:1]
    source = {"source": {"boxes": tuple(map(str, lists))}}
    embed(corpus, tmp_path / "local", FAKE, source, runner="inline")
    remote = "s3://faces/given"
    summary = embed(corpus, remote, FAKE, source, runner="local", workers=2, block_smallest=1)
    assert (summary.images, summary.faces) == (3, 4)
    assert compare(remote) == compare(tmp_path / "local")
    keys = [entry["Key"] for entry in bucket.list_objects_v2(Bucket="faces", Prefix="given/runs/").get("Contents", [])]
    assert not [key for key in keys if key.count("/") > 2], "the lists go with the run"
    lists[0].write_text("other/0001_01.png,1,1,40,40\n")
    with pytest.raises(SourceError, match="names none of the 3 images"):
        embed(corpus, "s3://faces/none", FAKE, source, runner="inline")
    assert "Contents" not in bucket.list_objects_v2(Bucket="faces", Prefix="none/")


def test_the_command_takes_lists_and_says_what_they_name(corpus: Path, tmp_path: Path) -> None:
    lists = write_layouts(tmp_path / "lists", random.Random(0))["vggface2"]
    words = ["embed", corpus, tmp_path / "gallery", "--boxes", lists[0], "--boxes", lists[1]]
    models = ["--detector", "fake-detector", "--embedder", "fake-embedder", "--runner", "inline"]
    code, _, errors = run_facepipe(*words, *models)
    assert code == 0
    assert "names 3 of 3 images" in errors
    code, _, errors = run_facepipe(*words, "--aligned")
    assert code == 2
    assert "leave --boxes out" in errors
    code, _, errors = run_facepipe("embed", corpus, tmp_path / "none", "--boxes", tmp_path / "absent.csv", *models)
    assert code == 1
    assert "no such list of boxes" in errors
    assert not (tmp_path / "none").exists()


def test_lists_of_real_faces_give_the_vectors_of_the_detector(shared: Path, tmp_path: Path) -> None:
    """LFW: with boxes and landmarks the vectors are the same; with boxes alone they are near."""
    folder = tmp_path / "lfw"
    people = sorted((shared / "data" / "lfw-dev" / "images").iterdir())[:6]
    for person in people:
        (folder / person.name).mkdir(parents=True)
        for path in person.iterdir():
            (folder / person.name / path.name).write_bytes(path.read_bytes())
    embed(folder, tmp_path / "detected", runner="inline")
    detected = rows(tmp_path / "detected")
    boxes = tmp_path / "boxes.csv"
    points = tmp_path / "points.csv"
    titles = ",".join(f"p{point}{axis}" for point in range(1, 6) for axis in "xy")
    names = ["/".join(row["uri"].split("/")[-2:]) for row in detected]
    lines = [f"{n},{','.join(map(str, row['box']))}" for n, row in zip(names, detected, strict=True)]
    boxes.write_text("path,x1,y1,x2,y2\n" + "\n".join(lines) + "\n")
    lines = [f"{n},{','.join(map(str, row['landmarks']))}" for n, row in zip(names, detected, strict=True)]
    points.write_text(f"path,{titles}\n" + "\n".join(lines) + "\n")
    for lists, tolerance in (([boxes, points], 1e-3), ([boxes], 0.2)):
        gallery = tmp_path / f"given{len(lists)}"
        embed(folder, gallery, {"source": {"boxes": tuple(map(str, lists))}}, runner="inline")
        given = {(row["uri"], *row["box"]): row for row in rows(gallery)}
        assert len(given) == len(detected)
        for row in detected:
            other = given[row["uri"], *row["box"]]
            assert np.linalg.norm(np.subtract(row["embedding"], other["embedding"])) < tolerance


def test_an_export_to_coco_embeds_again(corpus: Path, tmp_path: Path) -> None:
    """What facepipe writes as annotations gives the same faces and labels."""
    embed(corpus, tmp_path / "gallery", FAKE, {"source": {"identity": "folder"}}, runner="inline")
    code, _, errors = run_facepipe("export", tmp_path / "gallery", tmp_path / "out", "--format", "coco")
    assert code == 0, errors
    (annotations,) = (tmp_path / "out").glob("**/annotations.json")
    embed_boxes(corpus, tmp_path / "again", [annotations], identity="auto")
    columns = ("uri", "identity", "box", "landmarks", "det_score")
    before = [[row[name] for name in columns] for row in rows(tmp_path / "gallery")]
    after = [[row[name] for name in columns] for row in rows(tmp_path / "again")]
    assert sorted(map(str, before)) == sorted(map(str, after))
