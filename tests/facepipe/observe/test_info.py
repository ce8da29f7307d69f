"""The images that failed, by name: a few on the terminal, all in a list that `embed` reads."""

import csv
import json
from pathlib import Path

import cv2
import pytest
from conftest import draw
from helpers import embed
from typer.testing import CliRunner

from facepipe.errors import ConfigError, StorageError
from facepipe.gallery import Gallery
from facepipe.observe.info import iterate_failed, write_failed
from facepipe.text import restore_cell
from jobs.cli import app

FAKES = {
    "detect": {"model": "fake-detector"},
    "embed": {"model": "fake-embedder"},
    "run": {"runner": "inline"},
    "source": {"identity": "none"},
}
BROKEN = ("=1+1.jpg", "[bold]x.jpg", "名.jpg", "a,b'\".jpg", "-x.jpg")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for n in range(3):
        cv2.imwrite(str(folder / f"{n}.png"), draw(n, 48))
    for name in BROKEN:
        (folder / name).write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def gallery(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    path = tmp_path_factory.mktemp("galleries") / "g"
    embed(photos, path, FAKES)
    return Gallery(str(path))


def test_the_list_holds_each_image_that_failed_and_no_other(gallery: Gallery, photos: Path, tmp_path: Path) -> None:
    expected = {str(photos / name) for name in BROKEN}
    assert {row["uri"] for row in iterate_failed(gallery)} == expected
    path = tmp_path / "failed.csv"
    assert write_failed(gallery, str(path)) == len(BROKEN)
    with open(path, encoding="utf-8", newline="") as file:
        listed = list(csv.DictReader(file))
    assert {restore_cell(row["path"]) for row in listed} == expected
    assert {row["status"] for row in listed} == {"decode_error"}
    assert all(row["error"] for row in listed)
    # `embed` reads it: the same images, and none twice.
    summary = embed(path, tmp_path / "again", FAKES)
    assert (summary.listed, summary.failed) == (len(BROKEN), len(BROKEN))


def test_a_list_that_cannot_be_written_is_an_error(gallery: Gallery, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot write the list"):
        write_failed(gallery, str(tmp_path / "none" / "failed.csv"))


def test_a_file_of_somebody_else_is_not_replaced(gallery: Gallery, tmp_path: Path) -> None:
    for content in (b"path,label\n", b"", b"\xff\xd8"):
        (tmp_path / "mine.csv").write_bytes(content)
        with pytest.raises(ConfigError, match="is no list of path, status, error"):
            write_failed(gallery, str(tmp_path / "mine.csv"))
        assert (tmp_path / "mine.csv").read_bytes() == content
    for _ in range(2):
        assert write_failed(gallery, str(tmp_path / "failed.csv")) == len(BROKEN)


def test_info_names_them(gallery: Gallery, tmp_path: Path) -> None:
    def run(*words: str) -> str:
        result = CliRunner().invoke(app, ["info", gallery.path, *words])
        assert result.exit_code == 0, result.output
        return result.stdout

    text = run("--failed")
    assert all(name in text for name in BROKEN), "whole, brackets and all"
    assert "there are more" not in text
    assert "there are more" in run("--failed", "-n", "2")
    shown = json.loads(run("--failed", "-n", "2", "--json"))
    assert (len(shown["images"]), shown["more"]) == (2, True)
    path = str(tmp_path / "failed.csv")
    assert run("--failed-list", path) == f"{len(BROKEN)} images failed: {path} lists them\n"
