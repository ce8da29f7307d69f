"""Decisions in an object store, after a power cut, and after a writer that was paused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from decided import FAKES, is_person, list_ids, make_gallery
from helpers import embed
from powercut import CUTS, SyncedState

from facepipe.decisions import add_decisions, read_decisions, undo_decisions
from facepipe.decisions.apply import apply_files
from facepipe.decisions.export import export_decisions
from facepipe.decisions.table import DecisionTable, hold_decisions, verify_table
from facepipe.erasure.proof import check_erased
from facepipe.erasure.receipt import load_receipt
from facepipe.erasure.selection import Selection
from facepipe.errors import GalleryBusyError
from facepipe.gallery import Gallery
from pipelines import erase


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gallery(tmp_path_factory.mktemp("places"), images=6)


@pytest.fixture
def gallery(embedded: Path, tmp_path: Path) -> Gallery:
    shutil.copytree(embedded, tmp_path / "gallery")
    return Gallery(str(tmp_path / "gallery"))


def test_decisions_in_an_object_store(bucket: Any, embedded: Path, tmp_path: Path) -> None:
    embed(embedded.parent / "source", "s3://faces/gallery", FAKES)
    gallery = Gallery("s3://faces/gallery")
    ids = list_ids(gallery)
    added = add_decisions(gallery, [is_person(ids[0], "Ann"), is_person(ids[3], "Bob")])
    assert added.is_applied
    undo = undo_decisions(gallery, added.added_ids[:1])
    undo_decisions(gallery, undo.added_ids)
    assert len(read_decisions(gallery)) == 2
    assert export_decisions(gallery, "s3://faces/export.jsonl") == 4
    assert verify_table(gallery.path) == (4, [])
    uri = gallery.to_arrow(["uri"], f"face_id = {ids[0]}")["uri"][0].as_py()
    summary = erase.run(Selection(images=(uri,)), gallery.path)
    left = read_decisions(gallery.path)
    assert left.confirmed.person.to_pylist() == ["Bob"]
    assert check_erased(Gallery(gallery.path), load_receipt(summary.receipts[0])) == []
    assert add_decisions(gallery.path, [{"decision": "keep", "face_id": str(ids[3])}]).is_applied


def test_after_a_power_cut_a_decision_is_there_or_not(
    gallery: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = list_ids(gallery)
    root = Path(gallery.path)
    state = SyncedState(root)
    cuts: list[tuple[Path, int]] = []

    def cut() -> None:
        for kind in CUTS:
            folder = tmp_path / f"cut{len(cuts)}"
            state.cut(folder, kind)
            cuts.append((folder, returned))

    returned = 0
    state.on_sync = cut
    with state.watch(monkeypatch):
        for number in range(2):
            assert add_decisions(str(root), [is_person(ids[number], f"P{number}")]).is_applied
            returned += 1
            cut()
    assert len(cuts) > 10
    for folder, least in cuts:
        table = DecisionTable(str(folder))
        assert least <= table.rows <= least + 1
        assert table.read().num_rows == table.rows
        assert verify_table(str(folder))[1] == []
    # What was cut off can be added again.
    assert add_decisions(str(cuts[0][0]), [is_person(ids[0], "P0"), is_person(ids[1], "P1")]).is_applied


def test_a_writer_that_was_paused_cannot_commit_what_was_deleted(gallery: Gallery) -> None:
    ids = list_ids(gallery)
    add_decisions(gallery, [is_person(ids[0], "Ann")])
    rows = DecisionTable(gallery.path).read()
    with hold_decisions(gallery.path) as paused:
        # Its lease is taken over meanwhile, as after a sleep of minutes.
        lock = Path(gallery.path) / "decisions" / ".lock"
        lock.write_text("{}")
        with hold_decisions(gallery.path) as writer:
            writer.delete_unreferenced()
        with pytest.raises(GalleryBusyError):
            paused.append(rows)
    assert verify_table(gallery.path) == (1, [])


def test_a_damaged_table_is_named(gallery: Gallery) -> None:
    add_decisions(gallery, [is_person(list_ids(gallery)[0], "Ann")])
    table = DecisionTable(gallery.path)
    (Path(table.folder) / table.files[0].path).unlink()
    assert "cannot be read" in verify_table(gallery.path)[1][0]
    (Path(table.folder) / "_delta_log" / f"{0:020}.json").write_text("{")
    assert "cannot be read" in verify_table(gallery.path)[1][0]


def test_real_photos_elsewhere_keep_their_decisions(portraits: Path, tmp_path: Path) -> None:
    shutil.copytree(portraits, tmp_path / "old")
    embed(tmp_path / "old", tmp_path / "gallery")
    old = Gallery(str(tmp_path / "gallery"))
    # Two faces of one photo, by their place in it.
    table = old.to_arrow(["face_id", "uri", "box"], "face_id is not null").to_pylist()
    two = sorted((row for row in table if row["uri"].endswith("two.jpg")), key=lambda row: row["box"][0])
    one = next(row for row in table if row["uri"].endswith("one.jpg"))
    assert len(two) == 2
    rows = [
        is_person(one["face_id"], "Grace Hopper"),
        {"decision": "is", "person": "Grace Hopper", "uri": two[0]["uri"], "box": two[0]["box"]},
        {"decision": "ignore", "face_id": str(two[1]["face_id"])},
    ]
    assert add_decisions(old, rows).is_applied
    assert export_decisions(old, str(tmp_path / "export.csv")) == 3
    # At another place the ids are others.
    shutil.copytree(portraits, tmp_path / "new")
    embed(tmp_path / "new", tmp_path / "again")
    new = Gallery(str(tmp_path / "again"))
    summary = apply_files(new, [str(tmp_path / "export.csv")])
    assert summary.problems == []
    decisions = read_decisions(new)
    found = {row["face_id"]: row for row in new.to_arrow(["face_id", "uri", "box"], "face_id is not null").to_pylist()}
    assert {Path(found[face]["uri"]).name for face in decisions.confirmed.face_id.tolist()} == {"one.jpg", "two.jpg"}
    (ignored,) = decisions.ignored.tolist()
    assert Path(found[ignored]["uri"]).name == "two.jpg"
    assert found[ignored]["box"][0] == pytest.approx(two[1]["box"][0], abs=5)
