"""Whether an index is what was written, and answers for the table it says it answers for."""

from collections.abc import Iterator
from contextlib import closing

import numpy as np

from facepipe.errors import FacepipeError, IndexingError, StorageError
from facepipe.gallery import Gallery
from facepipe.index.manifest import File, Manifest, files_of, load, open_index_store
from facepipe.index.rows import face_ids
from facepipe.index.shard import Shard
from facepipe.storage import describe_error
from facepipe.storage.hashtable import HashTable
from facepipe.storage.store import Store
from facepipe.types import Int64

_STEP = 1 << 20


def damaged(store: Store, manifest: Manifest) -> dict[str, list[str]]:
    """By name of the shard or template: its files that are absent, or whose size or checksum differs, and how."""
    found: dict[str, list[str]] = {}
    for owner, path, file in _files(manifest):
        problem = _problem(store, path, file)
        if problem:
            found.setdefault(owner, []).append(f"index/{path}: {problem}")
    return found


def _files(manifest: Manifest) -> list[tuple[str, str, File]]:
    buried = {shard.tombstones: shard.name for shard in manifest.shards}
    return [(buried.get(name, name.split("/")[0]), name, file) for name, file in files_of(manifest)]


def _problem(store: Store, path: str, file: File) -> str | None:
    try:
        now = File(*store.measure(path))
    except FileNotFoundError:
        return "is missing"
    except StorageError as error:
        return str(error)
    except OSError as error:
        return describe_error(error)
    if now.bytes != file.bytes:
        return f"has {now.bytes} bytes, not {file.bytes}"
    return "checksum differs, the file was altered" if now.sha256 != file.sha256 else None


def verify_index(gallery: Gallery) -> list[str]:
    """Problems of a gallery's index: damaged files, ids that are missing, foreign, dead without cause or there twice.

    Compares with the table version that the index was made from, where that can still be read.
    """
    try:
        manifest = load(gallery.path)
    except IndexingError as error:
        return [str(error)]
    store = open_index_store(gallery.path)
    problems = [line for lines in damaged(store, manifest).values() for line in lines]
    if problems:
        return [*problems, "`facepipe index GALLERY --repair` rebuilds the damaged shards and only those"]
    try:
        table = Gallery(gallery.path, manifest.table_version)
        return _compare(table, [Shard(store, entry) for entry in manifest.shards])
    except FacepipeError:
        return []  # cleaned from the log, or vacuumed: there is nothing to compare with


def _compare(table: Gallery, shards: list[Shard]) -> list[str]:
    with closing(HashTable()) as held:
        twice = sum(int((~held.add(ids.astype(np.uint64))).sum()) for ids in _live_ids(shards))
        faces = missing = 0
        for ids in _table_ids(table):
            faces += len(ids)
            missing += int((~held.get(ids.astype(np.uint64))[0]).sum())
        foreign = held.count - (faces - missing)
    counted = (
        (twice, "faces that the index returns twice"),
        (missing, "faces of the table that it lacks"),
        (foreign, "faces that the table does not hold"),
    )
    problems = [f"index: {count} {what}" for count, what in counted if count > 0]
    short = [shard.entry for shard in shards if len(shard.ids) != shard.entry.vectors]
    return problems + [f"index/{entry.name}: not the {entry.vectors} ids that it is to have" for entry in short]


def _live_ids(shards: list[Shard]) -> Iterator[Int64]:
    for shard in shards:
        for at in range(0, len(shard.ids), _STEP):
            ids = np.asarray(shard.ids[at : at + _STEP])
            yield ids[~np.isin(ids, shard.dead)] if shard.dead.size else ids


def _table_ids(table: Gallery) -> Iterator[Int64]:
    for file in table.files():
        for batch in face_ids(table.faces_folder, file["path"]):
            yield batch["face_id"].to_numpy()
