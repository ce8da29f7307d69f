"""Counts per file: they are those of the rows whatever happened to the table, and only new files are read for them."""

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from bench.galleries import CONTRACT
from helpers import trials

from facepipe.erasure.requests import record_request
from facepipe.erasure.selection import Selection, read_time, select_images
from facepipe.gallery import Gallery, file_counts
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.parts import PartRecord, write_part
from facepipe.gallery.commits.rewrite import plan_rewrite_of_uris, read_rows, rewrite_files
from facepipe.gallery.file_counts import count_images, list_files_with, refresh_counts
from facepipe.gallery.maintenance.compact import CompactConfig, compact_files, plan_compaction
from facepipe.hashing import compute_face_id
from facepipe.observe.info import describe_gallery
from facepipe.schema import FACES, FAILED, NO_FACE, OK, STATUSES, WORK_ITEM, conform


def make_rows(rng: random.Random, first: int) -> pa.Table:
    """Draw rows of twenty images: of any status, with several faces or none."""
    columns: dict[str, list[Any]] = {name: [] for name in ("uri", "status", "error", "face_index", "face_id")}
    for number in range(first, first + 20):
        uri = f"/photos/{number:06d}.jpg"
        status = rng.choice([*STATUSES, OK, OK, NO_FACE])
        count = rng.randint(1, 3) if status == OK else 1
        for n in range(count):
            columns["uri"].append(uri)
            columns["status"].append(status)
            columns["error"].append("a reason" if status in FAILED else None)
            columns["face_index"].append(n if status == OK else None)
            columns["face_id"].append(compute_face_id(uri, "", n) if status == OK else None)
    return conform(pa.table({name: pa.array(values, FACES.field(name).type) for name, values in columns.items()}))


class History:
    """A gallery to which random things happen."""

    def __init__(self, path: Path, seed: int):
        self.gallery = Gallery.create(str(path), CONTRACT)
        self.commit = Committer(self.gallery, "run")
        self.rng = random.Random(seed)
        self.count = 0

    def reopen(self) -> Gallery:
        return Gallery(self.gallery.path)

    def add(self) -> None:
        rows = make_rows(self.rng, self.count)
        self.count += 20
        record = PartRecord(self.count)
        write_part(rows, WORK_ITEM.empty_table(), self.gallery.faces_folder, "run", record)
        self.commit([record], {})

    def delete(self) -> None:
        uris = [f"/photos/{self.rng.randrange(self.count):06d}.jpg" for _ in range(5)]
        plan = plan_rewrite_of_uris(uris, lambda rows, mask: rows.filter(pc.invert(mask)))
        self.commit.commit_actions(lambda: list(rewrite_files(self.reopen(), plan)), {})

    def compact(self) -> None:
        gallery = self.reopen()
        compact_files(gallery, plan_compaction(gallery, CompactConfig(fewest=2)), self.commit)

    def hide(self) -> None:
        gallery = self.reopen()
        selection = Selection(images=(f"/photos/{self.rng.randrange(self.count):06d}.jpg",))
        record_request(gallery, selection, select_images(gallery, selection), requested=read_time(), may_return=True)

    def refresh(self) -> None:
        refresh_counts(self.reopen())


@pytest.mark.parametrize("seed", trials(8))
def test_counts_are_those_of_the_rows(tmp_path: Path, seed: int) -> None:
    history = History(tmp_path / "g", seed)
    for _ in range(12):
        history.add()
        history.rng.choice([history.add, history.delete, history.compact, history.hide, history.refresh])()
        gallery = history.reopen()
        assert count_images(gallery) == gallery.counts()
        rows = gallery.to_arrow(["status"])
        failed = pc.sum(pc.is_in(rows["status"], value_set=pa.array(FAILED))).as_py() or 0
        errors = describe_gallery(gallery)["errors"]
        assert sum(error["images"] for error in errors) == failed


def test_only_new_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = History(tmp_path / "g", 0)
    for _ in range(5):
        history.add()
    assert refresh_counts(history.reopen()) == 5
    assert refresh_counts(history.reopen()) == 0
    history.add()
    read: list[str] = []

    def note(gallery: Gallery, path: str, columns: Any) -> pa.Table:
        read.append(path)
        return read_rows(gallery, path, columns)

    monkeypatch.setattr(file_counts, "read_rows", note)
    monkeypatch.setattr(Gallery, "counts", lambda gallery: pytest.fail("all rows were counted"))
    count_images(history.reopen())
    assert len(read) == 1
    assert refresh_counts(history.reopen()) == 1
    history.compact()
    assert refresh_counts(history.reopen()) == 1


@pytest.mark.parametrize("data", [b"", b"no parquet", None])
def test_without_the_counts_all_is_counted(tmp_path: Path, data: bytes | None) -> None:
    history = History(tmp_path / "g", 0)
    history.add()
    history.refresh()
    path = tmp_path / "g" / "runs" / "counts.parquet"
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)
    gallery = history.reopen()
    assert count_images(gallery) == gallery.counts()
    assert list_files_with(gallery, FAILED) == gallery.list_paths()
    assert refresh_counts(gallery) == 1


def test_the_counts_hold_nothing_of_an_image(tmp_path: Path) -> None:
    history = History(tmp_path / "g", 0)
    history.add()
    history.refresh()
    assert b"photos" not in (tmp_path / "g" / "runs" / "counts.parquet").read_bytes()
