"""The table's log: other readers read what we write, no entry is replaced, and a checkpoint is whole before it is named."""

import errno
import json
import os
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from bench.galleries import CONTRACT, Faces
from bench.galleries import rows as face_rows
from deltalake import DeltaTable
from deltalake.transaction import AddAction
from powercut import SyncedState

from facepipe import storage
from facepipe.errors import GalleryBusyError, GalleryError, StorageError
from facepipe.gallery import Gallery
from facepipe.gallery.commits import log
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.parts import PartRecord
from facepipe.gallery.commits.rewrite import make_remove_action, write_rows
from facepipe.gallery.maintenance.vacuum import delete_history
from facepipe.gallery.maintenance.verify import verify_gallery
from facepipe.storage import atomic
from facepipe.storage.conditional import ConflictError
from facepipe.storage.lease import hold_lease


def draw_rows(seed: int, count: int = 3) -> pa.Table:
    """Draw rows of a file."""
    ids, vectors = next(Faces(seed=seed).blocks(count))
    return face_rows(ids, vectors, seed * 100)


def add_rows(gallery: Gallery, commit: Committer, seed: int, count: int = 3) -> str:
    """Commit a file of rows; return its name."""
    action, name = write_rows(gallery, draw_rows(seed, count), "test", True)
    commit([PartRecord(0, path=name, size=action.size, stats=action.stats)], {"seed": seed})
    return name


@pytest.fixture(params=["disk", "s3"])
def gallery(request: pytest.FixtureRequest, tmp_path: Path) -> Gallery:
    if request.param == "disk":
        return Gallery.create(str(tmp_path / "g"), CONTRACT)
    request.getfixturevalue("bucket")
    return Gallery.create("s3://faces/g", CONTRACT)


@pytest.fixture
def local(tmp_path: Path) -> Gallery:
    return Gallery.create(str(tmp_path / "g"), CONTRACT)


def log_of(gallery: Gallery) -> Path:
    return Path(gallery.faces_folder, log.LOG)


def list_files(gallery: Gallery) -> set[str]:
    return {file["path"] for file in Gallery(gallery.path).files()}


# --- what others read --------------------------------------------------------------------------------------------------


def test_a_stock_reader_reads_what_random_commits_wrote(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files come and go; versions, files, columns, notes and run numbers are what was written, checkpoints or not."""
    monkeypatch.setattr(log, "_CHECKPOINT_INTERVAL", 5)
    rng = random.Random(7)
    commit = Committer(gallery, "run")
    expected: list[set[str]] = [set()]
    for n in range(12):
        files = set(expected[-1])
        if files and rng.random() < 0.5:
            name = rng.choice(sorted(files))
            commit.commit_actions(lambda name=name: [make_remove_action(name)], {"n": n})  # type: ignore[misc]
            files.remove(name)
        else:
            files.add(add_rows(gallery, commit, seed=n))
        expected.append(files)
    for version in range(5, len(expected)):
        table = DeltaTable(gallery.faces_folder, version=version, storage_options={"allow_http": "true"})
        assert set(pa.table(table.get_add_actions())["path"].to_pylist()) == expected[version]
    table = DeltaTable(gallery.faces_folder, storage_options={"allow_http": "true"})
    assert (table.version(), table.transaction_version("run")) == (12, 12)
    assert table.metadata().configuration["delta.checkpointInterval"] == "100"
    assert [json.loads(entry["facepipe"])["commit"] for entry in table.history(3)] == [12, 11, 10]
    assert (
        table.to_pyarrow_table(columns=["uri"]).num_rows == 3 * len(expected[-1]) if "://" not in gallery.path else True
    )
    names = [entry.url.rpartition("/")[2] for entry in storage.list_files(storage.join(gallery.faces_folder, log.LOG))]
    assert sum(name.endswith(".checkpoint.parquet") for name in names) == 2
    assert "_last_checkpoint" in names
    # A reader with a checkpoint needs no older entry.
    with hold_lease(gallery.path) as lease:
        delete_history(Gallery(gallery.path), lease)
    assert list_files(gallery) == expected[-1]


def test_commits_open_no_table(local: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    """To open a table of very many files takes seconds, so a run follows the log entry by entry."""
    commit = Committer(local, "run")
    prepared = [write_rows(local, draw_rows(seed), "test", True) for seed in range(3)]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a table was opened")

    with monkeypatch.context() as patched:
        patched.setattr("facepipe.gallery.table.DeltaTable", refuse)
        for n, (action, name) in enumerate(prepared):
            commit([PartRecord(n, path=name, size=action.size, stats=action.stats)], {})
    assert list_files(local) == {name for _, name in prepared}
    # A second run of the same gallery goes on where the first one is, and its own commits are known to it.
    other = Committer(Gallery(local.path), "other")
    add_rows(local, other, seed=7)
    add_rows(local, other, seed=8)
    assert DeltaTable(local.faces_folder).transaction_version("other") == 2
    with pytest.raises(GalleryBusyError):
        add_rows(local, commit, seed=9)


def test_a_run_goes_on_after_its_log_was_cleaned(gallery: Gallery) -> None:
    """An erasure that a run carries out deletes the older log while the run goes on."""
    commit = Committer(gallery, "run")
    names = {add_rows(gallery, commit, seed=n) for n in range(2)}
    reader = Gallery(gallery.path)
    stale = Committer(reader, "late")  # knows nothing of the entries that are deleted now
    with hold_lease(gallery.path) as lease:
        delete_history(Gallery(gallery.path), lease)
    # Who has opened the gallery before reads on, and may begin to write.
    assert reader.to_arrow(["uri", "missing_since"]).num_rows == 6
    names.add(add_rows(gallery, Committer(reader, "late"), seed=5))
    assert list_files(gallery) == names
    # The first run has lost its lease meanwhile; a run under the same id goes on.
    with pytest.raises(GalleryBusyError):
        add_rows(gallery, commit, seed=2)
    names.add(add_rows(gallery, stale, seed=3))
    assert list_files(gallery) == names
    table = DeltaTable(gallery.faces_folder, storage_options={"allow_http": "true"})
    assert (table.transaction_version("run"), table.transaction_version("late")) == (2, 2)


def test_a_checkpoint_of_a_large_log_is_made_by_a_process_of_its_own(
    local: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {add_rows(local, Committer(Gallery(local.path), "run"), seed=n) for n in range(2)}
    monkeypatch.setattr(log, "_LARGE_LOG", 0)
    with hold_lease(local.path) as lease:
        delete_history(Gallery(local.path), lease)
    assert list_files(local) == names
    monkeypatch.setattr(log, "_CHECKPOINT_SCRIPT", "raise SystemExit('no room')")
    with hold_lease(local.path) as lease, pytest.raises(StorageError, match="no room"):
        log.write_checkpoint(local.faces_folder, lease)
    assert list_files(local) == names


def test_of_writers_of_one_version_one_wins(gallery: Gallery) -> None:
    won: list[int] = []
    lost: list[int] = []
    start = threading.Barrier(6)

    def write(n: int) -> None:
        action = log.encode_action(AddAction(f"{n}.parquet", n, {}, 0, True, '{"numRecords":1}'))
        start.wait()
        try:
            log.write_entry(gallery.faces_folder, 1, "WRITE", [action])
            won.append(n)
        except ConflictError:
            lost.append(n)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 5)
    assert list_files(gallery) == {f"{won[0]}.parquet"}


@pytest.mark.parametrize(
    "protocol",
    [
        {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": ["columnMapping"]}
        | {"writerFeatures": ["columnMapping"]},
        {"minReaderVersion": 1, "minWriterVersion": 4},
    ],
)
def test_a_table_that_another_program_upgraded_is_not_written_to(local: Gallery, protocol: dict[str, Any]) -> None:
    log.write_entry(local.faces_folder, 1, "UPGRADE", [{"protocol": protocol}])
    with pytest.raises(GalleryError, match=r"another program has changed the table .* facepipe writes 1, 2 only"):
        Committer(Gallery(local.path), "run")
    assert Gallery(local.path).version == 1


def test_a_table_of_the_same_features_by_name_is_written_to(local: Gallery) -> None:
    protocol = {"minReaderVersion": 1, "minWriterVersion": 7, "writerFeatures": ["appendOnly", "invariants"]}
    log.write_entry(local.faces_folder, 1, "UPGRADE", [{"protocol": protocol}])
    name = add_rows(local, Committer(Gallery(local.path), "run"), seed=1)
    assert list_files(local) == {name}


# --- checkpoints -------------------------------------------------------------------------------------------------------


def test_a_cut_in_a_checkpoint_leaves_a_table_that_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a disk keeps of old and new names, checkpoint and hint, and of the entries that go."""
    disk = tmp_path / "disk"
    gallery = Gallery.create(str(disk / "g"), CONTRACT)
    commit = Committer(gallery, "run")
    names = {add_rows(gallery, commit, seed=n) for n in range(4)}
    log.write_checkpoint(gallery.faces_folder)
    names.add(add_rows(gallery, commit, seed=5))
    state = SyncedState(disk)
    cuts = 0

    def cut() -> None:
        nonlocal cuts
        for kind in ("synced", "named", *["mixed"] * 4):
            place = tmp_path / f"cut-{cuts}"
            state.cut(place, kind, seed=cuts)
            assert list_files(Gallery(str(place / "g"))) == names
            cuts += 1

    # The lease lies on another disk, so that its heartbeats are no cuts.
    with hold_lease(str(tmp_path / "elsewhere")) as lease, state.watch(monkeypatch):
        state.on_sync = cut
        delete_history(gallery, lease)
        cut()
    assert sorted(os.listdir(log_of(gallery))) == [
        "00000000000000000005.checkpoint.parquet",
        "00000000000000000005.json",
        "_last_checkpoint",
    ]
    assert not Path(gallery.faces_folder, ".checkpoint").exists()


@pytest.mark.parametrize("hinted", [None, 1, 3])
def test_a_checkpoint_without_its_hint_gets_one(gallery: Gallery, hinted: int | None) -> None:
    """A run was killed between the two. The hint is absent then, or names an older checkpoint."""
    commit = Committer(gallery, "run")
    hint = storage.join(gallery.faces_folder, log.LOG, "_last_checkpoint")
    names = set()
    old = b""
    for version in range(1, 5):
        names.add(add_rows(gallery, commit, seed=version))
        if version == hinted:
            assert log.write_checkpoint(gallery.faces_folder) == version
            old = storage.read(hint.encode())
    assert log.write_checkpoint(gallery.faces_folder) == 4
    if old:
        storage.replace(hint, old)
    else:
        storage.delete(hint)
    with hold_lease(gallery.path) as lease:
        assert delete_history(gallery, lease) == 4 + (hinted is not None)
    assert json.loads(storage.read(hint.encode()))["version"] == 4
    assert list_files(gallery) == names
    add_rows(gallery, commit, seed=6)
    assert len(list_files(gallery)) == 5


def test_checkpoints_of_two_threads_do_not_disturb_each_other(local: Gallery) -> None:
    """As those of a run's commits and of an erasure that it takes up."""
    commit = Committer(local, "run")
    names = {add_rows(local, commit, seed=n) for n in range(3)}
    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(lambda _: log.write_checkpoint(local.faces_folder), range(40)))
    assert set(versions) == {3}
    assert list_files(local) == names


def test_a_run_takes_nothing_for_committed_that_a_cut_may_take_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run was killed when its entry had its name, and before that was synced. The next one finds nothing to do."""
    disk = tmp_path / "disk"
    gallery = Gallery.create(str(disk / "g"), CONTRACT)
    state = SyncedState(disk)
    with state.watch(monkeypatch):
        sync_entries = atomic._sync_entries

        def stop(folder: str) -> None:
            if folder.endswith(log.LOG):
                raise KeyboardInterrupt
            sync_entries(folder)

        commit = Committer(gallery, "killed")
        with monkeypatch.context() as patch:
            patch.setattr(atomic, "_sync_entries", stop)
            with pytest.raises(KeyboardInterrupt):
                add_rows(gallery, commit, seed=1)
        seen = list_files(gallery)
        assert len(seen) == 1
        state.cut(tmp_path / "before", "synced")
        assert list_files(Gallery(str(tmp_path / "before" / "g"))) == set()
        Committer(Gallery(gallery.path), "next")([], {})
        state.cut(tmp_path / "after", "synced")
        assert list_files(Gallery(str(tmp_path / "after" / "g"))) == seen


@pytest.mark.parametrize("days", [-400, 0, 400])
def test_old_entries_go_behind_a_checkpoint_whatever_the_clock_says(
    days: int, local: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """deltalake deletes entries by their age; a checkpoint that is on the disk comes before them."""
    monkeypatch.setattr(log, "_CHECKPOINT_INTERVAL", 5)
    commit = Committer(local, "run")
    names = set()
    for n in range(12):
        for path in log_of(local).iterdir():
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 86400 * days))
        names.add(add_rows(local, commit, seed=n))
        assert list_files(local) == names
    assert DeltaTable(local.faces_folder).transaction_version("run") == 12


def test_a_checkpoint_that_finds_no_room_loses_nothing(local: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = Committer(local, "run")
    names = {add_rows(local, commit, seed=n) for n in range(2)}

    def fail(path: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "sync_file", fail)
        patch.setattr(log, "_CHECKPOINT_INTERVAL", 4)
        with pytest.raises(StorageError, match=r"cannot write a checkpoint .*no space left on device"):
            add_rows(local, commit, seed=3)
    assert len(list_files(local)) == 3, "the commit is in the table all the same"
    assert not Path(local.faces_folder, log.SCRATCH).exists()
    assert not list(log_of(local).glob("*checkpoint*"))
    add_rows(Gallery(local.path), Committer(Gallery(local.path), "next"), seed=4)
    assert names < list_files(local)


def test_a_checkpoint_that_was_stopped_is_made_again(local: Gallery) -> None:
    commit = Committer(local, "run")
    names = {add_rows(local, commit, seed=n) for n in range(2)}
    left = Path(local.faces_folder, ".checkpoint", log.LOG)
    left.mkdir(parents=True)
    (left / "00000000000000000000.json").write_text("half")
    assert log.write_checkpoint(local.faces_folder) == 2
    assert not left.exists()
    assert list_files(local) == names


# --- what an older facepipe left ---------------------------------------------------------------------------------------


def test_an_empty_entry_is_named(local: Gallery) -> None:
    """A power cut left entries of an older facepipe empty: readers take them for commits of nothing."""
    commit = Committer(local, "run")
    for n in range(2):
        add_rows(local, commit, seed=n)
    (log_of(local) / "00000000000000000002.json").write_bytes(b"")
    assert "00000000000000000002.json of the log is empty" in verify_gallery(Gallery(local.path)).problems[0]
    for path in log_of(local).iterdir():
        path.write_bytes(b"")
    with pytest.raises(GalleryError, match=r"3 files of its log are empty, such as .*docs/runbook\.md"):
        Gallery(local.path)
    with pytest.raises(GalleryError):
        Gallery.open_or_create(local.path, CONTRACT)


def test_a_log_that_cannot_be_written_is_a_message(local: Gallery) -> None:
    shutil.rmtree(log_of(local))
    with pytest.raises(StorageError, match="cannot write"):
        log.write_entry(local.faces_folder, 1, "WRITE", [])


def test_versions_with_the_same_files_are_equal(gallery: Gallery) -> None:
    """Entries that add and remove nothing keep runs out that were asleep."""
    commit = Committer(gallery, "run")
    for seed in range(2):
        add_rows(gallery, commit, seed=seed)
    for number in range(2):
        Committer(Gallery(gallery.path), f"fence-{number}").commit_fence()
    add_rows(Gallery(gallery.path), Committer(Gallery(gallery.path), "next"), seed=5)
    newest = Gallery(gallery.path).version
    found = [log.find_last_equal_version(gallery.faces_folder, version) for version in range(1, newest + 1)]
    assert found == [1, newest - 1, newest - 1, newest - 1, newest]
