"""Bytes in and out: what one call of the system or one request cannot do."""

import os
from pathlib import Path
from typing import Any

import pytest

from facepipe import storage
from facepipe.errors import StorageError
from facepipe.storage import describe_error, files


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path)
    request.getfixturevalue("bucket")
    return "s3://faces/g"


# ------------------------------------------------------------------ reading


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 250])
def test_a_file_longer_than_one_call_reads_is_read_whole(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call of Linux reads at most 2 GiB less 4 kB; here it is a hundred bytes."""
    monkeypatch.setattr(files, "_MAX_READ", 100)
    path = tmp_path / "file"
    data = os.urandom(size)
    path.write_bytes(data)
    assert storage.read(bytes(path)) == data
    assert storage.read(bytes(path), size // 3, size // 2) == data[size // 3 :][: size // 2]
    with pytest.raises(StorageError, match=f"truncated: {size} of {size + 1} bytes"):
        storage.read(bytes(path), 0, size + 1)


# ------------------------------------------------------------------ deleting


def test_many_are_deleted_and_missing_ones_are_no_error(place: str) -> None:
    names = [f"file {n}%" for n in range(25)]
    paths = [storage.join(place, name) for name in names]
    for path in paths[::2]:
        storage.write(path, b"x")
    storage.write(storage.join(place, "other"), b"x")
    storage.delete_many(paths)
    assert list(storage.list_names(place)) == ["other"]
    storage.delete_many([])


def test_a_batch_that_may_not_go_on_leaves_the_rest(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "DELETE_BATCH", 3)
    paths = [storage.join(place, f"{n}") for n in range(8)]
    for path in paths:
        storage.write(path, b"x")
    batches = iter(range(2))
    with pytest.raises(StopIteration):
        storage.delete_many(paths, before_batch=lambda: next(batches) and None)
    assert sorted(storage.list_names(place)) == ["6", "7"]


def test_objects_go_by_one_request(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import obstore

    requests: list[Any] = []
    real = obstore.delete
    monkeypatch.setattr(obstore, "delete", lambda store, keys: requests.append(keys) or real(store, keys))
    paths = [f"s3://faces/g/{n}" for n in range(1500)]
    for path in (paths[0], paths[-1]):
        storage.write(path, b"x")
    storage.delete_many(paths)
    assert [len(keys) for keys in requests] == [1000, 500]
    assert not list(storage.list_names("s3://faces/g"))


def test_a_store_without_that_request_is_asked_one_by_one(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import obstore

    real = obstore.delete

    def delete(store: Any, keys: Any) -> None:
        if isinstance(keys, list):
            raise obstore.exceptions.NotSupportedError("no bulk deletion here")
        real(store, keys)

    monkeypatch.setattr(obstore, "delete", delete)
    storage.write("s3://faces/g/a", b"x")
    storage.delete_many(["s3://faces/g/a", "s3://faces/g/b"])
    assert not list(storage.list_names("s3://faces/g"))


# ------------------------------------------------------------------ what errors say


def test_names_in_a_message_keep_their_capitals() -> None:
    text = "Failed to open local file '/G/part-20261130T093103.parquet'. Detail: No such file or directory"
    assert describe_error(OSError(2, text)) == "f" + text[1:]
    assert describe_error(OSError(28, "No space left on device")) == "no space left on device"
    assert describe_error(OSError(5, "RFS specific error")) == "RFS specific error"
    assert describe_error(OSError(5, "")) == "[Errno 5]"
