"""From a source to blocks of work. This is the one place that decides what a run reads.

Known images are left out. Blocks shrink towards the end so that all workers finish together.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from facepipe.hashing import hash64_each, hash_each_in_process
from facepipe.schema import WORK_ITEM
from facepipe.sources import Source, WorkItem
from facepipe.types import UInt64

# Verdicts of a listed image; they are indices of the counts per verdict.
NEW, CHANGED, SKIP, REPEATED, ERASED = range(5)
_SCREENED_ITEMS = 8192  # looked up in the gallery at a time
_REPORT_ITEMS = 50_000  # passed over until an empty block reports it
# Blocks that each worker still gets from what is ahead; more make the end more even, fewer make larger files.
_BLOCKS_PER_WORKER = 4

PendingItem = tuple[WorkItem, int | None]
"""An item to be read, and the hash of the content that the gallery has for it, if any."""


@dataclass(frozen=True)
class BlockSize:
    """How many images travel together: one block is one Parquet file and one unit of retry.

    A block holds 1/(4 * workers) of what the lister sees ahead, between smallest and largest images.

    Attributes:
        smallest: Fewest images per block.
        largest: Most images per block.
        workers: Number of workers.
    """

    smallest: int = 16
    largest: int = 512
    workers: int = 1

    def __call__(self, ahead: int) -> int:
        """Choose the number of images of the next block, from the number of those that wait."""
        fair_share = ahead // (_BLOCKS_PER_WORKER * max(1, self.workers))
        return max(1, self.smallest, min(self.largest, fair_share))

    @property
    def lookahead(self) -> int:
        """Number of items to look ahead so that the largest block is reached."""
        return self.largest * _BLOCKS_PER_WORKER * max(1, self.workers)


@dataclass(frozen=True)
class Block:
    """Work items, and what the lister has passed over since the last block.

    Attributes:
        number: Number of the block.
        items: Work items, of the schema WORK_ITEM.
        rows: What the stages so far made of the items, if a plan splits them over several workers.
        skipped: Images that are in the gallery already.
        repeated: Images that were listed before in this run.
        ignored: Files that are not images.
        erased: Images that must not come back.
        last: Whether this is the last block.
    """

    number: int
    items: pa.Table
    rows: pa.Table | None = None
    skipped: int = 0
    repeated: int = 0
    ignored: int = 0
    erased: int = 0
    last: bool = False


class Known(Protocol):
    """What a gallery holds, such as `gallery.known.KnownImages`."""

    def screen(self, uris: UInt64, fingerprints: UInt64) -> tuple[npt.NDArray[np.int8], UInt64]:
        """Return one verdict per item, and the hash of the content that the gallery has for it, both (n,).

        Args:
            uris: `hash64_each` of the uris, (n,).
            fingerprints: `hash_each_in_process` of the fingerprints, (n,), 0 for an item without one.
        """


def cut_blocks(source: Source, known: Known, size: BlockSize) -> Iterator[Block]:
    """Yield blocks of what has to be read. The last one is marked as `last`.

    If long stretches of the listing hold nothing to read, empty blocks report how far it is.
    """
    cutter = _BlockCutter(source)
    pending: list[PendingItem] = []
    listing = iter(source)
    is_exhausted = False
    while pending or not is_exhausted:
        # Look ahead, so that the size of the next block can follow from what is left.
        while not is_exhausted and len(pending) < size.lookahead:
            # Screen a batch of the listing; its new and changed images wait, the others are counted.
            items = list(islice(listing, min(_SCREENED_ITEMS, size.lookahead)))
            is_exhausted = not items
            verdicts, previous = _screen_items(items, known)
            cutter.count(verdicts)
            wanted = np.flatnonzero((verdicts == NEW) | (verdicts == CHANGED)).tolist()
            pending += [(items[n], int(previous[n]) if verdicts[n] == CHANGED else None) for n in wanted]
            if cutter.passed_count >= _REPORT_ITEMS:
                yield cutter.make_block([])
        if pending:
            n = size(len(pending))
            part = pending[:n]
            pending = pending[n:]
            yield cutter.make_block(part)
    # The last block is always empty, so that its counts cover the whole listing.
    yield cutter.make_block([], last=True)


class _BlockCutter:
    """Numbers the blocks, and gives each the counts since the last one."""

    def __init__(self, source: Source):
        self._source = source
        self._number = 0
        self._ignored = 0
        # Images per verdict since the last block, (5,).
        self._counts = np.zeros(5, np.int64)

    @property
    def passed_count(self) -> int:
        """Number of images passed over since the last block."""
        return int(self._counts[[SKIP, REPEATED, ERASED]].sum())

    def count(self, verdicts: npt.NDArray[np.int8]) -> None:
        """Add verdicts to the counts."""
        self._counts += np.bincount(verdicts, minlength=5)

    def make_block(self, part: list[PendingItem], last: bool = False) -> Block:
        """Make a block of items, and begin the counts anew."""
        block = Block(
            number=self._number,
            items=_to_table(part),
            skipped=int(self._counts[SKIP]),
            repeated=int(self._counts[REPEATED]),
            ignored=self._source.ignored - self._ignored,
            erased=int(self._counts[ERASED]),
            last=last,
        )
        self._number += 1
        self._ignored = self._source.ignored
        self._counts[:] = 0
        return block


def _screen_items(items: list[WorkItem], known: Known) -> tuple[npt.NDArray[np.int8], UInt64]:
    uris = [item.uri for item in items]
    fingerprints = [item.fingerprint or "" for item in items]
    return known.screen(hash64_each(uris), hash_each_in_process(fingerprints))


def _to_table(items: list[PendingItem]) -> pa.Table:
    if not items:
        return WORK_ITEM.empty_table()
    # Turn rows into columns in the order of the schema; the last one is the content's hash.
    columns = [*zip(*(item for item, _ in items), strict=True), [previous for _, previous in items]]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, WORK_ITEM, strict=True)]
    return pa.table(arrays, schema=WORK_ITEM)


_COUNTS = ("number", "skipped", "repeated", "ignored", "erased", "last")


def encode_block(block: Block) -> dict[str, object]:
    """Encode a block as one row of plain values, for transport between processes."""
    counts = {name: getattr(block, name) for name in _COUNTS}
    rows = None if block.rows is None else _encode_table(block.rows)
    return {"items": _encode_table(block.items), "rows": rows, **counts}


def decode_block(row: dict[str, object]) -> Block:
    """Decode a row that `encode_block` made."""
    tables = {
        name: None if row[name] is None else pa.ipc.open_stream(row[name]).read_all() for name in ("items", "rows")
    }
    return Block(**tables, **{name: row[name] for name in _COUNTS})  # type: ignore[arg-type]


def _encode_table(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())
