"""Files and listings: what cannot be listed or looked up is an error, never an empty folder; new names survive a cut."""

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import fail_to_list
from powercut import SyncedState

from facepipe import storage
from facepipe.errors import StorageError
from facepipe.storage import NoSuchFileError, conditional
from facepipe.storage.owned import walk_files

ERRORS = (errno.EACCES, errno.EIO, errno.ESTALE, errno.ENOTCONN)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three files, one of them in a folder of its own."""
    root = tmp_path / "tree"
    (root / "in").mkdir(parents=True)
    for name in ("a", "b", "in/c"):
        (root / name).write_text(name)
    return root


@pytest.mark.parametrize("number", ERRORS)
@pytest.mark.parametrize("name", ["", "in"])
def test_a_folder_that_cannot_be_listed_is_an_error(
    number: int, name: str, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [entry.size for entry in storage.list_files(str(tree))] == [1, 1, 4]
    fail_to_list(monkeypatch, tree / name, number)
    with pytest.raises(StorageError, match=f"cannot list .*{os.strerror(number).lower()}"):
        list(storage.list_files(str(tree)))
    with pytest.raises(StorageError, match="cannot list"):
        storage.list_names(str(tree / name))


def test_a_file_that_cannot_be_looked_up_is_an_error(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.stat

    def fail(path: Any, *args: Any, **options: Any) -> os.stat_result:
        if not isinstance(path, int) and os.fspath(path) == str(tree / "a"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "stat", fail)
    monkeypatch.setattr(os, "lstat", fail)
    for look in (storage.file_exists, storage.folder_exists):
        with pytest.raises(StorageError, match="cannot look up"):
            look(str(tree / "a"))
        assert not look(str(tree / "none"))
        assert not look(str(tree / "b" / "none"))
    with pytest.raises(StorageError, match="cannot list"):
        list(storage.list_files(str(tree)))
    assert storage.file_exists(str(tree / "b"))
    assert storage.folder_exists(str(tree / "in"))


def test_no_folder_is_nothing_and_a_link_that_leads_nowhere_is_not(tree: Path) -> None:
    """A link into a disk that is not mounted looks like no folder at all."""
    assert list(storage.list_files(str(tree / "none"))) == []
    assert list(storage.list_files(str(tree / "a" / "none"))) == []
    assert list(storage.list_names(str(tree / "none"))) == []
    (tree / "link").symlink_to("/mnt/none/erased")
    for folder in (tree / "link", tree / "a"):
        for name in (str(folder), f"{folder}/"):
            with pytest.raises(StorageError, match="cannot list"):
                list(storage.list_files(name))
            with pytest.raises(StorageError, match="cannot list"):
                list(walk_files(name))
        with pytest.raises(StorageError, match="cannot list"):
            storage.list_names(str(folder))
    (tree / "in" / "link").symlink_to("/mnt/none/hidden.list")
    for path in (tree / "link" / "hidden.list", tree / "in" / "link"):
        with pytest.raises(StorageError, match="a link that leads nowhere"):
            conditional.read_tagged(str(path))
    assert conditional.read_tagged(str(tree / "in" / "none")) is None
    assert conditional.read_tagged(str(tree / "none" / "none")) is None


def test_what_is_deleted_while_it_is_listed_is_no_error(tree: Path) -> None:
    listing = storage.list_files(str(tree))
    assert next(listing).url == str(tree / "a")
    (tree / "b").unlink()
    (tree / "in" / "c").unlink()
    (tree / "in").rmdir()
    assert list(listing) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_folder_of_somebody_else_is_an_error(tree: Path) -> None:
    """The permissions of a real file system, as somebody whom they concern."""
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        (Path(root) / "erased").mkdir(mode=0o700)
        (Path(root) / "erased" / "x.uris").write_bytes(b"")
        os.seteuid(65534)
        try:
            with pytest.raises(StorageError, match=r"cannot list .*permission denied"):
                list(storage.list_files(f"{root}/erased"))
            with pytest.raises(StorageError, match=r"cannot list .*permission denied"):
                list(storage.list_files(f"{root}/erased/deeper"))
            with pytest.raises(StorageError, match=r"cannot look up .*permission denied"):
                storage.file_exists(f"{root}/erased/x.uris")
        finally:
            os.seteuid(0)


def test_a_store_that_fails_is_no_empty_one(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.put_object(Bucket="faces", Key="g/a", Body=b"a")
    assert storage.file_exists("s3://faces/g/a")
    assert not storage.file_exists("s3://faces/g/b")
    assert [entry.url for entry in storage.list_prefix("s3://faces/g/a")] == ["s3://faces/g/a"]
    assert list(storage.list_prefix("s3://faces/g/b")) == []
    with pytest.raises(NoSuchFileError):
        storage.get_entry("s3://faces/g/b")
    # Nobody listens there any more.
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("FACEPIPE_RETRY_SECONDS", "0")
    storage.open_bucket.cache_clear()
    for look in (storage.file_exists, storage.folder_exists):
        with pytest.raises(StorageError):
            look("s3://faces/g/a")
    with pytest.raises(StorageError):
        list(storage.list_files("s3://faces/g"))


# --- what survives a power cut -----------------------------------------------------------------------------------------


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SyncedState]:
    (tmp_path / "disk").mkdir()
    with SyncedState(tmp_path / "disk").watch(monkeypatch) as watched:
        yield watched


def read_cut(state: SyncedState, to: Path) -> dict[str, bytes]:
    """The files that are certain after a cut, by name."""
    state.cut(to, "synced")
    return {str(path.relative_to(to)): path.read_bytes() for path in to.rglob("*") if path.is_file()}


def test_new_and_replaced_files_and_folders_survive_a_cut(state: SyncedState, tmp_path: Path) -> None:
    root = state.root
    storage.replace(str(root / "deep" / "er" / "x"), b"1")
    storage.replace(str(root / "deep" / "er" / "x"), b"2", unique=True)
    with storage.replace_file(str(root / "y"), sync=True) as unfinished:
        Path(unfinished).write_bytes(b"3")
    assert storage.create_file(str(root / "z"), b"4")
    assert not storage.create_file(str(root / "z"), b"5")
    storage.make_folder(str(root / "folders" / "of" / "folders"))
    with storage.replace_file(str(root / "unsynced")) as unfinished:
        Path(unfinished).write_bytes(b"6")
    assert read_cut(state, tmp_path / "cut") == {"deep/er/x": b"2", "y": b"3", "z": b"4"}
    assert (tmp_path / "cut" / "folders" / "of" / "folders").is_dir()
    storage.sync_disks(str(root), str(root / "none"))
    assert read_cut(state, tmp_path / "later")["unsynced"] == b"6"


def test_a_created_file_is_whole_or_not_there(state: SyncedState, tmp_path: Path) -> None:
    """Whatever a cut keeps of names, no reader finds a file of that name without its content."""
    seen = []

    def cut() -> None:
        for kind in ("synced", "named", "mixed"):
            place = tmp_path / f"cut-{len(seen)}"
            state.cut(place, kind, seed=len(seen))
            path = place / "entry"
            seen.append(path.read_bytes() if path.exists() else None)

    state.on_sync = cut
    assert storage.create_file(str(state.root / "entry"), b"content")
    cut()
    assert set(seen) <= {None, b"content"}
    assert seen[-1] == b"content"


def test_of_many_creators_one_wins(tmp_path: Path) -> None:
    """Threads stand in for machines: nothing but the file system decides."""
    from concurrent.futures import ThreadPoolExecutor

    for n in range(10):
        path = str(tmp_path / f"{n}")
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda k, path=path: storage.create_file(path, b"%d" % k), range(8)))
        assert sum(won) == 1
        assert Path(path).read_bytes() == b"%d" % won.index(True)
    assert len(os.listdir(tmp_path)) == 10, "no unfinished file is left"


def test_a_link_whose_answer_was_lost_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS may make a link and answer, to the request that it repeats, that there is one."""
    real = os.link

    def lose_answer(source: str, target: str) -> None:
        real(source, target)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    monkeypatch.setattr(os, "link", lose_answer)
    assert storage.create_file(str(tmp_path / "x"), b"mine")
    assert os.listdir(tmp_path) == ["x"]
