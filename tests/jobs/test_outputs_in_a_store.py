"""Every command that writes a file where the user says writes it to an object store as well, and nothing beside it."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from helpers import run_facepipe

from facepipe.gallery import Gallery

FAKES = ["--detector", "fake-detector", "--embedder", "fake-embedder", "--runner", "inline", "--quiet"]


@pytest.fixture(scope="module")
def photos(drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery of 14 drawings of people, with an index, and of a broken file."""
    root = tmp_path_factory.mktemp("store")
    for path in sorted(drawings.rglob("*.png"))[::4]:
        (root / "in" / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, root / "in" / path.parent.name / path.name)
    (root / "in" / "person0" / "broken.jpg").write_bytes(b"no image")
    run_facepipe("embed", root / "in", root / "g", *FAKES)
    assert run_facepipe("index", root / "g", "--quiet")[0] == 0
    return root


@pytest.fixture
def read(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], bytes]:
    """Return a function that reads an object. Commands run in an empty folder, in which nothing may appear."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def read_object(key: str) -> bytes:
        assert not list((tmp_path / "here").iterdir()), "nothing was written beside it"
        return bytes(bucket.get_object(Bucket="faces", Key=key)["Body"].read())

    return read_object


def test_search_and_identify(photos: Path, read: Callable[[str], bytes]) -> None:
    code, _, err = run_facepipe("search", photos / "g", photos / "in", "s3://faces/o/hits.parquet", "--quiet")
    assert code == 0, err
    assert read("o/hits.parquet").startswith(b"PAR1")
    words = ["--threshold", "0.3", "--quiet", "--page", "s3://faces/o/who.html"]
    code, _, err = run_facepipe("identify", photos / "g", photos / "in", "s3://faces/o/who.csv", *words)
    assert code == 0, err
    assert read("o/who.csv").count(b"\n") > 10
    assert read("o/who.html").startswith(b"<!doctype html>")


def test_export(photos: Path, read: Callable[[str], bytes], bucket: Any) -> None:
    code, _, err = run_facepipe("export", photos / "g", "s3://faces/out/", "--columns", "face_id,uri")
    assert code == 0, err
    table = pq.read_table(io.BytesIO(read("out/part-0.parquet")))
    assert sorted(table["uri"].to_pylist()) == sorted(Gallery(str(photos / "g")).to_arrow(["uri"])["uri"].to_pylist())
    code, _, err = run_facepipe("export", photos / "g", "s3://faces/out")
    assert (code, "is not an empty folder" in err) == (1, True)
    code, _, err = run_facepipe("export", photos / "g", "s3://no-such-bucket/out")
    assert (code, "no-such-bucket" in err) == (1, True)
    code, _, err = run_facepipe("export", photos / "g", "rows.csv")
    assert (code, "folder of Parquet files" in err) == (2, True)


def test_lists_of_failed_images_and_pairs(photos: Path, read: Callable[[str], bytes]) -> None:
    code, _, err = run_facepipe("info", photos / "g", "--failed-list", "s3://faces/o/failed.csv")
    assert code == 0, err
    assert b"broken.jpg,decode_error" in read("o/failed.csv")
    words = ["--draw", "20", "--write", "s3://faces/o/pairs.csv"]
    code, _, err = run_facepipe("evaluate", "pairs", photos / "g", *words)
    assert code == 0, err
    assert read("o/pairs.csv").count(b"\n") == 21


def test_pictures(photos: Path, read: Callable[[str], bytes]) -> None:
    pytest.importorskip("matplotlib")
    code, _, err = run_facepipe("evaluate", "pairs", photos / "g", "--draw", "20", "--picture", "s3://faces/o/roc.png")
    assert code == 0, err
    assert read("o/roc.png").startswith(b"\x89PNG")
    code, _, err = run_facepipe("evaluate", "index", photos / "g", "--picture", "s3://faces/o/recall.png")
    assert code == 0, err
    assert read("o/recall.png").startswith(b"\x89PNG")
