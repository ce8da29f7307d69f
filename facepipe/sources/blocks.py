"""From a source to blocks of work: known images are left out, and blocks shrink towards the end so that all workers
finish together. The one place that decides what a run reads.
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


@dataclass(frozen=True)
class BlockSize:
    """How many images travel together: one block is one Parquet file and one unit of retry.

    A block holds 1/(4 * workers) of what the lister sees ahead, between smallest and largest images.
    """

    smallest: int = 16
    largest: int = 512
    workers: int = 1

    def __call__(self, ahead: int) -> int:
        return max(1, self.smallest, min(self.largest, ahead // (4 * max(1, self.workers))))

    @property
    def lookahead(self) -> int:
        """Items to hold ahead so that the largest block is reached."""
        return self.largest * 4 * max(1, self.workers)


@dataclass(frozen=True)
class Block:
    """Work items (schema.WORK_ITEM) and what the lister passed over since the block before.

    skipped: already in the gallery; repeated: listed before in this run; ignored: no image files; erased: not to come
    back. All are counts.
    rows: what the stages so far made of the items, where a plan splits them over several workers.
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
    """What the gallery holds (gallery.known.KnownImages, or nothing)."""

    def screen(self, uris: UInt64, fingerprints: UInt64) -> tuple[npt.NDArray[np.int8], UInt64]:
        """(verdict, previous) per item, as gallery.known.KnownImages gives them, for `hash64_each` of the uris and
        `hash_each_in_process` of the fingerprints (0 where there is none)."""


NEW, CHANGED, SKIP, REPEATED, ERASED = range(5)
_SCREEN = 8192
_REPORT = 50_000


def cut_blocks(source: Source, known: Known, size: BlockSize) -> Iterator[Block]:
    """Blocks of what is to be read, closed by one marked `last`.

    Where long stretches of the listing hold nothing to read, empty blocks report how far it is.
    """
    cutter = _Cutter(source)
    held: list[tuple[WorkItem, int | None]] = []
    listing = iter(source)
    exhausted = False
    while held or not exhausted:
        while not exhausted and len(held) < size.lookahead:
            items = list(islice(listing, min(_SCREEN, size.lookahead)))
            exhausted = not items
            verdicts, previous = _screen(items, known)
            cutter.count(verdicts)
            wanted = np.flatnonzero((verdicts == NEW) | (verdicts == CHANGED)).tolist()
            held += [(items[n], int(previous[n]) if verdicts[n] == CHANGED else None) for n in wanted]
            if cutter.passed >= _REPORT:
                yield cutter.block([])
        if held:
            n = size(len(held))
            part, held = held[:n], held[n:]
            yield cutter.block(part)
    yield cutter.block([], last=True)


class _Cutter:
    """Numbers the blocks and hands each the counts since the one before."""

    def __init__(self, source: Source):
        self._source = source
        self._number, self._ignored = 0, 0
        self._counts = np.zeros(5, np.int64)

    @property
    def passed(self) -> int:
        """Images passed over since the last block."""
        return int(self._counts[[SKIP, REPEATED, ERASED]].sum())

    def count(self, verdicts: npt.NDArray[np.int8]) -> None:
        self._counts += np.bincount(verdicts, minlength=5)

    def block(self, part: list[tuple[WorkItem, int | None]], last: bool = False) -> Block:
        ignored = self._source.ignored - self._ignored
        skipped, repeated, erased = (int(self._counts[n]) for n in (SKIP, REPEATED, ERASED))
        made = Block(self._number, _table(part), None, skipped, repeated, ignored, erased, last)
        self._number, self._ignored = self._number + 1, self._source.ignored
        self._counts[:] = 0
        return made


def _screen(items: list[WorkItem], known: Known) -> tuple[npt.NDArray[np.int8], UInt64]:
    uris, marks = [item.uri for item in items], [item.fingerprint or "" for item in items]
    return known.screen(hash64_each(uris), hash_each_in_process(marks))


def _table(items: list[tuple[WorkItem, int | None]]) -> pa.Table:
    if not items:
        return WORK_ITEM.empty_table()
    columns = [*zip(*(item for item, _ in items), strict=True), [previous for _, previous in items]]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, WORK_ITEM, strict=True)], schema=WORK_ITEM)


_COUNTS = ("number", "skipped", "repeated", "ignored", "erased", "last")


def encode_block(block: Block) -> dict[str, object]:
    """A block as one row of plain values, for transport between processes."""
    counts = {name: getattr(block, name) for name in _COUNTS}
    return {"items": _to_bytes(block.items), "rows": None if block.rows is None else _to_bytes(block.rows), **counts}


def decode_block(row: dict[str, object]) -> Block:
    """The block of a row made by `encode`."""
    tables = {
        name: None if row[name] is None else pa.ipc.open_stream(row[name]).read_all() for name in ("items", "rows")
    }
    return Block(**tables, **{name: row[name] for name in _COUNTS})  # type: ignore[arg-type]


def _to_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())
