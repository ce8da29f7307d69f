"""Mapped files: a disk without room is a message with the size needed, and never SIGBUS."""

import errno
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import faults
import numpy as np
import pytest

from facepipe.errors import StorageError
from facepipe.storage.hashtable import HashTable
from facepipe.storage.mapped import TemporaryRows, create_array, make_temporary_array, map_temporary_file

KEYS = np.arange(1, 60_001, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)

_FILL = """
import sys
import numpy as np
from facepipe.errors import StorageError
from facepipe.storage.hashtable import HashTable
from facepipe.storage.mapped import create_array

keys = np.arange(1, 60_001, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
for fill in (
    lambda: HashTable(width=3).add(keys, np.zeros((len(keys), 3), np.uint64)),
    lambda: create_array(sys.argv[1] + "/a.npy", np.float32, (10_000, 128)).fill(1),
):
    try:
        fill()
        print("room for all")
    except StorageError as error:
        print(error)
"""


@contextmanager
def limit_file_size(size: int) -> Iterator[None]:
    """Let this process write no file of more bytes: the nearest thing to a full disk that needs no root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_table_that_finds_no_room_says_how_much_it_needs(tmp_path: Path) -> None:
    with limit_file_size(3 << 20):
        table = HashTable(width=3, folder=str(tmp_path))
        known = KEYS[:30_000]
        table.add(known, np.zeros((len(known), 3), np.uint64))
        with pytest.raises(StorageError, match=r"4,096 KiB in .*file too large.* TMPDIR"):
            table.add(KEYS, np.zeros((len(KEYS), 3), np.uint64))
    assert table.get(known)[0].all(), "what was there is there"
    table.close()
    assert list(tmp_path.iterdir()) == []


def test_an_array_that_finds_no_room_is_not_left_behind(tmp_path: Path) -> None:
    path = str(tmp_path / "a.npy")
    with limit_file_size(1 << 20), pytest.raises(StorageError, match=r"a\.npy' of 5,000 KiB: file too large"):
        create_array(path, np.float32, (10_000, 128))
    assert list(tmp_path.iterdir()) == []
    array = create_array(path, np.int64, (7,))
    array[:] = range(7)
    array.flush()
    assert np.load(path).tolist() == list(range(7))


def test_room_is_taken_when_a_file_is_made(tmp_path: Path) -> None:
    mapped, file = map_temporary_file(1 << 20, str(tmp_path))
    assert len(mapped) == 1 << 20
    assert not any(mapped[:4096])
    assert Path(f"/proc/self/fd/{file.fileno()}").stat().st_blocks * 512 >= 1 << 20
    mapped.close()
    file.close()


def test_a_full_disk_is_a_message(tmp_path: Path) -> None:
    """A real disk of 768 kB: a page that finds no room there ends a process without a word."""
    with faults.disk(tmp_path / "small", 768 << 10) as disk:
        if disk is None:
            pytest.skip("nobody may mount a disk here")
        done = subprocess.run(
            [sys.executable, "-c", _FILL, str(disk.path)],
            env={"TMPDIR": str(disk.path), "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done
        assert done.stdout.startswith("cannot keep a table of 2,048 KiB in ")
        assert done.stdout.count("no space left on device") == 2


@pytest.mark.parametrize("shape", [(0,), (3,), (1 << 19,), (1 << 17, 4)])
def test_temporary_arrays_hold_zeros_and_what_is_written(shape: tuple[int, ...]) -> None:
    array = make_temporary_array(np.float32, shape)
    assert array.shape == shape
    assert not array.any()
    array[-1:] = 7
    assert (array[-1:] == 7).all()


def test_rows_take_room_as_they_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    rows = TemporaryRows(np.float32, 1 << 20, 8)
    assert list(tmp_path.iterdir()) == []
    rows.take_room(100)
    rows.array[:100] = np.arange(100, dtype=np.float32)[:, None]
    array = rows.array
    del rows  # the rows stay as long as they are used
    assert array[99].tolist() == [99.0] * 8
    none = TemporaryRows(np.float32, 0, 8)
    none.take_room(0)
    assert none.array.shape == (0, 8)


def test_a_disk_without_room_for_rows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    rows = TemporaryRows(np.float32, 1000, 128)
    monkeypatch.setattr("os.posix_fallocate", fail)
    with pytest.raises(StorageError, match=r"table of 50 KiB .* Set TMPDIR"):
        rows.take_room(100)
    with pytest.raises(StorageError, match="Set TMPDIR"):
        TemporaryRows(np.uint8, 1 << 60, 1)
