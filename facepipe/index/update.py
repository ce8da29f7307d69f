"""What an index owes its gallery: which faces are new since it was made, and which are gone."""

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from facepipe.errors import GalleryError, StorageError
from facepipe.gallery import Gallery
from facepipe.index.manifest import Manifest
from facepipe.index.rows import face_ids
from facepipe.index.shard import Shard
from facepipe.sorted_lookup import is_in_sorted
from facepipe.storage.hashtable import HashTable
from facepipe.storage.store import Store
from facepipe.types import Bool, Int64, UInt64


@dataclass(frozen=True)
class TableFile:
    """A file of the table, the faces in it (at most), and whether all of them are to be added."""

    path: str
    faces: int
    whole: bool = True


@dataclass
class Changes:
    """Between a manifest and a gallery.

    files: table files with faces to add; fresh: the ids to take from those that are not whole; dead: all ids that no
    search may return, by name of the shards where they are others than before; full: every id was compared, since the
    log or the files of then are gone.
    """

    files: list[TableFile]
    fresh: HashTable | None
    dead: dict[str, Int64] = field(default_factory=dict)
    added: int = 0
    removed: int = 0
    full: bool = False

    def close(self) -> None:
        """Give the temporary file back."""
        if self.fresh is not None:
            self.fresh.close()


def everything(gallery: Gallery) -> Changes:
    """All faces as new ones."""
    files = [TableFile(file["path"], file["faces"]) for file in _sorted(gallery)]
    return Changes(files, None, added=sum(file.faces for file in files))


def changes(gallery: Gallery, manifest: Manifest, store: Store, only_full: bool = False) -> Changes:
    """Compare, id by id, the table's files that came and went since the manifest's version.

    A face that only moved to another file (a compaction, a neighbour's deletion) is neither new nor gone; one whose
    identity changed is both. What is read is in proportion to what changed, unless the log of then has been cleaned.
    """
    shards = [Shard(store, entry) for entry in manifest.shards]
    then = None if only_full else _then(gallery, manifest.table_version)
    now = {file["path"]: file["faces"] for file in _sorted(gallery)}
    if then is not None:
        try:
            return _diff(gallery, shards, [(p, n) for p, n in now.items() if p not in then], sorted(then - now.keys()))
        except StorageError:  # vacuumed: the ids that were in it can only be told by elimination
            return _diff(gallery, shards, list(now.items()), None)  # raises as well where a file of now is missing
    return _diff(gallery, shards, list(now.items()), None)


def _sorted(gallery: Gallery) -> list[dict[str, Any]]:
    return sorted(gallery.files(), key=lambda file: file["path"])


def _then(gallery: Gallery, version: int) -> set[str] | None:
    try:
        return {file["path"] for file in Gallery(gallery.path, version).files()}
    except GalleryError:
        return None


def _diff(gallery: Gallery, shards: list[Shard], came: list[tuple[str, int]], gone: list[str] | None) -> Changes:
    """`gone` None: all that the shards return may be gone."""
    found = Changes([], HashTable(), full=gone is None)
    try:
        with closing(HashTable()) as held, closing(HashTable()) as kept:
            for ids in _gone_ids(gallery, shards, gone):
                held.add(_keys(ids))
            revived = [
                ids for path, faces in came for ids in _sort_out(gallery, shards, (path, faces), held, kept, found)
            ]
            gone_now = [ids[~kept.get(_keys(ids))[0]] for ids in _gone_ids(gallery, shards, gone)]
    except BaseException:
        found.close()
        raise
    found.dead = _tombstones(shards, np.concatenate([*gone_now, np.empty(0, np.int64)]), revived)
    found.removed = int(sum(map(len, gone_now)))
    return found


def _sort_out(
    gallery: Gallery, shards: list[Shard], file: tuple[str, int], held: HashTable, kept: HashTable, found: Changes
) -> Iterator[Int64]:
    """Note which ids of a file are to be added and which only moved; yields those that come back from the dead."""
    assert found.fresh is not None
    before, faces = found.fresh.count, 0
    for batch in face_ids(gallery.faces_folder, file[0]):
        ids = batch["face_id"].to_numpy()
        faces += len(ids)
        buried = _buried(shards, ids)
        present = held.get(_keys(ids))[0] | buried
        same = np.zeros(len(ids), bool)
        same[present] = _same_identity(shards, ids[present], batch["identity"].filter(pa.array(present)))
        kept.add(_keys(ids[same]))
        found.fresh.add(_keys(ids[~same]))
        yield ids[same & buried]
    new = found.fresh.count - before
    if new:
        found.files.append(TableFile(file[0], file[1], whole=new == faces))
        found.added += new


def _gone_ids(gallery: Gallery, shards: list[Shard], gone: list[str] | None) -> Iterator[Int64]:
    if gone is None:
        for shard in shards:
            for at in range(0, len(shard.ids), 1 << 20):
                ids = np.asarray(shard.ids[at : at + (1 << 20)])
                yield ids[~np.isin(ids, shard.dead)] if shard.dead.size else ids
        return
    for path in gone:
        for batch in face_ids(gallery.faces_folder, path):
            yield batch["face_id"].to_numpy()


def _buried(shards: list[Shard], ids: Int64) -> Bool:
    """Which ids are in a shard, dead: they come back by being taken off its tombstones."""
    found = np.zeros(len(ids), bool)
    for shard in shards:
        found |= is_in_sorted(shard.dead, ids)
    return found


def _same_identity(shards: list[Shard], ids: Int64, identities: pa.Array) -> Bool:
    """Whether the newest shard that holds each id has it under the given identity."""
    same = np.zeros(len(ids), bool)
    left = np.arange(len(ids))
    given = np.array(identities.cast(pa.string()).to_pylist(), object)
    for shard in reversed(shards):
        found, rows = shard.locate(ids[left])
        held = np.array(shard.labels(rows[found])["identity"].to_pylist(), object)
        same[left[found]] = held == given[left[found]]
        left = left[~found]
    return same


def _tombstones(shards: list[Shard], gone: Int64, revived: Iterable[Int64]) -> dict[str, Int64]:
    back = np.concatenate([*revived, np.empty(0, np.int64)])
    dead = {}
    newer = np.empty(0, np.int64)  # an id that a newer shard returns must stay dead in the older one
    for shard in reversed(shards):
        stays = shard.dead[~np.isin(shard.dead, np.setdiff1d(back, newer))]
        found, _ = shard.locate(gone)
        now = np.union1d(stays, gone[found])
        if not np.array_equal(now, shard.dead):
            dead[shard.entry.name] = now
        returned = back[shard.locate(back)[0]]
        newer = np.union1d(newer, returned)
    return dead


def _keys(ids: Int64) -> UInt64:
    return ids.astype(np.uint64)
