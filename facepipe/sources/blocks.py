"""From a source to blocks of work. This is the one place that decides what a run reads.

Known images are left out. Blocks shrink towards the end so that all workers finish together.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any, Protocol

import numpy as np
import pyarrow as pa

from facepipe.errors import StorageError
from facepipe.hashing import hash64_column, hash64_each, hash_each_in_process
from facepipe.schema import WORK_ITEM
from facepipe.sources.item import Source, WorkItem
from facepipe.sources.label_changes import LabelChanges
from facepipe.sources.screening import CHANGED, ERASED, NEW, REPEATED, SKIP, Screening
from facepipe.storage import describe_error, is_remote
from facepipe.types import Bool, UInt64

_SCREENED_ITEMS = 8192  # looked up in the gallery at a time, at most
_FIRST_ITEMS = 1000  # looked up first: as many as a page of an object store's listing has
_REPORT_ITEMS = 50_000  # passed over until an empty block reports it
_MAX_RELABELLED = 20_000  # new labels of known images in one block
# Blocks that each worker still gets from what is ahead; more make the end more even, fewer make larger files.
_BLOCKS_PER_WORKER = 4
# How many items wait, for each that was handed out, before the next block is. So work starts with the first items that
# are listed, and the listing soon is far enough ahead for blocks that shrink towards its end.
_LISTED_PER_ITEM = 4
# Bytes of an archive in an object store that a block has at least.
_RANGE_BYTES = 32 << 20
_MAX_LISTED = 1 << 20  # items that wait at most, of some 500 bytes each

RELABELLED = pa.schema([("uri", pa.string()), ("identity", pa.string())])
"""Known images, and the labels that the source gives them now; null for none."""
_SPOOLED = WORK_ITEM.append(pa.field("is_relabelled", pa.bool_()))


@dataclass(frozen=True)
class PendingItem:
    """An item to be read.

    Attributes:
        item: The item.
        previous: Hash of the content that the gallery has for it; None if it has none.
        is_relabelled: Whether the item's label goes to the gallery's rows if the content is the same.
    """

    item: WorkItem
    previous: int | None
    is_relabelled: bool


FindErased = Callable[[Sequence[str]], Bool]


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

    def choose_lookahead(self, handed_out: int) -> int:
        """Choose how many items are to wait before the next block is cut, from the number of those handed out."""
        return max(1, min(self.most_ahead, _LISTED_PER_ITEM * handed_out))

    @property
    def most_ahead(self) -> int:
        """Number of waiting items with which blocks have their largest size. The listing goes no further ahead."""
        return min(_MAX_LISTED, self.largest * _BLOCKS_PER_WORKER * max(1, self.workers))


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
        handed_out: Images that the listing has handed out so far, this block's included.
        digest: Digest of their uris (`compute_digest`), which tells whether each of them came back once.
        relabelled: New labels of known images, of the schema RELABELLED. Those of images among the items hold only if
            the image is unchanged.
        notes: Sentences on the listing for the user, in the last block.
    """

    number: int
    items: pa.Table
    rows: pa.Table | None = None
    skipped: int = 0
    repeated: int = 0
    ignored: int = 0
    erased: int = 0
    last: bool = False
    handed_out: int = 0
    digest: int = 0
    relabelled: pa.Table | None = None
    notes: tuple[str, ...] = ()


class Known(Protocol):
    """What a gallery holds, such as `gallery.known.KnownImages`."""

    def screen(self, uris: UInt64, fingerprints: UInt64) -> Screening:
        """Decide for listed images whether they have to be read.

        Args:
            uris: `hash64_each` of the uris, (n,).
            fingerprints: `hash_each_in_process` of the fingerprints, (n,), 0 for an item without one.
        """


def cut_blocks(
    source: Source,
    known: Known,
    size: BlockSize,
    *,
    list_first: bool = False,
    on_listed: Callable[[bool], None] = lambda is_read: None,
    find_erased: FindErased | None = None,
) -> Iterator[Block]:
    """Yield blocks of what has to be read. The last one is marked as `last`.

    If long stretches of the listing hold nothing to read, empty blocks report how far it is, and bring new labels.

    Args:
        source: the source.
        known: what the gallery holds.
        size: chooses the number of images per block.
        list_first: list everything before the first image is handed out. What waits lies in a temporary file.
        on_listed: called when everything is listed. It is told whether any image waits to be read.
        find_erased: tells of uris, (n,), whether they must not come back, beside what `known` says of them.
    """
    cutter = _BlockCutter(source)
    pending: list[PendingItem] = []
    with ItemSpool() as spool:
        batches = _screen_source(source, known, cutter, find_erased)
        if list_first:
            for batch in batches:
                spool.add(batch)
                while cutter.has_much_to_report:
                    yield cutter.make_block([])
            on_listed(spool.count > 0)
            batches = spool.read()
        is_exhausted = False
        while pending or not is_exhausted:
            # Look ahead, so that the size of the next block can follow from what is left.
            while not is_exhausted and len(pending) < size.choose_lookahead(cutter.handed_out):
                # The screened batches may be empty; the end of the listing is not.
                screened: list[PendingItem] | None = next(batches, None)
                is_exhausted = screened is None
                pending += screened or []
                while cutter.has_much_to_report:
                    yield cutter.make_block([])
            if pending:
                has_most = not is_exhausted and len(pending) >= size.most_ahead
                n = size.largest if has_most else size(len(pending))
                n = _fill_range(pending, n, size.largest)
                part = pending[:n]
                pending = pending[n:]
                yield cutter.make_block(part)
    if not list_first:
        on_listed(False)
    # The last block is always empty, so that its counts cover the whole listing.
    while cutter.changes.count > _MAX_RELABELLED:
        yield cutter.make_block([])
    yield cutter.make_block([], last=True)


def _fill_range(pending: list[PendingItem], count: int, most: int) -> int:
    """Enlarge a block of members of an archive in an object store, so that one request reads enough of them.

    Args:
        pending: the items that wait.
        count: number of images that the block would have.
        most: most images per block.

    Returns:
        The number of images that it has instead.
    """
    total = 0
    for n, waiting in enumerate(pending[:most]):
        item = waiting.item
        is_enough = n >= count and total >= _RANGE_BYTES
        if is_enough or item.offset is None or item.length is None or not is_remote(item.path):
            return max(n, count)
        total += item.length
    return max(count, min(most, len(pending)))


def _screen_source(
    source: Source, known: Known, cutter: "_BlockCutter", find_erased: FindErased | None
) -> Iterator[list[PendingItem]]:
    """List a source, and yield the images that have to be read. The others are counted."""
    listing = iter(source)
    count = _FIRST_ITEMS
    while items := list(islice(listing, count)):
        yield cutter.screen(items, known, find_erased)
        count = min(_SCREENED_ITEMS, 2 * count)


class ItemSpool:
    """Items that wait in a temporary file, because they may be too many for the memory.

    Attributes:
        count: Number of items.
    """

    def __init__(self) -> None:
        self.count = 0
        self._file: IO[bytes] | None = None
        self._writer: Any = None

    def __enter__(self) -> "ItemSpool":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, items: list[PendingItem]) -> None:
        """Add items to the end."""
        if not items:
            return
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="facepipe-")  # noqa: SIM115  closed by __exit__
                options = pa.ipc.IpcWriteOptions(compression="zstd")
                self._writer = pa.ipc.new_stream(self._file, _SPOOLED, options=options)
            flags = pa.array([pending.is_relabelled for pending in items])
            self._writer.write_table(_to_table(items).append_column(_SPOOLED.field("is_relabelled"), flags))
            self.count += len(items)
        except OSError as error:
            folder = tempfile.gettempdir()
            raise StorageError(f"cannot keep the listing in {folder!r} (TMPDIR): {describe_error(error)}") from error

    def read(self) -> Iterator[list[PendingItem]]:
        """Yield all items in batches."""
        if self._file is None:
            return
        self._writer.close()
        self._file.seek(0)
        for batch in pa.ipc.open_stream(self._file):
            *columns, previous, flags = (column.to_pylist() for column in batch.columns)
            items = [WorkItem(*values) for values in zip(*columns, strict=True)]
            yield [PendingItem(*values) for values in zip(items, previous, flags, strict=True)]


class _BlockCutter:
    """Numbers the blocks, and gives each the counts and the new labels since the last one.

    Attributes:
        changes: New labels of known images.
        handed_out: Number of images in the blocks so far.
    """

    def __init__(self, source: Source):
        self.changes = LabelChanges(source)
        self._source = source
        self._number = 0
        self._ignored = 0
        self.handed_out = 0
        self._digest = 0
        # Images per verdict since the last block, (5,).
        self._counts = np.zeros(5, np.int64)

    @property
    def passed_count(self) -> int:
        """Number of images passed over since the last block."""
        return int(self._counts[[SKIP, REPEATED, ERASED]].sum())

    @property
    def has_much_to_report(self) -> bool:
        """Whether so much was passed over, or relabelled, that an empty block should report it."""
        return self.passed_count >= _REPORT_ITEMS or self.changes.count >= _MAX_RELABELLED

    def screen(self, items: list[WorkItem], known: Known, find_erased: FindErased | None) -> list[PendingItem]:
        """Count listed images by verdict, and return those that have to be read."""
        uris = [item.uri for item in items]
        fingerprints = hash_each_in_process([item.fingerprint or "" for item in items])
        screening = known.screen(hash64_each(uris), fingerprints)
        verdicts = screening.verdicts
        if find_erased is not None:
            verdicts = np.where(find_erased(uris) & (verdicts != REPEATED), ERASED, verdicts).astype(np.int8)
        self._counts += np.bincount(verdicts, minlength=5)
        # The label of a changed image waits with it: it is the gallery's business only if the content is the same.
        is_changed = verdicts == CHANGED
        is_relabelled = self.changes.find(items, screening, verdicts == SKIP, is_changed)
        wanted = np.flatnonzero((verdicts == NEW) | is_changed).tolist()
        return [
            PendingItem(items[n], int(screening.contents[n]) if is_changed[n] else None, bool(is_relabelled[n]))
            for n in wanted
        ]

    def make_block(self, part: list[PendingItem], last: bool = False) -> Block:
        """Make a block of items, and begin the counts anew."""
        relabelled = [(pending.item.uri, pending.item.identity) for pending in part if pending.is_relabelled]
        relabelled += self.changes.take(_MAX_RELABELLED)
        items = _to_table(part)
        self.handed_out += items.num_rows
        self._digest = add_digests(self._digest, compute_digest(items["uri"]))
        block = Block(
            number=self._number,
            items=items,
            skipped=int(self._counts[SKIP]),
            repeated=int(self._counts[REPEATED]),
            ignored=self._source.ignored - self._ignored,
            erased=int(self._counts[ERASED]),
            last=last,
            handed_out=self.handed_out,
            digest=self._digest,
            relabelled=_to_label_table(relabelled) if relabelled else None,
            notes=(*self._source.notes, *self.changes.notes) if last else (),
        )
        self._number += 1
        self._ignored = self._source.ignored
        self._counts[:] = 0
        return block


def _to_table(part: list[PendingItem]) -> pa.Table:
    if not part:
        return WORK_ITEM.empty_table()
    # Turn rows into columns in the order of the schema; the last one is the content's hash.
    columns = [*zip(*(pending.item for pending in part), strict=True), [pending.previous for pending in part]]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, WORK_ITEM, strict=True)]
    return pa.table(arrays, schema=WORK_ITEM)


def compute_digest(uris: pa.Array | pa.ChunkedArray) -> int:
    """Compute a digest of a set of images that depends neither on their order nor on how they are grouped.

    Two sets have the digest of their union if the digests are added by `add_digests`.

    Args:
        uris: uris of the images, (n,).
    """
    # A sum, unlike an exclusive or, also tells an image that came twice.
    return int(np.sum(hash64_column(uris), dtype=np.uint64))


def add_digests(first: int, second: int) -> int:
    """Add two digests."""
    return (first + second) % (1 << 64)


def _to_label_table(labels: list[tuple[str, str | None]]) -> pa.Table:
    uris = pa.array([uri for uri, _ in labels], pa.string())
    identities = pa.array([identity for _, identity in labels], pa.string())
    return pa.table([uris, identities], schema=RELABELLED)


_VALUES = ("number", "skipped", "repeated", "ignored", "erased", "last", "handed_out", "digest", "notes")
_TABLES = ("items", "rows", "relabelled")


def encode_block(block: Block) -> dict[str, object]:
    """Encode a block as one row of plain values, for transport between processes."""
    values = {name: getattr(block, name) for name in _VALUES}
    tables = {name: getattr(block, name) for name in _TABLES}
    return {name: None if table is None else encode_table(table) for name, table in tables.items()} | values


def decode_block(row: dict[str, object]) -> Block:
    """Decode a row that `encode_block` made."""
    tables = {name: None if row[name] is None else decode_table(row[name]) for name in _TABLES}  # type: ignore[arg-type]
    values = {name: row[name] for name in _VALUES} | {"notes": tuple(row["notes"])}  # type: ignore[arg-type]
    return Block(**tables, **values)  # type: ignore[arg-type]


def decode_table(data: bytes) -> pa.Table:
    """Decode a table that `encode_table` made."""
    return pa.ipc.open_stream(data).read_all()


def encode_table(table: pa.Table) -> bytes:
    """Encode a table as an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())
