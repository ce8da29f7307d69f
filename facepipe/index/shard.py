"""One shard: an index that stock faiss opens, with its vectors, ids and labels in memory-mapped files beside it.

Written under a temporary name, synced, checksummed, renamed; never changed afterwards.
"""

import errno
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

from facepipe.errors import IndexDamagedError, IndexingError, IndexReplacedError, StorageError
from facepipe.index import manifest as manifests
from facepipe.index.grid import round_to_grid
from facepipe.index.manifest import (
    IDS,
    INDEX,
    LABELS,
    ROWS,
    VECTORS,
    FileDigest,
    ShardEntry,
    Template,
    compute_digest,
)
from facepipe.index.rows import FaceRows
from facepipe.nearest.faiss_engine import faiss, write_index
from facepipe.storage import describe_error, sync_file, sync_folder
from facepipe.storage.inside import require_no_link
from facepipe.storage.store import AlteredFileError, Store
from facepipe.types import Bool, Float32, Int64

_LABEL_BATCH_ROWS = 65536  # rows per batch of labels.arrow: the batch of a row is a division
_LABELS = pa.schema([("uri", pa.string()), ("identity", pa.string())])
# A header of fixed length can be written last, when the number of rows is known.
_NPY_HEADER_BYTES = 128
# Rows at a time when shards are copied, and when vectors are added to an index.
_COPY_ROWS = 65536
_ADD_ROWS = 16384
_MAX_BUCKET_BITS = 22  # 16 MiB of offsets into the sorted ids, at most
# Errors that say nothing about the file itself: no permission, no memory, too many open files, a server that is away.
_UNDAMAGED = frozenset({errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ESTALE})
_REPAIR_HINT = "`facepipe index GALLERY --repair` rebuilds what is damaged"


class ShardWriter:
    """Takes rows and makes them a shard. Used as a context: an unfinished shard is deleted."""

    def __init__(self, store: Store, index: Any):
        self._folder = store.folder
        self._index = index
        self._partial = os.path.join(self._folder, f"shard-{secrets.token_hex(6)}.partial")
        self._ids: list[Int64] = []
        self._count = 0

    def __enter__(self) -> "ShardWriter":
        try:
            os.mkdir(self._partial)
            self._vectors: BinaryIO = open(os.path.join(self._partial, VECTORS), "wb")
            # Leave room for the header, which `finish` writes.
            self._vectors.write(bytes(_NPY_HEADER_BYTES))
            self._labels = _LabelWriter(os.path.join(self._partial, LABELS))
        except OSError as error:
            raise StorageError(f"cannot write {self._partial!r}: {describe_error(error)}") from error
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._vectors, self._labels):
            with suppress(OSError, pa.ArrowException):  # on a full disk, because closing writes what is buffered
                file.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def add(self, rows: FaceRows) -> None:
        """Add rows to the index and the side files."""
        self.add_side_files(rows)
        add_vectors(self._index, rows.vectors, rows.ids)

    def add_side_files(self, rows: FaceRows) -> None:
        """Add rows to the side files only: the index has them already."""
        try:
            self._vectors.write(np.ascontiguousarray(rows.vectors, "<f4").data)
            self._labels.write(rows.uris, rows.identities)
        except (OSError, pa.ArrowException) as error:
            raise StorageError(f"cannot write {self._partial!r}: {str(error).splitlines()[0]}") from error
        self._ids.append(np.array(rows.ids, np.int64))
        self._count += len(rows)

    def finish(self) -> ShardEntry | None:
        """Give the shard its final name and return its entry; None if there was no row."""
        if not self._count:
            return None
        try:
            # Complete the files of the folder.
            self._labels.close()
            self._vectors.seek(0)
            self._vectors.write(_build_npy_header(self._count, self._index.d))
            self._vectors.close()
            self._write_ids()
            write_index(self._index, os.path.join(self._partial, INDEX))
            # Everything is on disk before the folder gets its final name.
            files = {}
            for name in (INDEX, VECTORS, IDS, ROWS, LABELS):
                sync_file(os.path.join(self._partial, name))
                files[name] = compute_digest(os.path.join(self._partial, name))
            sync_folder(self._partial)
            final = self._partial.removesuffix(".partial")
            os.rename(self._partial, final)
            sync_folder(self._folder)
        except (OSError, RuntimeError, pa.ArrowException) as error:  # faiss reports a full disk as RuntimeError
            raise StorageError(f"cannot write {self._partial!r}: {str(error).splitlines()[0]}") from error
        return ShardEntry(os.path.basename(final), self._count, files)

    def _write_ids(self) -> None:
        # Ids are stored sorted, each with its row, so that lookups work on mapped files.
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
        while self._rows >= _LABEL_BATCH_ROWS:
            self._flush(_LABEL_BATCH_ROWS)

    def _flush(self, rows: int) -> None:
        table = pa.concat_tables(self._pending).combine_chunks()
        self._file.write_table(table.slice(0, rows), max_chunksize=rows)
        self._pending = [table.slice(rows)]
        self._rows = table.num_rows - rows

    def close(self) -> None:
        if self._file is not None:
            if self._rows:
                self._flush(self._rows)
            self._file.close()
            self._file = None


def _build_npy_header(rows: int, dim: int) -> bytes:
    """Build the header of a (rows, dim) float32 .npy file, always 128 bytes long."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {dim}), }}"
    # Magic, version 1.0 and the header's length in two bytes; then the text, padded with spaces.
    start = b"\x93NUMPY\x01\x00" + (_NPY_HEADER_BYTES - 10).to_bytes(2, "little")
    return start + text.encode().ljust(_NPY_HEADER_BYTES - 11) + b"\n"


def add_vectors(index: Any, vectors: Float32, ids: Int64) -> None:
    """Add unit vectors (n, dim) to an index: rounded to the grid if it has lists, unchanged if it is exact."""
    has_lists = faiss.try_extract_index_ivf(index) is not None
    for at in range(0, len(ids), _ADD_ROWS):
        part = np.ascontiguousarray(vectors[at : at + _ADD_ROWS])
        part_ids = np.ascontiguousarray(ids[at : at + _ADD_ROWS])
        index.add_with_ids(round_to_grid(part) if has_lists else part, part_ids)


def build_shard(store: Store, template: Template, batches: Iterable[FaceRows]) -> ShardEntry | None:
    """Build a shard of the rows; None if there are none.

    Raises:
        IndexDamagedError: the template cannot be opened.
    """
    store.fetch(template.name, template.file.bytes, template.file.sha256)
    path = store.local_path(template.name)
    try:
        index = faiss.read_index(path)
    except RuntimeError as error:
        raise IndexDamagedError(f"the template {path!r} cannot be opened: {_REPAIR_HINT}") from error
    with ShardWriter(store, index) as writer:
        for rows in batches:
            writer.add(rows)
        return writer.finish()


def merge_shards(store: Store, entries: Iterable[ShardEntry]) -> ShardEntry | None:
    """Merge several shards into one, without their deleted vectors; None if no vector is left.

    No vector is quantised again, so that search results stay the same.
    """
    shards = [Shard(store, entry) for entry in entries]
    with ShardWriter(store, merge_indexes(shards)) as writer:
        for shard in shards:
            for rows in shard.read_live_rows():
                writer.add_side_files(rows)
        return writer.finish()


def merge_indexes(shards: "Sequence[Shard]") -> Any:
    """Merge the faiss indexes of shards in memory, without their deleted vectors."""
    merged: Any = None
    for shard in shards:
        # Deleted vectors are removed before the merge; a mapped index must not be changed.
        index = shard.open_index(mapped=False)
        if shard.tombstones.size:
            index.remove_ids(faiss.IDSelectorBatch(shard.tombstones))
        if merged is None:
            merged = index
        else:
            merged.merge_from(index, 0)
    return merged


def move_shard(store: Store, entry: ShardEntry, template: Any) -> ShardEntry | None:
    """Rewrite a shard with other centroids, and without its deleted vectors; None if no vector is left.

    Only faces of lists whose centroids differ are quantised again.

    Args:
        store: of the index.
        entry: of the shard.
        template: the trained, empty index with the new centroids. It gets the faces of the shard.
    """
    shard = Shard(store, entry)
    index = shard.open_index(mapped=False)
    if shard.tombstones.size:
        index.remove_ids(faiss.IDSelectorBatch(shard.tombstones))
    old = faiss.extract_index_ivf(index)
    new = faiss.extract_index_ivf(template)
    before = old.quantizer.reconstruct_n(0, old.nlist)
    after = new.quantizer.reconstruct_n(0, new.nlist)
    # Take the faces of the lists that change out of the old index, and the other lists into the new one.
    changed = np.flatnonzero((before != after).any(axis=1))
    moving = np.concatenate([np.empty(0, np.int64), *(read_list(old.invlists, int(number)) for number in changed)])
    if len(moving):
        index.remove_ids(faiss.IDSelectorBatch(moving))
    # faiss merges whole indexes only if their centroids are the same; those of the lists that stay are.
    new.invlists.merge_from(old.invlists, 0)
    new.ntotal += old.ntotal
    template.ntotal = new.ntotal
    old.ntotal = 0
    for at in range(0, len(moving), _ADD_ROWS):
        ids = moving[at : at + _ADD_ROWS]
        add_vectors(template, shard.vectors[shard.find_rows(ids)[1]], ids)
    with ShardWriter(store, template) as writer:
        for rows in shard.read_live_rows():
            writer.add_side_files(rows)
        return writer.finish()


def read_list(inverted: Any, number: int) -> Int64:
    """Read the face ids of one of the inverted lists of a faiss index."""
    size = inverted.list_size(number)
    if not size:
        return np.empty(0, np.int64)
    pointer = inverted.get_ids(number)
    try:
        return np.array(faiss.rev_swig_ptr(pointer, size), np.int64)
    finally:
        inverted.release_ids(number, pointer)


class Shard:
    """A published shard, read-only. Its files are mapped into memory and read only if needed.

    Attributes:
        entry: Of the manifest.
        ids: Sorted face ids (n,).
        rows: Rows (n,) of the ids: where each id's vector and label are.
        tombstones: Sorted ids that no search returns.
    """

    def __init__(self, store: Store, entry: ShardEntry):
        """Open a shard.

        Args:
            store: of the index.
            entry: of the manifest.

        Raises:
            IndexDamagedError: a file is missing or cut short; the message names it.
            IndexReplacedError: the index was replaced since its manifest was read.
            IndexingError: the disk or the store cannot be read.
        """
        self.entry = entry
        self._store = store
        self._folder = store.local_path(entry.name)
        # Check the sizes now if all files are here. A mirror fetches files on first use.
        if store.is_complete:
            for name in entry.files:
                self._require(name)
        self.ids: Int64 = self._map(IDS)
        self.rows: npt.NDArray[np.uint32] = self._map(ROWS)
        # Buckets of ids by their leading bits, and the position of the first id of each.
        self._shift = np.int64(63 - min(_MAX_BUCKET_BITS, max(1, (len(self.ids) - 1).bit_length())))
        buckets = np.arange(1 << (63 - int(self._shift)), dtype=np.int64) << self._shift
        self._starts = np.minimum(np.searchsorted(self.ids, buckets), len(self.ids) - 1).astype(np.uint32)
        self.tombstones: Int64 = np.empty(0, np.int64)
        if entry.tombstones and entry.tombstones_file:
            path = _require_file(store, entry.tombstones, entry.tombstones_file)
            try:
                self.tombstones = np.load(path)
            except (OSError, ValueError) as error:
                raise _make_damage_error(path, error) from error
        self._labels: Any = None

    @cached_property
    def vectors(self) -> Float32:
        """Vectors (n, dim) by row. Those of a mirrored shard are fetched on first use."""
        return self._map(VECTORS, scattered=True)

    def _require(self, name: str) -> str:
        return _require_file(self._store, f"{self.entry.name}/{name}", self.entry.files[name])

    def _map(self, name: str, scattered: bool = False) -> npt.NDArray[Any]:
        """Map an array from a file; `scattered` says that its rows are read in random order."""
        self._require(name)
        path = os.path.join(self._folder, name)
        try:
            array = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise _make_damage_error(path, error) from error
        if scattered and isinstance(array, np.memmap):
            # Candidates lie anywhere: reading ahead would fetch 128 KiB from the disk for 512 bytes.
            array._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
        return np.asarray(array)

    def read_vectors(self, start: int, stop: int) -> Float32:
        """Read the vectors of rows from `start` up to `stop` in sequence; mapping all of them would fill the memory."""
        # Numbers to read, and the bytes before them.
        rows, dim = self.vectors.shape
        count = max(0, min(stop, rows) - start) * dim
        offset = _NPY_HEADER_BYTES + 4 * dim * start
        path = self._require(VECTORS)  # it may have been deleted since the index was opened
        return np.fromfile(path, np.float32, count, offset=offset).reshape(-1, dim)

    def open_index(self, mapped: bool = True) -> Any:
        """Open the faiss index. A mapped one must not be changed: removing ids from it would crash the process."""
        path = self._require(INDEX)
        try:
            return faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC if mapped else 0)
        except RuntimeError as error:
            raise IndexDamagedError(f"{self._folder!r} cannot be opened: {_REPAIR_HINT}") from error

    def find_rows(self, ids: Int64) -> tuple[Bool, Int64]:
        """Find the rows of ids.

        Returns:
            Whether the shard holds each id (n,), and its row (n,).
        """
        # Begin at the first id of the bucket and step forward to the id itself.
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
        if rows.size and rows.max() >= self.entry.vectors:  # faiss reads the vector of a row without checking it
            raise _make_damage_error(os.path.join(self._folder, ROWS), ValueError("a row beyond the last"))
        return self.ids[at] == ids, rows

    def read_labels(self, rows: Int64) -> pa.Table:
        """Read uri and identity of rows, in their order."""
        if not len(rows):
            return _LABELS.empty_table()
        self._open_labels()
        # Take the rows batch by batch, then restore their order.
        order = np.argsort(rows, kind="stable")
        ordered_rows = rows[order]
        batches, starts = np.unique(ordered_rows // _LABEL_BATCH_ROWS, return_index=True)
        stops = [*starts[1:], len(rows)]
        parts = []
        try:
            for batch, start, stop in zip(batches, starts, stops, strict=True):
                table = pa.Table.from_batches([self._labels.get_batch(int(batch))])
                parts.append(table.take(pa.array(ordered_rows[start:stop] - batch * _LABEL_BATCH_ROWS)))
        except (OSError, IndexError, pa.ArrowException) as error:
            raise _make_damage_error(os.path.join(self._folder, LABELS), error) from error
        back = np.empty(len(rows), np.int64)
        back[order] = np.arange(len(rows))
        return pa.concat_tables(parts).take(pa.array(back))

    def _open_labels(self) -> None:
        if self._labels is None:
            path = self._require(LABELS)
            try:
                self._labels = pa.ipc.open_file(pa.memory_map(path))
            except (OSError, pa.ArrowException) as error:
                raise _make_damage_error(path, error) from error

    def open_files(self) -> None:
        """Open all files now, and fetch them into a mirror. Those that are open can be read if others delete them."""
        self._open_labels()
        self.vectors  # noqa: B018  # a cached property

    def hide(self, ids: Int64) -> int:
        """Return some faces no more, as if they had tombstones. Nothing is written.

        Returns:
            How many of them this shard returned before.
        """
        hidden = np.setdiff1d(ids[self.find_rows(ids)[0]], self.tombstones)
        self.tombstones = np.union1d(self.tombstones, hidden)
        return len(hidden)

    def find_live_rows(self) -> Bool | None:
        """Find the rows that a search can return, as a mask (n,); None if it can return all."""
        if not self.tombstones.size:
            return None
        in_shard, rows = self.find_rows(self.tombstones)
        mask = np.ones(len(self.ids), bool)
        mask[rows[in_shard]] = False
        return mask

    def read_ids_by_row(self) -> Int64:
        """Read the ids (n,) in the order of the vectors."""
        ids = np.empty(len(self.ids), np.int64)
        ids[self.rows] = self.ids
        return ids

    def read_live_rows(self) -> Iterator[FaceRows]:
        """Read what a search can return, in the order of the vectors."""
        live = self.find_live_rows()
        ids = self.read_ids_by_row()
        for at in range(0, len(ids), _COPY_ROWS):
            rows = np.arange(at, min(at + _COPY_ROWS, len(ids)))
            vectors = self.read_vectors(at, at + _COPY_ROWS)
            if live is not None:
                vectors = vectors[live[rows]]
                rows = rows[live[rows]]
            if len(rows):
                labels = self.read_labels(rows)
                uris = labels["uri"].combine_chunks()
                yield FaceRows(ids[rows], vectors, uris, labels["identity"].combine_chunks())


def _make_damage_error(path: str, error: Exception) -> IndexingError:
    """Make the error to raise for a file that is damaged, or that this machine cannot read at the moment."""
    cause = str(error).splitlines()[0][:100]
    if isinstance(error, OSError) and error.errno in _UNDAMAGED:
        return IndexingError(f"{path!r} of the index cannot be read ({cause})")
    return IndexDamagedError(f"{path!r} of the index is damaged ({cause}): {_REPAIR_HINT}")


def _require_file(store: Store, name: str, file: FileDigest) -> str:
    """Return the path of a file that exists and is as long as it was written, fetched into a mirror if needed.

    Raises:
        IndexReplacedError: the index was replaced since its manifest was read, and the file is deleted.
        IndexDamagedError: the file is missing, or is not what was written.
        IndexingError: the disk or the store cannot be read.
    """
    path = os.path.join(store.folder, name)
    try:
        require_no_link(store.folder, name)
        store.fetch(name, file.bytes, file.sha256)
        size = os.path.getsize(path)
    except (OSError, StorageError) as error:
        raise _explain_unreadable(store, name, error) from error
    if size != file.bytes:
        raise IndexDamagedError(f"{path!r} has {size} bytes, not the {file.bytes} that were written: {_REPAIR_HINT}")
    return path


def _explain_unreadable(store: Store, name: str, error: Exception) -> IndexingError:
    """Make the error for a file that cannot be read: it was replaced, is damaged, or is out of reach."""
    path = os.path.join(store.folder, name)
    gallery = os.path.dirname(store.url.rstrip("/"))
    cause = describe_error(error) if isinstance(error, OSError) else str(error)
    try:
        is_in_use = manifests.is_in_use(gallery, name)
        is_missing = store.is_missing(name)
    except StorageError as second:
        return IndexingError(f"{path!r} of the index cannot be read ({cause}): {second}")
    if not is_in_use:
        return IndexReplacedError(f"the index of {gallery!r} was replaced while it was read: open it again")
    message = f"{path!r} of the index cannot be read ({cause}): {_REPAIR_HINT}"
    is_damaged = is_missing or isinstance(error, AlteredFileError)
    return IndexDamagedError(message) if is_damaged else IndexingError(message)


def write_tombstones(store: Store, entry: ShardEntry, ids: Int64) -> ShardEntry:
    """Write the ids that are deleted in a shard, and return its new entry.

    Args:
        store: of the index.
        entry: of the shard.
        ids: all deleted ids: earlier ones are not added.
    """
    if not len(ids):
        return replace(entry, dead=0, tombstones=None, tombstones_file=None)
    unique_ids = np.unique(ids)
    # A new name for every version: readers of the old manifest still need the old file.
    name = f"dead-{secrets.token_hex(6)}.npy"
    path = store.local_path(name)
    try:
        np.save(path, unique_ids)
        sync_file(path)
    except OSError as error:
        raise StorageError(f"cannot write {path!r}: {describe_error(error)}") from error
    return replace(entry, dead=len(unique_ids), tombstones=name, tombstones_file=compute_digest(path))
