"""Archives that are listed ahead of their turn: the same items in the same order, several at a time, none for nothing."""

import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from facepipe.errors import StorageError
from facepipe.sources.ahead import Listed, list_ahead
from facepipe.sources.item import WorkItem

LIMIT = 60


def make_items(name: str, count: int) -> list[WorkItem]:
    return [WorkItem(f"{name}#{n}", name.encode()) for n in range(count)]


@given(
    sizes=st.lists(st.tuples(st.integers(0, 600), st.booleans()), max_size=12),
    threads=st.integers(1, 4),
)
def test_the_items_are_those_of_the_entries_in_their_order(sizes: list[tuple[int, bool]], threads: int) -> None:
    lists = [make_items(str(n), size) for n, (size, _) in enumerate(sizes)]
    entries = [Listed(partial(iter, items), is_archive) for items, (_, is_archive) in zip(lists, sizes, strict=True)]
    assert list(list_ahead(entries, threads)) == [item for items in lists for item in items]


def test_several_archives_are_listed_at_a_time() -> None:
    """Each waits until all four are being listed: one after the other would wait forever."""
    all_here = threading.Barrier(4)

    def list_items(name: str) -> Iterator[WorkItem]:
        all_here.wait(LIMIT)
        yield from make_items(name, 3)

    entries = [Listed(partial(list_items, str(n)), is_slow=True) for n in range(8)]
    assert [item.uri for item in list_ahead(entries, 4)] == [f"{n}#{k}" for n in range(8) for k in range(3)]


def test_the_first_item_does_not_wait_for_the_end_of_an_archive() -> None:
    is_seen = threading.Event()

    def list_items() -> Iterator[WorkItem]:
        yield from make_items("a", 1)
        assert is_seen.wait(LIMIT)
        yield from make_items("b", 1)

    found = list_ahead([Listed(list_items, is_slow=True)], 2)
    assert next(found).uri == "a#0"
    is_seen.set()
    assert [item.uri for item in found] == ["b#0"]


def fail(name: str) -> Iterator[WorkItem]:
    yield from make_items(name, 2)
    raise StorageError("the store does not answer")


def test_an_error_is_raised_in_its_turn() -> None:
    entries = [
        Listed(partial(iter, make_items("a", 500)), is_slow=True),
        Listed(partial(fail, "b"), is_slow=True),
        Listed(partial(iter, make_items("c", 1)), is_slow=False),
    ]
    found = list_ahead(entries, 3)
    assert [next(found).uri for _ in range(502)][-2:] == ["b#0", "b#1"]
    with pytest.raises(StorageError, match="does not answer"):
        next(found)


def count_listers() -> int:
    return sum(thread.name == "listing-archive" for thread in threading.enumerate())


@pytest.mark.parametrize("taken", [0, 1, 700])
def test_who_stops_taking_items_leaves_no_thread(taken: int) -> None:
    def list_forever(name: str) -> Iterator[WorkItem]:
        while True:
            yield from make_items(name, 100)

    found = list_ahead([Listed(partial(list_forever, str(n)), is_slow=True) for n in range(5)], 3)
    for _ in range(taken):
        next(found)
    threads = [thread for thread in threading.enumerate() if thread.name == "listing-archive"]
    assert len(threads) == (3 if taken else 0)
    found.close()  # type: ignore[attr-defined]
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive()


def test_files_are_handed_on_before_what_follows_is_looked_at() -> None:
    looked_at: list[int] = []

    def list_entries() -> Iterator[Listed]:
        for n in range(100):
            looked_at.append(n)
            make: Callable[[], Iterator[WorkItem]] = partial(iter, make_items(str(n), 1))
            yield Listed(make, is_slow=False)

    next(list_ahead(list_entries(), 4))
    assert looked_at == [0]
