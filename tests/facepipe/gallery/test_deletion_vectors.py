"""Deletion vectors: rows that files hold and the table does not. Every reader leaves them out, until they are purged."""

import copy
import random
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import DeltaTable
from helpers import trials
from histories import History, open_as_stock, read_as_stock, read_values
from powercut import CUTS, SyncedState

from facepipe.errors import GalleryError
from facepipe.gallery import Gallery
from facepipe.gallery.changes import PartialGallery, ReadMark, find_changes
from facepipe.gallery.commits import log
from facepipe.gallery.commits import rewrite as rewrites
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.rewrite import plan_rewrite_of_uris, rewrite_files
from facepipe.gallery.deletion_vectors import FEATURE, RowChoice, decode_rows, encode_rows
from facepipe.gallery.maintenance.purge import find_due_files, purge_files
from facepipe.gallery.maintenance.vacuum import claim_unreferenced, delete_files, delete_history
from facepipe.gallery.maintenance.verify import verify_gallery
from facepipe.schema import FACES
from facepipe.storage.conditional import ConflictError
from facepipe.storage.lease import hold_lease

ORDER = [("uri", "ascending"), ("face_index", "ascending")]


@pytest.fixture(autouse=True)
def always_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare files however small they are."""
    monkeypatch.setattr(rewrites, "_SPARED_FROM_BYTES", 0)
    monkeypatch.setattr(rewrites, "_SPARED_SHARE", 1.0)
    monkeypatch.setattr(rewrites, "_MOST_DELETED", 0.5)


def make_history(path: str | Path, seed: int = 1, images: int = 8) -> History:
    history = History(path, seed)
    for folder in "ab":
        history.add([f"/{folder}/{n}.jpg" for n in range(images)])
    return history


# ---- the format


@pytest.mark.parametrize("seed", range(12))
def test_any_rows_are_decoded_as_they_were_encoded(seed: int) -> None:
    rng = np.random.default_rng(seed)
    limit = int(rng.choice([1, 10, 5_000, 70_000, 300_000]))
    rows = np.flatnonzero(rng.random(limit) < rng.choice([0.001, 0.1, 0.9, 1.0]))
    descriptor = encode_rows(rows)
    np.testing.assert_array_equal(decode_rows(descriptor), rows)
    assert descriptor["cardinality"] == len(rows)
    assert descriptor["pathOrInlineDv"].isascii()


def test_deltalake_decodes_what_is_encoded(tmp_path: Path) -> None:
    """Of containers of few rows, of many, and beyond the first 65,536."""
    history = make_history(tmp_path / "g", images=4)
    gallery = Gallery(history.gallery.path)
    file = gallery.files()[0]
    rng = np.random.default_rng(0)
    few = np.flatnonzero(rng.random(70_000) < 0.01)
    many = np.flatnonzero(rng.random(200_000) < 0.5)
    for rows in (few, many):
        deletion = rewrites.DeleteRows(
            file["path"], file["size_bytes"], '{"numRecords":200000}', rows, 0, pa.array([""]), True
        )
        history.commit.commit_actions(lambda deletion=deletion: [deletion], {})  # type: ignore[misc]
        vectors = pa.table(open_as_stock(gallery).deletion_vectors().read_all())
        np.testing.assert_array_equal(np.flatnonzero(~np.asarray(vectors["selection_vector"][0].values)), rows)
        np.testing.assert_array_equal(Gallery(gallery.path).deleted_rows[file["path"]], rows)


@pytest.mark.parametrize(
    "change",
    [
        {"storageType": "u"},
        {"cardinality": 5},
        {"pathOrInlineDv": "0" * 50},
        {"pathOrInlineDv": "~" * 50},
        {"pathOrInlineDv": "abc"},
        {"sizeInBytes": 9},
    ],
)
def test_a_vector_that_is_not_ours_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(GalleryError):
        decode_rows(encode_rows(np.arange(3)) | change)


def test_rows_are_chosen_across_batches() -> None:
    table = pa.table({"n": range(100)})
    rows = np.array([0, 7, 8, 50, 99])
    for size in (1, 8, 30, 200):
        batches = table.to_batches(size)
        kept = [
            n for batch in RowChoice(rows, is_kept=True).filter_batches(iter(batches)) for n in batch["n"].to_pylist()
        ]
        others = [n for batch in RowChoice(rows).filter_batches(iter(batches)) for n in batch["n"].to_pylist()]
        assert kept == rows.tolist()
        assert others == sorted(set(range(100)) - set(kept))


# ---- readers


def test_other_programs_read_the_same_rows(tmp_path: Path) -> None:
    history = make_history(tmp_path / "g")
    history.relabel(["/a/1.jpg", "/b/2.jpg"])
    history.add(["/a/3.jpg", "/a/1.jpg"], replaced=["/a/3.jpg", "/a/1.jpg"])
    gallery = Gallery(history.gallery.path)
    assert sum(map(len, gallery.deleted_rows.values())) == 8
    # Marks aside, all columns are the same.
    columns = [name for name in FACES.names if name not in ("fingerprint", "missing_since")]
    expected = gallery.to_arrow(columns).sort_by(ORDER)
    assert read_as_stock(gallery).select(columns).sort_by(ORDER).equals(expected)
    lazy = pl.scan_delta(gallery.faces_folder)
    frame = lazy.sort("uri", "face_index").collect()
    assert frame.select(columns).to_arrow().cast(expected.schema).equals(expected)
    pandas = read_as_stock(gallery).to_pandas()
    assert sorted(pandas["face_id"]) == sorted(expected["face_id"].to_pylist())
    faces = read_as_stock(gallery)  # noqa: F841 (DuckDB finds it by its name)
    names = duckdb.sql("SELECT uri, face_index, identity FROM faces ORDER BY ALL").fetchall()
    assert names == list(zip(*(expected[name].to_pylist() for name in ("uri", "face_index", "identity")), strict=True))
    assert duckdb.sql("SELECT count(*) FROM frame").fetchall() == [(expected.num_rows,)]
    # Filters by columns whose ranges or nulls the log has.
    assert lazy.filter(pl.col("identity").is_null()).collect().height == len(
        gallery.to_arrow(["uri"], "identity is null")
    )
    assert lazy.select(pl.col("face_id").count()).collect().item() == gallery.count_totals().faces
    # What cannot read such a table says so.
    with pytest.raises(Exception, match=FEATURE):
        DeltaTable(gallery.faces_folder).to_pyarrow_dataset()
    with pytest.raises(GalleryError, match="compact --all"):
        gallery.dataset()


def test_a_table_without_deleted_rows_becomes_plain_again(tmp_path: Path) -> None:
    history = make_history(tmp_path / "g")
    first = DeltaTable(history.gallery.faces_folder)
    history.relabel(["/a/1.jpg"])
    history.commit.drop_deletion_vectors()
    assert Gallery(history.gallery.path).has_deletion_vectors, "there are deleted rows"
    gallery = Gallery(history.gallery.path)
    purge_files(gallery, find_due_files(gallery, 30, everything=True), history.commit)
    history.commit.drop_deletion_vectors()
    table = DeltaTable(gallery.faces_folder)
    assert table.protocol() == first.protocol()
    assert table.metadata().configuration == first.metadata().configuration
    assert table.to_pyarrow_table().num_rows == 32
    history.check()
    # It can have them once more, also in the same run.
    history.relabel(["/b/1.jpg"])
    history.check()
    assert Gallery(gallery.path).deleted_rows


def test_no_file_is_written_anew_until_many_rows_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrites, "_SPARED_SHARE", 0.2)
    monkeypatch.setattr(rewrites, "_MOST_DELETED", 0.3)
    history = make_history(tmp_path / "g")
    files = set(Gallery(history.gallery.path).list_paths())
    history.relabel(["/a/1.jpg"])
    history.relabel(["/a/2.jpg"])
    assert files < set(Gallery(history.gallery.path).list_paths())
    history.relabel(["/a/3.jpg"])
    gallery = Gallery(history.gallery.path)
    assert len(files.intersection(gallery.list_paths())) == 1
    assert not gallery.deleted_rows
    history.check()


# ---- histories


def test_changes_between_versions_are_found_whatever_is_spared(tmp_path: Path) -> None:
    """What is new and what is gone, as two whole versions tell."""
    for seed in trials(12):
        history = make_history(tmp_path / str(seed), seed, images=6)
        for _ in range(4):
            gallery = Gallery(history.gallery.path)
            mark = ReadMark.from_gallery(gallery)
            before = gallery.to_arrow(["face_id", "ingested_at"])
            for _ in range(history.rng.randint(1, 4)):
                history.happen()
                fill(history)
            after = Gallery(history.gallery.path)
            changes = find_changes(after, mark)
            new = {face for batch in changes.read_new_rows(["face_id"]) for face in batch["face_id"].to_pylist()}
            ids = set(after.to_arrow(["face_id"])["face_id"].to_pylist())
            assert new == ids - set(before["face_id"].to_pylist())
            deleted = changes.find_deleted_ids()
            assert deleted is not None
            assert set(deleted.tolist()) == set(before["face_id"].to_pylist()) - ids
            assert after.has_files_of(mark.version) == changes.is_empty


def test_an_older_version_keeps_its_rows(tmp_path: Path) -> None:
    history = make_history(tmp_path / "g")
    versions = {}
    for step in range(6):
        versions[Gallery(history.gallery.path).version] = copy.deepcopy(history.expected)
        history.relabel(history.choose()) if step % 2 else history.add(chosen := history.choose(), replaced=chosen)
    for version, expected in versions.items():
        assert read_values(Gallery(history.gallery.path, version).to_arrow()) == expected


def test_a_reader_goes_on_after_the_log_was_cleaned(tmp_path: Path) -> None:
    history = make_history(tmp_path / "g")
    history.relabel(["/a/1.jpg"])
    expected = copy.deepcopy(history.expected)
    gallery = Gallery(history.gallery.path)
    history.relabel(["/a/2.jpg"])
    with hold_lease(gallery.path) as lease:
        delete_history(Gallery(gallery.path), lease)
    assert read_values(gallery.to_arrow()) == expected
    history.check()


def test_a_checkpoint_holds_the_vectors(tmp_path: Path) -> None:
    history = make_history(tmp_path / "g")
    history.relabel(["/a/1.jpg"])
    log.write_checkpoint(history.gallery.faces_folder)
    history.relabel(["/a/2.jpg", "/b/1.jpg"])
    history.check()
    with hold_lease(history.gallery.path) as lease:
        delete_history(Gallery(history.gallery.path), lease)
    history.check()
    history.add(["/a/1.jpg"], replaced=["/a/1.jpg"])
    history.erase(["/a/2.jpg", "/b/1.jpg"])
    history.check()


def test_what_is_erased_is_nowhere(tmp_path: Path) -> None:
    """Rows under an earlier label or content are on disk until they are purged, and an erasure does not wait for that."""
    history = make_history(tmp_path / "g")
    history.relabel(["/a/1.jpg"])
    history.add(["/a/1.jpg"], replaced=["/a/1.jpg"])
    gallery = Gallery(history.gallery.path)
    held = pa.Table.from_batches(gallery.batches(["uri", "identity"], with_deleted=True))
    assert pc.sum(pc.equal(held["uri"], "/a/1.jpg")).as_py() == 4
    history.erase(["/a/1.jpg"])
    with hold_lease(gallery.path) as lease:
        delete_files(claim_unreferenced(gallery.path, lease), lease)
        delete_history(Gallery(gallery.path), lease)
    history.check()
    for path in Path(gallery.path).rglob("*"):
        assert not path.is_file() or b"/a/1.jpg" not in path.read_bytes()


def test_verify_reads_files_with_deleted_rows(tmp_path: Path) -> None:
    history = make_history(tmp_path / "g")
    history.relabel(["/a/1.jpg"])
    history.add(["/b/1.jpg"], replaced=["/b/1.jpg"])
    gallery = Gallery(history.gallery.path)
    result = verify_gallery(gallery)
    assert result.problems == []
    assert (result.images, result.faces) == (16, 32)
    file = next(file for file in gallery.files() if file["path"] in gallery.deleted_rows)
    beyond = rewrites.DeleteRows(
        file["path"], file["size_bytes"], '{"numRecords":16}', np.array([2, 99]), 0, pa.array([""]), True
    )
    history.commit.commit_actions(lambda: [beyond], {})
    assert "deletes row 99" in "\n".join(verify_gallery(Gallery(gallery.path)).problems)


def test_files_are_due_by_share_and_by_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = make_history(tmp_path / "g", images=20)
    history.relabel(["/a/1.jpg"])
    since = {
        file["path"]: file["modification_time"]
        for file in Gallery(history.gallery.path).files()
        if file["num_records"] != file["rows"]
    }
    history.relabel(["/b/1.jpg"])
    gallery = Gallery(history.gallery.path)
    assert len(gallery.deleted_rows) == 2
    assert find_due_files(gallery, 30) == []
    # A file is as old as the first of its deleted rows.
    (path,) = since
    history.relabel(["/a/2.jpg"])
    gallery = Gallery(history.gallery.path)
    times = {file["path"]: file["modification_time"] for file in gallery.files()}
    assert times[path] == since[path]
    day = 86_400
    now = since[path] / 1000
    monkeypatch.setattr("time.time", lambda: now + 14 * day)
    assert find_due_files(gallery, 30) == []
    monkeypatch.setattr("time.time", lambda: now + 28 * day)
    assert {file["path"] for file in find_due_files(gallery, 30)} == set(gallery.deleted_rows)
    monkeypatch.undo()
    monkeypatch.setattr(rewrites, "_SPARED_FROM_BYTES", 0)
    monkeypatch.setattr(rewrites, "_SPARED_SHARE", 1.0)
    history.relabel(["/a/5.jpg"])
    gallery = Gallery(gallery.path)
    assert [file["path"] for file in find_due_files(gallery, 30)] == [path], "more than a tenth of its rows are deleted"
    assert purge_files(gallery, find_due_files(gallery, 30), history.commit) == 1
    assert path not in Gallery(gallery.path).list_paths()
    history.check()


# ---- faults


def test_a_commit_that_loses_the_race_is_planned_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between planning and writing, a commit of the same run's other thread deletes other rows of the same file."""
    history = make_history(tmp_path / "g")
    history.relabel(["/a/1.jpg"])
    write = log.write_entry
    calls = 0

    def write_late(folder: str, version: int, operation: str, actions: Any, **info: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ConflictError("taken")
        write(folder, version, operation, actions, **info)

    monkeypatch.setattr(log, "write_entry", write_late)
    history.relabel(["/a/2.jpg"])
    history.check()


def fill(history: History) -> None:
    """Add images if few are left."""
    if len(history.expected) < 4:
        history.add([f"/d/{history.step}-{n}.jpg" for n in range(6)])


@pytest.mark.parametrize("seed", trials(8))
def test_a_power_cut_leaves_what_was_before_a_step_or_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = random.Random(seed)
    history = make_history(tmp_path / "g", seed, images=6)
    state = SyncedState(tmp_path / "g")

    class Cut:
        """Notes what a disk may hold at a sync of a step."""

        def __init__(self, folder: Path):
            self.folder = folder
            self.at = state.syncs + rng.randint(0, 4)

        def __call__(self) -> None:
            if state.syncs == self.at:
                state.cut(self.folder, rng.choice(CUTS), seed)

    with state.watch(monkeypatch):
        for step in range(8):
            before = copy.deepcopy(history.expected)
            state.on_sync = Cut(tmp_path / f"within-{step}")
            history.happen()
            state.on_sync = lambda: None
            if (tmp_path / f"within-{step}").exists():
                gallery = Gallery(str(tmp_path / f"within-{step}"))
                assert read_values(gallery.to_arrow()) in (before, history.expected)
                assert verify_gallery(gallery).problems == []
            state.cut(tmp_path / f"after-{step}", rng.choice(CUTS), seed)
            assert read_values(Gallery(str(tmp_path / f"after-{step}")).to_arrow()) == history.expected
            fill(history)


@pytest.mark.parametrize("seed", trials(8))
def test_a_killed_run_leaves_one_of_two_states_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = random.Random(seed)
    history = make_history(tmp_path / "g", seed, images=6)
    write = log.write_entry

    class Killer:
        """Kills a run at its next commit, before or after the entry is written."""

        def __init__(self) -> None:
            self.is_early = rng.random() < 0.5
            self.is_armed = True

        def __call__(self, folder: str, version: int, operation: str, actions: Any, **info: Any) -> None:
            if not (self.is_armed and self.is_early):
                write(folder, version, operation, actions, **info)
            if self.is_armed:
                self.is_armed = False
                raise KeyboardInterrupt

    for number in range(8):
        twin = history.copy_to(tmp_path / f"twin-{number}")
        twin.happen()
        killer = Killer()
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(log, "write_entry", killer)
            history.happen()
        # A step without a commit is not killed.
        is_undone = killer.is_early and not killer.is_armed
        if not is_undone:
            history.expected = twin.expected
            history.erased = twin.erased
        history.commit = Committer(Gallery(history.gallery.path), f"next-{number}")
        history.check()
        with hold_lease(history.gallery.path) as lease:
            delete_files(claim_unreferenced(history.gallery.path, lease), lease)
        history.commit = Committer(Gallery(history.gallery.path), f"later-{number}")
        fill(history)
        history.check()
    assert verify_gallery(Gallery(history.gallery.path)).problems == []


@pytest.mark.parametrize("seed", trials(4))
def test_a_history_in_an_object_store(bucket: Any, seed: int) -> None:
    history = make_history("s3://faces/g", seed, images=6)
    for _ in range(6):
        history.happen()
        fill(history)
        history.check()
    assert verify_gallery(Gallery("s3://faces/g")).problems == []


def test_a_rewrite_of_one_file_leaves_marks_of_images_that_moved(tmp_path: Path) -> None:
    """An image whose rows left a file has its mark elsewhere, also if that file is written anew."""
    history = make_history(tmp_path / "g")
    history.relabel(["/a/1.jpg"])
    history.touch(["/a/1.jpg"])
    plan = plan_rewrite_of_uris(["/a/2.jpg"], lambda rows, mask: rows)
    plan = replace(plan, change_marked=None, keeps=None)
    history.commit.commit_actions(lambda: list(rewrite_files(Gallery(history.gallery.path), plan)), {})
    history.check()
    assert PartialGallery(Gallery(history.gallery.path)).to_arrow(["uri"]).num_rows == 32
