"""`finish` on galleries: reports are made when they are due, and no image is lost."""

import csv
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import draw
from hard_faces import EASY, DlibLike, add_bystanders, make_hard_gallery
from helpers import run_facepipe

from facepipe.gallery import Contract, Gallery
from facepipe.schema import WORK_ITEM
from facepipe.sources import SourceConfig, open_source
from facepipe.stages import Read
from facepipe.text import restore_cell
from pipelines import clean, dedup
from pipelines.finish import FinishConfig, run

DLIB = Contract.from_models("retinaface-mnet025", "dlib-resnet", True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery of 30 persons with 8 photos each, bystanders in 40 of them, and one for tests with 3 of the persons."""
    folder = tmp_path_factory.mktemp("finish")
    space = DlibLike(4, EASY)
    centres = space.draw_centres(30)
    faces = space.draw(centres, np.repeat(np.arange(30), 8))
    faces = add_bystanders(faces, space.draw(space.draw_centres(40), np.arange(40)), np.arange(40))
    make_hard_gallery(folder / "g", faces, DLIB)
    make_hard_gallery(folder / "t", space.draw(centres, np.repeat(np.arange(3), 4)), DLIB, seed=9)
    return folder


def read_lists(folder: Path) -> dict[str, list[dict[str, str]]]:
    lists = {}
    for name in ("train", "rejected", "review"):
        with open(folder / f"{name}.csv", newline="", encoding="utf-8") as file:
            lists[name] = [{key: restore_cell(cell) for key, cell in row.items()} for row in csv.DictReader(file)]
    return lists


def check_lists(gallery: Path, folder: Path) -> dict[str, list[dict[str, str]]]:
    """Check that each image of a gallery is in exactly one list."""
    lists = read_lists(folder)
    places = Counter(row["path"] for rows in lists.values() for row in rows)
    assert places == Counter(set(Gallery(str(gallery)).to_arrow(["uri"])["uri"].to_pylist()))
    return lists


def test_every_image_of_a_gallery_is_in_one_list(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = run(FinishConfig(), str(made / "g"), str(tmp_path / "out"), [str(made / "t")])
    lists = check_lists(made / "g", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["train"] == summary.train > 100
    assert (summary.other_faces, summary.relabelled) == (40, 0)
    assert not {row["identity"] for row in lists["train"]} & {
        row["identity"] for row in Gallery(str(made / "t")).to_arrow(["identity"]).to_pylist()
    }
    assert summary.rejected["test gallery"] > 0
    # Reports that are up to date are not made again, and the lists are the same.
    before = (tmp_path / "out" / "train.csv").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(clean, "run", lambda *words: pytest.fail("clean ran again"))
        patch.setattr(dedup, "run", lambda *words: pytest.fail("dedup ran again"))
        run(FinishConfig(), str(made / "g"), str(tmp_path / "all"))
        assert not check_lists(made / "g", tmp_path / "all")["rejected"]
    run(FinishConfig(), str(made / "g"), str(tmp_path / "out"), [str(made / "t")])
    assert (tmp_path / "out" / "train.csv").read_bytes() == before


FAKES = ["--detector", "fake-detector", "--embedder", "fake-embedder", "--runner", "inline", "--quiet"]


@pytest.fixture(scope="module")
def photos(drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 drawings of three people with 0 to 2 faces, two copies, and a broken file; a gallery of them."""
    folder = tmp_path_factory.mktemp("photos")
    for path in sorted(drawings.rglob("*.png"))[::3]:
        (folder / "in" / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / "in" / path.parent.name / path.name)
    first = min((folder / "in" / "person2").iterdir())
    shutil.copyfile(first, folder / "in" / "person2" / "copy.png")
    shutil.copyfile(first, folder / "in" / "person1" / "copy.png")
    (folder / "in" / "person0" / "broken.jpg").write_bytes(b"no image")
    assert run_facepipe("embed", folder / "in", folder / "g", *FAKES)[0] in (0, 3)
    return folder


def run_finish(gallery: Any, out: Any, *words: Any) -> tuple[int, str, str]:
    settings = ["--set", "graph.threshold=0.3", "--quiet"]
    return run_facepipe("finish", gallery, out, *settings, *words)


def test_images_without_faces_broken_ones_and_copies(photos: Path, tmp_path: Path) -> None:
    code, out, err = run_finish(photos / "g", tmp_path / "out")
    assert (code, "broken" in err) == (0, False), err
    assert f"train list: {tmp_path}/out/train.csv" in out
    lists = check_lists(photos / "g", tmp_path / "out")
    reasons = {os.path.basename(row["path"]): row["reason"] for row in lists["rejected"]}
    assert reasons["broken.jpg"] == "cannot be read: decode_error"
    assert "no face was found" in reasons.values()
    assert (photos / "g" / "reports" / "clean" / "mark.json").exists()


def test_a_gallery_that_grew_is_judged_again(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "more")
    import cv2

    cv2.imwrite(str(tmp_path / "more" / "in" / "person1" / "new.png"), draw(31))
    words = ["embed", tmp_path / "more" / "in", tmp_path / "more" / "g", *FAKES]
    assert run_finish(tmp_path / "more" / "g", tmp_path / "out")[0] == 0
    assert run_facepipe(*words)[0] in (0, 3)
    assert run_finish(tmp_path / "more" / "g", tmp_path / "out")[0] == 0
    check_lists(tmp_path / "more" / "g", tmp_path / "out")
    images = pq.read_table(tmp_path / "more" / "g" / "reports" / "clean" / "images.parquet")
    assert len(images) == len(set(images["uri"].to_pylist()))


def test_files_of_somebody_else_and_the_gallery_as_its_test_are_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "review.csv").write_text("my,own\n1,2\n")
    code, _, err = run_finish(photos / "g", tmp_path / "out")
    assert (code, "choose another name" in err) == (2, True)
    assert sorted(os.listdir(tmp_path / "out")) == ["review.csv"]
    code, _, err = run_finish(photos / "g", tmp_path / "new", "--test", str(photos / "g") + "/")
    assert (code, "is the gallery itself" in err) == (2, True)


def test_lists_in_an_object_store(photos: Path, bucket: Any, tmp_path: Path) -> None:
    code, _, err = run_finish(photos / "g", "s3://faces/lists/", "--json")
    assert code == 0, err
    for name in ("train.csv", "rejected.csv", "review.csv", "summary.json"):
        bucket.download_file("faces", f"lists/{name}", str(tmp_path / name))
    check_lists(photos / "g", tmp_path)
    assert run_finish(photos / "g", "s3://faces/lists/")[0] == 0, "its own lists are replaced"
    assert not Path("s3:").exists()


def test_the_images_to_train_on_as_a_dataset(photos: Path, tmp_path: Path) -> None:
    """One command from a gallery to records: the images of the train list, byte by byte."""
    code, out, err = run_finish(photos / "g", tmp_path / "out", "--format", "rec")
    assert (code, f"{tmp_path}/out/dataset" in out) == (0, True), err
    listed = {row["path"]: row["identity"] for row in check_lists(photos / "g", tmp_path / "out")["train"]}
    with open(tmp_path / "out" / "dataset" / "labels.csv", newline="", encoding="utf-8") as file:
        names = {row["number"]: row["identity"] for row in csv.DictReader(file)}
    items = list(open_source(SourceConfig(str(tmp_path / "out" / "dataset" / "train.rec"))))
    read = Read()(pa.Table.from_pylist([{**item._asdict(), "previous": None} for item in items], WORK_ITEM))
    written = [(names[str(item.identity)], data) for item, data in zip(items, read["bytes"].to_pylist(), strict=True)]
    assert sorted(written) == sorted((name, Path(path).read_bytes()) for path, name in listed.items())
    assert written
    # Nothing is overwritten, and that is said before any work is done.
    before = (tmp_path / "out" / "train.csv").stat().st_mtime_ns
    code, _, err = run_finish(photos / "g", tmp_path / "out", "--format", "rec")
    assert (code, "name a new folder" in err) == (1, True)
    assert (tmp_path / "out" / "train.csv").stat().st_mtime_ns == before
    code, _, err = run_finish(photos / "g", "s3://faces/lists/", "--format", "webdataset")
    assert (code, "write the dataset to a disk" in err) == (1, True)
