"""What an index owes its gallery: which faces are new since it was built, and which are deleted."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from facepipe.errors import GalleryError, StorageError
from facepipe.gallery import Gallery
from facepipe.gallery.commits.log import find_last_equal_version
from facepipe.gallery.table import FileDifferences, compare_files
from facepipe.index.manifest import INCOMPLETE, Manifest, ShardEntry
from facepipe.index.rows import read_face_ids
from facepipe.index.shard import Shard, write_tombstones
from facepipe.sorted_lookup import is_in_sorted
from facepipe.storage.hashtable import HashTable
from facepipe.storage.store import Store
from facepipe.types import Bool, Int64, UInt64

_IDS_PER_BLOCK = 1 << 20


@dataclass(frozen=True)
class TableFile:
    """A file of the table.

    Attributes:
        path: Below the table's folder.
        faces: Faces in it, at most.
        whole: Whether all of them are to be added.
    """

    path: str
    faces: int
    whole: bool = True


@dataclass
class IndexChanges:
    """What changed between a manifest and a gallery.

    Attributes:
        files: Table files with faces to add.
        fresh: Ids to add from the files that are not whole.
        tombstones: Ids that no search may return, by name of the shards whose ids are to change.
        added: Faces to add.
        removed: Faces that were deleted.
        compared_all: Whether every id was compared, because the log or the files of the manifest's version are deleted.
    """

    files: list[TableFile]
    fresh: HashTable | None
    tombstones: dict[str, Int64] = field(default_factory=dict)
    added: int = 0
    removed: int = 0
    compared_all: bool = False

    def close(self) -> None:
        """Delete the temporary file."""
        if self.fresh is not None:
            self.fresh.close()


def add_all(gallery: Gallery) -> IndexChanges:
    """Return all faces of the gallery as new ones."""
    files = [TableFile(entry["path"], entry["faces"]) for entry in _sort_files(gallery)]
    return IndexChanges(files, None, added=sum(file.faces for file in files))


def find_changes(gallery: Gallery, manifest: Manifest, store: Store, compare_all: bool = False) -> IndexChanges:
    """Compare, id by id, the table files that were added and removed since the manifest's version.

    A face that only moved to another file (by a compaction, or because another row of the file was deleted) is neither
    new nor deleted. A face whose identity or uri changed is both. The work is in proportion to what changed, unless the
    log of the manifest's version has been cleaned.

    Args:
        gallery: the current table.
        manifest: of the index.
        store: of the index.
        compare_all: compare every id instead.
    """
    shards = [Shard(store, entry) for entry in manifest.shards]
    old_gallery = None if compare_all else _open_old_version(gallery, manifest.table_version)
    files = [TableFile(entry["path"], entry["faces"]) for entry in _sort_files(gallery)]
    # Compare only the files that differ between the two versions, if both can be read.
    if old_gallery is not None:
        differences = compare_files(old_gallery, gallery)
        added = set(differences.added)
        added_files = [file for file in files if file.path in added]
        removed = _RemovedFaces(old_gallery, differences)
        try:
            return _compare(gallery, shards, added_files, removed)
        except StorageError:
            # A removed file was vacuumed, so that only elimination tells which ids it held. If a current file is
            # missing the comparison below raises as well.
            pass
    return _compare(gallery, shards, files, None)


def group_files(files: Sequence[TableFile], limit: int) -> Iterator[list[TableFile]]:
    """Group table files into shards of about `limit` faces at most.

    Groups may exceed the limit by half a file, so that the last shard is not a remainder.
    """
    group: list[TableFile] = []
    total = 0
    for file in files:
        if group and total + file.faces / 2 > limit:
            yield group
            group = []
            total = 0
        group.append(file)
        total += file.faces
    if group:
        yield group


def add_tombstones(store: Store, shards: Sequence[ShardEntry], tombstones: dict[str, Int64]) -> list[ShardEntry]:
    """Write the tombstones of the shards that they name, and return the entries of all shards."""
    return [
        write_tombstones(store, entry, tombstones[entry.name]) if entry.name in tombstones else entry
        for entry in shards
    ]


def _sort_files(gallery: Gallery) -> list[dict[str, Any]]:
    return sorted(gallery.files(), key=lambda entry: entry["path"])


def _open_old_version(gallery: Gallery, version: int) -> Gallery | None:
    """Open the version of a gallery that an index answers for; None if it cannot be opened."""
    if version == INCOMPLETE:
        return None
    # Entries that change no file may have come since, and the log before them may have been cleaned.
    if find_last_equal_version(gallery.faces_folder, version) >= gallery.version:
        return gallery
    try:
        return Gallery(gallery.path, version)
    except GalleryError:
        return None


@dataclass(frozen=True)
class _RemovedFaces:
    """Faces that were in the table in an older version, and may not be in it now.

    Attributes:
        old_gallery: the table in the older version.
        differences: its files compared with those of now.
    """

    old_gallery: Gallery
    differences: FileDifferences

    def read_ids(self) -> Iterator[Int64]:
        """Read their ids, a batch at a time."""
        folder = self.old_gallery.faces_folder
        for path in self.differences.removed:
            for batch in read_face_ids(folder, path, deleted=self.old_gallery.deleted_rows):
                yield batch["face_id"].to_numpy()
        for path, rows in self.differences.deleted.items():
            for batch in read_face_ids(folder, path, only=rows):
                yield batch["face_id"].to_numpy()


def _compare(
    gallery: Gallery, shards: list[Shard], added_files: list[TableFile], removed: _RemovedFaces | None
) -> IndexChanges:
    """Compare the ids of added files with those of removed ones.

    Args:
        gallery: the current table.
        shards: oldest first.
        added_files: files that may hold new faces.
        removed: faces that may be deleted; None for all faces that the shards return.
    """
    changes = IndexChanges([], HashTable(), compared_all=removed is None)
    try:
        # indexed: ids that the index returned and that may be deleted. moved: ids that are still in the table.
        with closing(HashTable()) as indexed, closing(HashTable()) as moved:
            # Note the ids that may be deleted, then find which of them the added files hold.
            for ids in _read_removed_ids(shards, removed):
                indexed.add(_to_keys(ids))
            restored = [
                ids for file in added_files for ids in _sort_out(gallery, shards, file, indexed, moved, changes)
            ]
            # Deleted are ids of removed files that did not move. A second pass takes less memory than keeping them.
            deleted = [ids[~moved.get(_to_keys(ids))[0]] for ids in _read_removed_ids(shards, removed)]
    except BaseException:
        changes.close()
        raise
    changes.tombstones = _update_tombstones(shards, np.concatenate([*deleted, np.empty(0, np.int64)]), restored)
    changes.removed = sum(len(ids) for ids in deleted)
    return changes


def _sort_out(
    gallery: Gallery,
    shards: list[Shard],
    file: TableFile,
    indexed: HashTable,
    moved: HashTable,
    changes: IndexChanges,
) -> Iterator[Int64]:
    """Note which ids of a file are to be added, and which only moved.

    Yields:
        Ids that are taken off the tombstones, because the table holds them again.
    """
    assert changes.fresh is not None
    count_before = changes.fresh.count
    faces = 0
    for batch in read_face_ids(gallery.faces_folder, file.path, deleted=gallery.deleted_rows):
        ids = batch["face_id"].to_numpy()
        faces += len(ids)
        # Known are ids that the index returns or holds under a tombstone; a new identity or uri makes them new.
        tombstoned = _mask_tombstoned(shards, ids)
        known = indexed.get(_to_keys(ids))[0] | tombstoned
        unchanged = np.zeros(len(ids), bool)
        unchanged[known] = _mask_same_labels(shards, ids[known], batch.filter(pa.array(known)))
        moved.add(_to_keys(ids[unchanged]))
        changes.fresh.add(_to_keys(ids[~unchanged]))
        yield ids[unchanged & tombstoned]
    # A file with nothing but new faces is later read without looking up each id.
    new = changes.fresh.count - count_before
    if new:
        changes.files.append(TableFile(file.path, file.faces, whole=new == faces))
        changes.added += new


def _read_removed_ids(shards: list[Shard], removed: _RemovedFaces | None) -> Iterator[Int64]:
    return read_live_ids(shards) if removed is None else removed.read_ids()


def read_live_ids(shards: Sequence[Shard]) -> Iterator[Int64]:
    """Read the ids that the shards return, a block at a time."""
    for shard in shards:
        for at in range(0, len(shard.ids), _IDS_PER_BLOCK):
            ids = np.asarray(shard.ids[at : at + _IDS_PER_BLOCK])
            yield ids[~np.isin(ids, shard.tombstones)] if shard.tombstones.size else ids


def find_unreturned(store: Store, shards: Sequence[Shard], before: Manifest, now: Manifest) -> Int64:
    """Find the ids that some open shards return, and the index of a newer manifest does not.

    Args:
        store: of the index.
        shards: open shards of the older manifest, or some of them.
        before: the older manifest.
        now: the newer one.
    """
    entries = {entry.name: entry for entry in now.shards}
    # Faces of a shard that was replaced are in none that was there before. If none was, nothing more is opened.
    known_names = {entry.name for entry in before.shards}
    is_replaced = any(shard.entry.name not in entries for shard in shards)
    replacements = [Shard(store, entry) for entry in now.shards if is_replaced and entry.name not in known_names]
    parts = [np.empty(0, np.int64)]
    for shard in shards:
        entry = entries.get(shard.entry.name)
        if entry is None:
            # The shard was replaced: look for its ids in the new shards.
            for ids in read_live_ids([shard]):
                remaining = ids
                for other in replacements:
                    is_returned = other.find_rows(remaining)[0] & ~is_in_sorted(other.tombstones, remaining)
                    remaining = remaining[~is_returned]
                parts.append(remaining)
        elif entry.tombstones != shard.entry.tombstones:
            parts.append(Shard(store, entry).tombstones)
    return np.unique(np.concatenate(parts))


def _mask_tombstoned(shards: list[Shard], ids: Int64) -> Bool:
    """Mask the ids that a shard holds under a tombstone: they are restored by taking the tombstone off."""
    tombstoned = np.zeros(len(ids), bool)
    for shard in shards:
        if shard.tombstones.size:
            tombstoned |= is_in_sorted(shard.tombstones, ids)
    return tombstoned


def _mask_same_labels(shards: list[Shard], ids: Int64, faces: pa.RecordBatch) -> Bool:
    """Mask the ids that have the same identity and uri in the newest shard that holds them.

    Args:
        shards: oldest first.
        ids: face ids (n,).
        faces: their rows in the table.
    """
    same = np.zeros(len(ids), bool)
    pending = np.arange(len(ids))
    # From the newest shard back: the label of an id in a newer one counts.
    for shard in reversed(shards):
        in_shard, rows = shard.find_rows(ids[pending])
        found = pending[in_shard]
        labels = shard.read_labels(rows[in_shard])
        is_same = np.ones(len(found), bool)
        for name in ("identity", "uri"):
            expected = np.array(faces[name].cast(pa.string()).to_pylist(), object)[found]
            is_same &= np.array(labels[name].to_pylist(), object) == expected
        same[found] = is_same
        pending = pending[~in_shard]
    return same


def _update_tombstones(shards: list[Shard], deleted: Int64, restored: Iterable[Int64]) -> dict[str, Int64]:
    """Compute the tombstones of the shards that get other ones than before, by name."""
    restored_ids = np.concatenate([*restored, np.empty(0, np.int64)])
    tombstones = {}
    # An id that a newer shard returns must stay under its tombstone in the older one.
    returned_by_newer = np.empty(0, np.int64)
    for shard in reversed(shards):
        # Lift the tombstones of restored ids, and add those of deleted ids.
        lifted = np.setdiff1d(restored_ids, returned_by_newer)
        remaining = shard.tombstones[~np.isin(shard.tombstones, lifted)]
        in_shard, _ = shard.find_rows(deleted)
        updated = np.union1d(remaining, deleted[in_shard])
        if not np.array_equal(updated, shard.tombstones):
            tombstones[shard.entry.name] = updated
        returned_by_newer = np.union1d(returned_by_newer, restored_ids[shard.find_rows(restored_ids)[0]])
    return tombstones


def _to_keys(ids: Int64) -> UInt64:
    return ids.astype(np.uint64)
