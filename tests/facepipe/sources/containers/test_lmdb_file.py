"""LMDB files against the library itself: any number and size of values, newest state; damage and pickles are told."""

import os
import pickle
import random
from pathlib import Path

import pytest

from facepipe import storage
from facepipe.errors import StorageError
from facepipe.sources.containers.lmdb_file import LmdbFile, LmdbReader
from facepipe.sources.identity import make_identity_rule
from facepipe.sources.item import WorkItem

lmdb = pytest.importorskip("lmdb")


def write(folder: Path, values: dict[bytes, bytes]) -> Path:
    with lmdb.open(str(folder), map_size=1 << 26) as database:
        # Several transactions, so that both meta pages are used and pages are freed.
        keys = list(values)
        for part in (keys[::2], keys[1::2], keys[:3]):
            with database.begin(write=True) as transaction:
                for key in part:
                    transaction.put(key, values[key])
    return folder / "data.mdb"


def list_file(path: Path) -> list[WorkItem]:
    return list(LmdbReader(make_identity_rule("folder")).list_items(str(path)))


def make_values(count: int, seed: int = 0) -> dict[bytes, bytes]:
    generator = random.Random(seed)
    sizes = (5, 300, 2000, 2030, 2040, 2100, 4080, 5000, 20_000)
    return {
        f"p{n % 7}/{generator.getrandbits(40):x}.jpg".encode(): b"\xff\xd8\xff"
        + generator.randbytes(generator.choice(sizes))
        for n in range(count)
    }


@pytest.mark.parametrize("count", [0, 1, 3, 60, 700])
def test_values_are_those_of_the_library(tmp_path: Path, count: int) -> None:
    values = make_values(count)
    path = write(tmp_path, values)
    with path.open("rb") as file:
        database = LmdbFile(file)
        found = {value.key: value for value in database}
        assert database.entries == count
        assert list(found) == sorted(values)
        for key in values:
            assert database.find(key) == found[key]
        assert database.find(b"nobody") is None
    items = list_file(path)
    assert [item.uri for item in items] == [f"{path}#{key.decode()}" for key in sorted(values)]
    for item in items:
        data = storage.read(item.path, item.offset, item.length)
        key = item.uri.partition("#")[2].encode()
        assert data == values[key]
        assert item.identity == key.decode().partition("/")[0]


def test_pickles_are_told_and_others_are_passed_over(tmp_path: Path) -> None:
    values = {
        b"__keys__": pickle.dumps([b"1"]),
        b"1": pickle.dumps((b"\xff\xd8\xff", 7)),
        b"2": b"text",
        b"3": b"\xff\xd8\xff1",
    }
    items = list_file(write(tmp_path, values))
    assert [item.uri.partition("#")[2] for item in items] == ["1", "3"]
    assert "a pickle" in str(items[0].listing_error)
    assert items[1].listing_error is None


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9])
def test_truncated_files_are_told(tmp_path: Path, share: float) -> None:
    path = write(tmp_path, make_values(200))
    content = path.read_bytes()
    (tmp_path / "cut.mdb").write_bytes(content[: int(share * len(content))])
    items = list_file(tmp_path / "cut.mdb")
    assert "truncated" in str(items[-1].listing_error) or "LMDB" in str(items[-1].listing_error)
    assert all(item.listing_error is None for item in items[:-1])


def test_foreign_and_damaged_files_never_raise(tmp_path: Path) -> None:
    path = write(tmp_path, make_values(120))
    content = path.read_bytes()
    (tmp_path / "x.mdb").write_bytes(b"Standard Jet DB" * 1000)
    assert "not an LMDB file" in str(list_file(tmp_path / "x.mdb")[-1].listing_error)
    generator = random.Random(2)
    for _ in range(120):
        damaged = bytearray(content)
        for _ in range(generator.choice([1, 4, 20])):
            damaged[generator.randrange(min(len(damaged), 40_000))] = generator.randrange(256)
        (tmp_path / "x.mdb").write_bytes(damaged)
        for item in list_file(tmp_path / "x.mdb"):
            assert item.listing_error is not None or (item.length or 0) <= len(damaged)


def test_a_page_that_leads_to_itself_is_told(tmp_path: Path) -> None:
    path = write(tmp_path, make_values(400))
    content = bytearray(path.read_bytes())
    with path.open("rb") as file:
        database = LmdbFile(file)
        page, _ = database._read_page(database._root)
        at = database._list_nodes(page, database._root)[1]
        root = database._root
        size = database._page_size
    content[root * size + at : root * size + at + 6] = root.to_bytes(6, "little")
    path.write_bytes(content)
    assert "comes twice" in str(list_file(path)[-1].listing_error)
    with path.open("rb") as file, pytest.raises(StorageError):
        list(LmdbFile(file))
    assert os.path.exists(tmp_path / "lock.mdb")
