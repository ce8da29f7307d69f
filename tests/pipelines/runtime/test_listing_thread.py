"""The listing runs ahead of the workers as far as its budget of bytes allows, and loses no block."""

import threading
from collections.abc import Iterator

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.errors import SourceError
from facepipe.schema import WORK_ITEM
from facepipe.sources.blocks import Block
from pipelines.runtime.runners.local import _ListingThread


def make_block(number: int, images: int) -> Block:
    rows = [{"uri": f"{number}-{n}", "path": f"{number}-{n}".encode()} for n in range(images)]
    return Block(number=number, items=pa.Table.from_pylist(rows, schema=WORK_ITEM))


def take_all(listing: _ListingThread) -> Iterator[Block]:
    while not listing.exhausted:
        block = listing.get_next()
        if block is not None:
            yield block


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), max_size=12), budget=st.integers(1, 20_000))
def test_every_block_comes_once_and_in_order(sizes: list[int], budget: int) -> None:
    blocks = [make_block(number, images) for number, images in enumerate(sizes)]
    listing = _ListingThread(blocks, budget)
    assert [block.number for block in take_all(listing)] == list(range(len(sizes)))


@pytest.mark.parametrize(("budget", "is_listed"), [(1, False), (1 << 20, True)])
def test_the_budget_says_how_far_it_runs_ahead(budget: int, is_listed: bool) -> None:
    at_end = threading.Event()

    def list_blocks() -> Iterator[Block]:
        for number in range(5):
            yield make_block(number, 10)
        at_end.set()

    listing = _ListingThread(list_blocks(), budget)
    assert at_end.wait(60 if is_listed else 0.2) == is_listed, "before any block is taken"
    assert len(list(take_all(listing))) == 5
    assert at_end.wait(60)


def test_an_error_of_the_listing_is_raised_after_its_blocks() -> None:
    def list_blocks() -> Iterator[Block]:
        yield make_block(0, 3)
        raise SourceError("the disk is gone")

    listing = _ListingThread(list_blocks(), 1)
    taken = []
    with pytest.raises(SourceError, match="the disk is gone"):
        taken.extend(block.number for block in take_all(listing))
    assert listing._thread.join(60) is None


def test_a_listing_that_waits_for_room_can_be_stopped() -> None:
    listing = _ListingThread([make_block(0, 10), make_block(1, 10)], 1)
    listing.stop()
    listing._thread.join(60)
    assert not listing._thread.is_alive()
