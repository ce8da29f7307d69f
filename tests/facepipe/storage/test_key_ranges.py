"""Listing by ranges of keys: each object once, in the same order each time, by many listers at once."""

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import obstore
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from obstore.store import MemoryStore

from facepipe import storage
from facepipe.errors import StorageError
from facepipe.storage import key_ranges
from facepipe.storage.key_ranges import list_prefix_in_ranges


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """Put a store in memory in the place of a bucket, with pages of ten keys."""
    memory = MemoryStore()
    monkeypatch.setattr(key_ranges, "open_bucket", lambda bucket: memory)
    monkeypatch.setattr(storage.files, "open_bucket", lambda bucket: memory)
    monkeypatch.setattr(key_ranges, "_PAGE", 10)
    return memory


def fill(store: MemoryStore, keys: list[str]) -> None:
    for key in keys:
        obstore.put(store, key, b"x")


def list_keys(url: str, listers: int = 8) -> list[str]:
    return [entry.url.removeprefix("s3://b/") for entry in list_prefix_in_ranges(url, listers)]


NAMES = st.text("ab09/-_. é~{%", min_size=1, max_size=8).filter(lambda name: "//" not in name)


@settings(max_examples=25)
@given(st.sets(NAMES, max_size=120))
def test_every_object_is_listed_once_whatever_its_name(names: set[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        memory = MemoryStore()
        patch.setattr(key_ranges, "open_bucket", lambda bucket: memory)
        patch.setattr(storage.files, "open_bucket", lambda bucket: memory)
        patch.setattr(key_ranges, "_PAGE", 2)
        patch.setattr(key_ranges, "_PAGES_OF_FIRST", 1)
        patch.setattr(key_ranges, "_PAGES", 2)
        for name in names:
            obstore.put(memory, f"p/{name.strip('/.')}x", b"x")
        expected = sorted(meta["path"] for page in obstore.list(memory) for meta in page)
        assert sorted(list_keys("s3://b/p")) == expected
        assert list_keys("s3://b/p") == list_keys("s3://b/p")
        assert sorted(list_keys("s3://b/p", listers=2)) == expected


@pytest.mark.parametrize(
    "names",
    [
        [f"img{n:06d}.jpg" for n in range(900)],
        [f"{folder}/{n}.jpg" for folder in "abcdefgh" for n in range(110)],
        [*(f"user-{n:05d}/1.jpg" for n in range(880)), "z.txt"],
        [f"{value:032x}.jpg" for value in np.random.default_rng(1).permutation(880)],
    ],
    ids=["numbers", "folders", "one large", "hashes"],
)
def test_a_long_listing_is_divided(names: list[str], store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store, [f"p/{name}" for name in names])
    running: set[int] = set()
    most = 0
    pages = key_ranges._RangeLister._list_pages

    def watch(self: Any, after: str) -> Iterator[Any]:
        nonlocal most
        running.add(threading.get_ident())
        most = max(most, len(running))
        yield from pages(self, after)

    monkeypatch.setattr(key_ranges._RangeLister, "_list_pages", watch)
    keys = list_keys("s3://b/p")
    assert sorted(keys) == sorted(f"p/{name}" for name in names)
    assert keys == list_keys("s3://b/p"), "Ray lists again if a process is lost, and leaves out what it has"
    assert most >= 4


def test_a_short_listing_takes_one_request(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store, [f"p/{n:02d}.jpg" for n in range(35)])
    calls: list[Any] = []
    listing = obstore.list
    monkeypatch.setattr(obstore, "list", lambda *a, **k: calls.append(k) or listing(*a, **k))
    assert list_keys("s3://b/p") == [f"p/{n:02d}.jpg" for n in range(35)]
    assert len(calls) == 1


def test_an_error_ends_the_listing(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store, [f"p/{n:03d}.jpg" for n in range(500)])
    listing = obstore.list
    count = itertools.count()

    def fail(*args: Any, **options: Any) -> Any:
        if next(count) > 10:
            raise obstore.exceptions.GenericError("no answer")
        return listing(*args, **options)

    monkeypatch.setattr(obstore, "list", fail)
    with pytest.raises(StorageError, match="cannot list s3://b/p"):
        list_keys("s3://b/p")


def test_a_listing_that_is_left_ends_its_threads(store: MemoryStore) -> None:
    fill(store, [f"p/{n:04d}.jpg" for n in range(2000)])
    entries = list_prefix_in_ranges("s3://b/p")
    assert next(entries).url == "s3://b/p/0000.jpg"
    entries.close()  # type: ignore[attr-defined]
    for thread in threading.enumerate():
        if thread.name == "listing-range":
            thread.join(10)
            assert not thread.is_alive()
