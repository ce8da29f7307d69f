"""One shard: an index that stock faiss opens, with its vectors, ids and labels in memory-mapped files beside it.

Written under a temporary name, synced, checksummed, renamed; never changed afterwards.
"""

import mmap
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from facepipe.errors import IndexingError, StorageError
from facepipe.index.grid import grid
from facepipe.index.manifest import (
    IDS,
    INDEX,
    LABELS,
    ROWS,
    VECTORS,
    File,
    ShardEntry,
    Template,
    digest,
)
from facepipe.index.rows import Rows
from facepipe.nearest.faiss_engine import faiss, write_index
from facepipe.schema import EMBEDDING_DIM
from facepipe.storage import describe_error, sync_file, sync_folder
from facepipe.storage.store import Store
from facepipe.types import Bool, Float32, Int64

_LABEL_ROWS = 65536  # rows of a batch of labels.arrow: where a row's label is, is a division
_LABELS = pa.schema([("uri", pa.string()), ("identity", pa.string())])
_NPY_HEADER = 128
_COPY_ROWS = 65536
_ADD_ROWS = 16384
_BUCKET_BITS = 22  # 16 MiB of offsets into the sorted ids, at most


class ShardWriter:
    """Takes rows, then makes them a shard. Used as a context: what was not finished is deleted."""

    def __init__(self, store: Store, index: Any):
        self._folder, self._index = store.folder, index
        self._partial = os.path.join(self._folder, f"shard-{secrets.token_hex(6)}.partial")
        self._ids: list[Int64] = []
        self._count = 0

    def __enter__(self) -> "ShardWriter":
        try:
            os.mkdir(self._partial)
            self._vectors: BinaryIO = open(os.path.join(self._partial, VECTORS), "wb")
            self._vectors.write(bytes(_NPY_HEADER))
            self._labels = _LabelWriter(os.path.join(self._partial, LABELS))
        except OSError as error:
            raise StorageError(f"cannot write {self._partial!r}: {describe_error(error)}") from error
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._vectors, self._labels):
            with suppress(OSError, pa.ArrowException):  # a full disk: closing writes what is buffered
                file.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def add(self, rows: Rows) -> None:
        """Add rows to the index and the side files."""
        self.keep(rows)
        add_to(self._index, rows.vectors, rows.ids)

    def keep(self, rows: Rows) -> None:
        """Add rows to the side files only: the index has them already."""
        try:
            self._vectors.write(np.ascontiguousarray(rows.vectors, "<f4").data)
            self._labels.write(rows.uris, rows.identities)
        except (OSError, pa.ArrowException) as error:
            raise StorageError(f"cannot write {self._partial!r}: {str(error).splitlines()[0]}") from error
        self._ids.append(np.array(rows.ids, np.int64))
        self._count += len(rows)

    def finish(self) -> ShardEntry | None:
        """The shard, under its final name; None where there was no row."""
        if not self._count:
            return None
        try:
            self._labels.close()
            self._vectors.seek(0)
            self._vectors.write(_npy_header(self._count))
            self._vectors.close()
            self._write_ids()
            write_index(self._index, os.path.join(self._partial, INDEX))
            files = {}
            for name in (INDEX, VECTORS, IDS, ROWS, LABELS):
                sync_file(os.path.join(self._partial, name))
                files[name] = digest(os.path.join(self._partial, name))
            sync_folder(self._partial)
            final = self._partial.removesuffix(".partial")
            os.rename(self._partial, final)
            sync_folder(self._folder)
        except (OSError, RuntimeError, pa.ArrowException) as error:  # faiss reports a full disk as RuntimeError
            raise StorageError(f"cannot write {self._partial!r}: {str(error).splitlines()[0]}") from error
        return ShardEntry(os.path.basename(final), self._count, files)

    def _write_ids(self) -> None:
        ids = np.concatenate(self._ids)
        self._ids = []
        order = np.argsort(ids, kind="stable")
        np.save(os.path.join(self._partial, ROWS), order.astype(np.uint32))
        np.save(os.path.join(self._partial, IDS), ids[order])


class _LabelWriter:
    """Writes uri and identity in batches of exactly 65,536 rows."""

    def __init__(self, path: str):
        self._file: Any = pa.ipc.new_file(path, _LABELS)
        self._pending: list[pa.Table] = []
        self._rows = 0

    def write(self, uris: pa.Array, identities: pa.Array) -> None:
        self._pending.append(pa.table([uris, identities], schema=_LABELS))
        self._rows += len(uris)
        while self._rows >= _LABEL_ROWS:
            self._flush(_LABEL_ROWS)

    def _flush(self, rows: int) -> None:
        table = pa.concat_tables(self._pending).combine_chunks()
        self._file.write_table(table.slice(0, rows), max_chunksize=rows)
        self._pending, self._rows = [table.slice(rows)], table.num_rows - rows

    def close(self) -> None:
        if self._file is not None:
            if self._rows:
                self._flush(self._rows)
            self._file.close()
            self._file = None


def _npy_header(rows: int) -> bytes:
    """The header of a (rows, 128) float32 .npy file, always 128 bytes long."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {EMBEDDING_DIM}), }}"
    start = b"\x93NUMPY\x01\x00" + (_NPY_HEADER - 10).to_bytes(2, "little")
    return start + text.encode().ljust(_NPY_HEADER - 11) + b"\n"


def add_to(index: Any, vectors: Float32, ids: Int64) -> None:
    """Add unit vectors to an index: on the grid where it has lists, as they are where it is exact."""
    has_lists = faiss.try_extract_index_ivf(index) is not None
    for at in range(0, len(ids), _ADD_ROWS):
        part = np.ascontiguousarray(vectors[at : at + _ADD_ROWS])
        index.add_with_ids(grid(part) if has_lists else part, np.ascontiguousarray(ids[at : at + _ADD_ROWS]))


def build_shard(store: Store, template: Template, batches: Iterable[Rows]) -> ShardEntry | None:
    """A shard of the rows; None where there are none."""
    store.fetch(template.name, template.file.bytes, template.file.sha256)
    path = store.local_path(template.name)
    try:
        index = faiss.read_index(path)
    except RuntimeError as error:
        raise IndexingError(
            f"the template {path!r} cannot be opened: `facepipe index GALLERY --repair` rebuilds what is damaged"
        ) from error
    with ShardWriter(store, index) as writer:
        for rows in batches:
            writer.add(rows)
        return writer.finish()


def merge_shards(store: Store, entries: Iterable[ShardEntry]) -> ShardEntry | None:
    """One shard of several, without their dead. Nothing is quantised anew: the answers stay what they were."""
    parts = [Shard(store, entry) for entry in entries]
    with ShardWriter(store, joined_index(parts)) as writer:
        for part in parts:
            for rows in part.live_rows():
                writer.keep(rows)
        return writer.finish()


def joined_index(shards: "Sequence[Shard]") -> Any:
    """The indexes of shards as one, in memory, without their dead."""
    joined: Any = None
    for shard in shards:
        index = shard.open_index(mapped=False)
        if shard.dead.size:
            index.remove_ids(faiss.IDSelectorBatch(shard.dead))
        if joined is None:
            joined = index
        else:
            joined.merge_from(index, 0)
    return joined


class Shard:
    """A published shard, read-only: everything is mapped into memory, nothing is read before it is needed.

    ids (n,) sorted int64 and rows (n,) uint32: where each id's vector and label are; vectors (n, 128) float32;
    dead: sorted ids that no search returns. Raises IndexingError, naming the file, where one is missing or cut short.
    """

    def __init__(self, store: Store, entry: ShardEntry):
        self.entry = entry
        self._store = store
        self._folder = store.local_path(entry.name)
        if store.is_complete:
            for name in entry.files:
                self._require(name)
        self.ids: Int64 = self._mapped(IDS)
        self.rows: npt.NDArray[np.uint32] = self._mapped(ROWS)
        self._shift = np.int64(63 - min(_BUCKET_BITS, max(1, (len(self.ids) - 1).bit_length())))
        buckets = np.arange(1 << (63 - int(self._shift)), dtype=np.int64) << self._shift
        self._starts = np.minimum(np.searchsorted(self.ids, buckets), len(self.ids) - 1).astype(np.uint32)
        self.dead: Int64 = np.empty(0, np.int64)
        if entry.tombstones and entry.tombstones_file:
            path = _required(store, entry.tombstones, entry.tombstones_file)
            try:
                self.dead = np.load(path)
            except (OSError, ValueError) as error:
                raise _damaged(path, error) from error
        self._labels: Any = None

    @cached_property
    def vectors(self) -> Float32:
        """(n, 128) float32 by row; of a mirrored shard fetched when they are asked for."""
        return self._mapped(VECTORS, scattered=True)

    def _require(self, name: str) -> str:
        return _required(self._store, f"{self.entry.name}/{name}", self.entry.files[name])

    def _mapped(self, name: str, scattered: bool = False) -> npt.NDArray[Any]:
        self._require(name)
        path = os.path.join(self._folder, name)
        try:
            array = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from error
        if scattered and isinstance(array, np.memmap):
            # Candidates lie anywhere: reading ahead would fetch 128 KiB from the disk for 512 bytes.
            array._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
        return np.asarray(array)

    def read_vectors(self, start: int, stop: int) -> Float32:
        """Vectors of rows from `start` up to `stop`, read in sequence: mapping all of them would fill the memory."""
        count = max(0, min(stop, len(self.vectors)) - start) * EMBEDDING_DIM
        offset = _NPY_HEADER + 4 * EMBEDDING_DIM * start
        path = self._require(VECTORS)  # it may have gone since the index was opened
        return np.fromfile(path, np.float32, count, offset=offset).reshape(-1, EMBEDDING_DIM)

    def open_index(self, mapped: bool = True) -> Any:
        """The faiss index. A mapped one must not be changed: removing ids from it would crash the process."""
        path = self._require(INDEX)
        try:
            return faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC if mapped else 0)
        except RuntimeError as error:
            raise IndexingError(
                f"{self._folder!r} cannot be opened: `facepipe index GALLERY --repair` rebuilds what is damaged"
            ) from error

    def locate(self, ids: Int64) -> tuple[Bool, Int64]:
        """(whether the shard holds each id, its row)."""
        at = self._starts[ids >> self._shift].astype(np.int64)
        last = len(self.ids) - 1
        # Ids are hashes: a bucket holds one on average, and its neighbours are in the same cache line.
        behind = np.flatnonzero(self.ids[at] < ids)
        while behind.size:
            at[behind] += 1
            behind = behind[at[behind] < last]
            behind = behind[self.ids[at[behind]] < ids[behind]]
        np.minimum(at, last, out=at)
        rows = self.rows[at].astype(np.int64)
        if rows.size and rows.max() >= self.entry.vectors:  # what follows a row is read without looking
            raise _damaged(os.path.join(self._folder, ROWS), ValueError("a row beyond the last"))
        return self.ids[at] == ids, rows

    def labels(self, rows: Int64) -> pa.Table:
        """uri and identity of rows, in their order."""
        if not len(rows):
            return _LABELS.empty_table()
        if self._labels is None:
            path = self._require(LABELS)
            try:
                self._labels = pa.ipc.open_file(pa.memory_map(path))
            except (OSError, pa.ArrowException) as error:
                raise _damaged(path, error) from error
        order = np.argsort(rows, kind="stable")
        batches, starts = np.unique(rows[order] // _LABEL_ROWS, return_index=True)
        ends = [*starts[1:], len(rows)]
        try:
            parts = [
                pa.Table.from_batches([self._labels.get_batch(int(n))]).take(
                    pa.array(rows[order[a:b]] - n * _LABEL_ROWS)
                )
                for n, a, b in zip(batches, starts, ends, strict=True)
            ]
        except (OSError, IndexError, pa.ArrowException) as error:
            raise _damaged(os.path.join(self._folder, LABELS), error) from error
        back = np.empty(len(rows), np.int64)
        back[order] = np.arange(len(rows))
        return pa.concat_tables(parts).take(pa.array(back))

    def mask_live(self) -> Bool | None:
        """(n,) by row, or None where all are alive."""
        if not self.dead.size:
            return None
        found, rows = self.locate(self.dead)
        mask = np.ones(len(self.ids), bool)
        mask[rows[found]] = False
        return mask

    def read_ids_by_row(self) -> Int64:
        """Ids in the order of the vectors."""
        ids = np.empty(len(self.ids), np.int64)
        ids[self.rows] = self.ids
        return ids

    def live_rows(self) -> Iterator[Rows]:
        """What a search can return, in the order of the vectors."""
        alive, ids = self.mask_live(), self.read_ids_by_row()
        for at in range(0, len(ids), _COPY_ROWS):
            chosen = np.arange(at, min(at + _COPY_ROWS, len(ids)))
            vectors = self.read_vectors(at, at + _COPY_ROWS)
            if alive is not None:
                chosen, vectors = chosen[alive[chosen]], vectors[alive[chosen]]
            if len(chosen):
                names = self.labels(chosen).combine_chunks()
                uris, identities = (names[name].combine_chunks() for name in ("uri", "identity"))
                yield Rows(ids[chosen], vectors, uris, identities)


def _damaged(path: str, error: Exception) -> IndexingError:
    return IndexingError(
        f"{path!r} of the index is damaged ({str(error).splitlines()[0][:100]}): "
        "`facepipe index GALLERY --repair` rebuilds what is damaged"
    )


def _required(store: Store, name: str, file: File) -> str:
    """The path of a file that is there and as long as it was written, fetched into a mirror if need be."""
    path = os.path.join(store.folder, name)
    try:
        store.fetch(name, file.bytes, file.sha256)
        size = os.path.getsize(path)
    except (OSError, StorageError) as error:
        reason = describe_error(error) if isinstance(error, OSError) else str(error)
        raise IndexingError(
            f"{path!r} of the index cannot be read ({reason}): "
            "`facepipe index GALLERY --repair` rebuilds what is damaged"
        ) from error
    if size != file.bytes:
        raise IndexingError(
            f"{path!r} has {size} bytes, not the {file.bytes} that were written: "
            "`facepipe index GALLERY --repair` rebuilds what is damaged"
        )
    return path


def bury(store: Store, entry: ShardEntry, dead: Int64) -> ShardEntry:
    """The shard's entry with these ids as its dead (all of them: earlier ones are not added)."""
    if not len(dead):
        return replace(entry, dead=0, tombstones=None, tombstones_file=None)
    name = f"dead-{secrets.token_hex(6)}.npy"
    path = store.local_path(name)
    try:
        np.save(path, np.unique(dead))
        sync_file(path)
    except OSError as error:
        raise StorageError(f"cannot write {path!r}: {describe_error(error)}") from error
    return replace(entry, dead=len(np.unique(dead)), tombstones=name, tombstones_file=digest(path))
