"""Nights of a gallery whose touched and missing images are kept apart from its rows."""

import os
from pathlib import Path
from typing import Any

import cv2
import pytest
from conftest import draw
from helpers import embed, rows

from facepipe.erasure.limits import ErasureLimit
from facepipe.erasure.proof import check_erased
from facepipe.erasure.receipt import load_receipt
from facepipe.erasure.selection import Selection
from facepipe.gallery import Gallery
from facepipe.gallery.commits import rewrite as rewrites
from facepipe.gallery.maintenance.compact import CompactConfig
from facepipe.gallery.maintenance.verify import verify_gallery
from facepipe.gallery.marks import FOLDER
from pipelines import erase
from pipelines.compact import run as compact

MARK = {"missing": {"policy": "mark", "at_most": 0.9}}


@pytest.fixture(autouse=True)
def always_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep changes apart however small the table is."""
    monkeypatch.setattr(rewrites, "_SPARED_FROM_BYTES", 0)
    monkeypatch.setattr(rewrites, "_SPARED_SHARE", 1.0)


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    root = tmp_path / "images"
    root.mkdir()
    files = [root / f"{n:02d}.png" for n in range(10)]
    for n, file in enumerate(files):
        cv2.imwrite(str(file), draw(n + 1))
    return files


def list_files(gallery: Path) -> set[str]:
    return {file["path"] for file in Gallery(gallery).files()}


def read_missing(gallery: Path) -> set[str]:
    found = Gallery(gallery).to_arrow(["uri"], "missing_since is not null")
    return {Path(uri).name for uri in found["uri"].to_pylist()}


def test_nights_without_a_rewrite(corpus: list[Path], fakes: dict[str, Any], tmp_path: Path) -> None:
    gallery = tmp_path / "g"
    embed(corpus[0].parent, gallery, fakes, MARK)
    before = rows(gallery, ("ingested_at", "fingerprint", "missing_since"))
    files = list_files(gallery)
    # Some files are touched, two go away.
    for file in corpus[:4]:
        os.utime(file, (1, 1))
    bytes_of_missing = {file: file.read_bytes() for file in corpus[4:6]}
    for file in bytes_of_missing:
        file.unlink()
    night = embed(corpus[0].parent, gallery, fakes, MARK)
    assert (night.images, night.rows, night.missing) == (4, 0, 2)
    assert list_files(gallery) == files
    assert read_missing(gallery) == {"04.png", "05.png"}
    assert len(Gallery(gallery).marks) == 6
    # The next night knows the new times, and marks nothing twice.
    night = embed(corpus[0].parent, gallery, fakes, MARK)
    assert (night.images, night.missing, night.skipped) == (0, 0, 8)
    # One comes back as it was, and one with another picture.
    corpus[4].write_bytes(bytes_of_missing[corpus[4]])
    cv2.imwrite(str(corpus[5]), draw(40))
    night = embed(corpus[0].parent, gallery, fakes, MARK)
    assert night.images == 2
    assert read_missing(gallery) == set()
    kept = [row for row in rows(gallery, ("ingested_at", "fingerprint", "missing_since")) if "05.png" not in row["uri"]]
    assert kept == [row for row in before if "05.png" not in row["uri"]]
    assert embed(corpus[0].parent, gallery, fakes, MARK).images == 0
    # Folded into the rows, other programs see them as well.
    known = rows(gallery)
    summary = compact(CompactConfig(), str(gallery), everything=True)
    assert summary.joined or summary.folded
    assert rows(gallery) == known
    assert Gallery(gallery).marks_file is None
    assert verify_gallery(Gallery(gallery)).problems == []
    assert embed(corpus[0].parent, gallery, fakes, MARK).images == 0


def test_an_erasure_leaves_no_mark(corpus: list[Path], fakes: dict[str, Any], tmp_path: Path) -> None:
    gallery = tmp_path / "g"
    embed(corpus[0].parent, gallery, fakes, MARK)
    for file in corpus[:3]:
        file.unlink()
    os.utime(corpus[5], (1, 1))
    embed(corpus[0].parent, gallery, fakes, MARK)
    assert len(Gallery(gallery).marks) == 4
    summary = erase.run(Selection(missing=True), str(gallery), limit=ErasureLimit(1.0))
    assert summary.images == 3
    left = {Path(row["uri"]).name for row in rows(gallery)}
    assert left == {file.name for file in corpus[3:]}
    assert summary.receipts
    for path in summary.receipts:
        assert check_erased(Gallery(gallery), load_receipt(path)) == []
    # Neither the present file of marks nor an older one names them.
    for file in (gallery / "faces" / FOLDER).iterdir():
        assert all(name.name.encode() not in file.read_bytes() for name in corpus[:3])
    assert len(list((gallery / "faces" / FOLDER).iterdir())) <= 1
    assert verify_gallery(Gallery(gallery)).problems == []
    # What was touched is still known by its new time, or was folded in.
    assert embed(corpus[0].parent, gallery, fakes, MARK).images == 0
