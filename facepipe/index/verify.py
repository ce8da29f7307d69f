"""Whether an index is what was written, and returns the faces of the table that it claims to cover."""

from collections.abc import Iterator
from contextlib import closing

import numpy as np

from facepipe.errors import FacepipeError, IndexingError, StorageError
from facepipe.gallery import Gallery
from facepipe.index.manifest import INCOMPLETE, FileDigest, Manifest, list_files, load, open_index_store
from facepipe.index.rows import read_face_ids
from facepipe.index.shard import Shard
from facepipe.index.update import read_live_ids
from facepipe.storage import NoSuchFileError, describe_error, get_entry, join
from facepipe.storage.hashtable import HashTable
from facepipe.storage.store import Store
from facepipe.types import Int64


def find_damage(store: Store, manifest: Manifest) -> dict[str, list[str]]:
    """Find the files that are missing, or whose size or checksum differs.

    Returns:
        Descriptions of the problems, by name of the shard or template.
    """
    problems: dict[str, list[str]] = {}
    # Tombstones lie beside the shards' folders, and their problems count as the shard's.
    tombstone_owners = {shard.tombstones: shard.name for shard in manifest.shards}
    for path, file in list_files(manifest):
        owner = tombstone_owners.get(path, path.split("/")[0])
        problem = _check_file(store, path, file)
        if problem:
            problems.setdefault(owner, []).append(f"index/{path}: {problem}")
    return problems


def _check_file(store: Store, path: str, file: FileDigest) -> str | None:
    try:
        digest = FileDigest(*store.measure(path))
    except FileNotFoundError:
        return "is missing"
    except StorageError as error:
        return str(error)
    except OSError as error:
        return describe_error(error)
    if digest.bytes != file.bytes:
        return f"has {digest.bytes} bytes, not {file.bytes}"
    return None if digest.sha256 == file.sha256 else "checksum differs, the file was altered"


def check_index_files(gallery: Gallery) -> list[str]:
    """List the files of a gallery's index that are missing, or have other sizes than its manifest names."""
    try:
        manifest = load(gallery.path)
    except IndexingError as error:
        return [str(error)]
    folder = open_index_store(gallery.path).url
    problems = []
    for path, file in list_files(manifest):
        try:
            size = get_entry(join(folder, path)).size
        except NoSuchFileError:
            problems.append(f"index/{path}: is missing")
            continue
        if size != file.bytes:
            problems.append(f"index/{path}: has {size} bytes, not {file.bytes}")
    return problems


def verify_index(gallery: Gallery) -> list[str]:
    """List the problems of a gallery's index.

    These are damaged files, and ids that are missing, foreign, deleted without cause, or there twice. Ids are compared
    with the table version that the index was built from, if that can still be read.
    """
    try:
        manifest = load(gallery.path)
    except IndexingError as error:
        return [str(error)]
    store = open_index_store(gallery.path)
    problems = [line for lines in find_damage(store, manifest).values() for line in lines]
    if manifest.table_version == INCOMPLETE and not problems:
        return [f"index: damaged shards were removed: `facepipe index {gallery.path}` adds their faces again"]
    if problems:
        return [*problems, "`facepipe index GALLERY --repair` rebuilds the damaged shards and only those"]
    # The files are sound: compare the ids with the table.
    try:
        table = Gallery(gallery.path, manifest.table_version)
        return _compare_ids(table, [Shard(store, entry) for entry in manifest.shards])
    except FacepipeError:
        return []  # cleaned from the log, or vacuumed: there is nothing to compare with


def _compare_ids(table: Gallery, shards: list[Shard]) -> list[str]:
    """Compare the ids that the shards return with those of the table."""
    with closing(HashTable()) as indexed:
        # Adding an id a second time shows that it is returned twice.
        repeated = sum(int((~indexed.add(ids.astype(np.uint64))).sum()) for ids in read_live_ids(shards))
        faces = 0
        missing = 0
        for ids in _read_table_ids(table):
            faces += len(ids)
            missing += int((~indexed.get(ids.astype(np.uint64))[0]).sum())
        # Of the indexed ids, `faces - missing` are in the table; the others are foreign.
        foreign = indexed.count - (faces - missing)
    counts = {
        "faces that the index returns twice": repeated,
        "faces of the table that it lacks": missing,
        "faces that the table does not hold": foreign,
    }
    problems = [f"index: {count} {problem}" for problem, count in counts.items() if count > 0]
    incomplete = [shard.entry for shard in shards if len(shard.ids) != shard.entry.vectors]
    problems += [f"index/{entry.name}: does not have the {entry.vectors} ids of the manifest" for entry in incomplete]
    return problems


def _read_table_ids(table: Gallery) -> Iterator[Int64]:
    for entry in table.files():
        for batch in read_face_ids(table.faces_folder, entry["path"], deleted=table.deleted_rows):
            yield batch["face_id"].to_numpy()
