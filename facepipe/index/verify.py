"""Whether an index is what was written, and answers for the table it says it answers for."""

import os

import numpy as np

from facepipe.errors import FacepipeError, IndexingError
from facepipe.gallery import Gallery
from facepipe.hashtable import HashTable
from facepipe.index.manifest import File, Manifest, digest, folder_of, load
from facepipe.index.rows import face_ids
from facepipe.index.shard import Shard


def damaged(folder: str, manifest: Manifest) -> dict[str, list[str]]:
    """By name of the shard or template: its files that are absent, or whose size or checksum differs, and how."""
    found: dict[str, list[str]] = {}
    for owner, path, file in _files(manifest):
        problem = _problem(os.path.join(folder, path), file)
        if problem:
            found.setdefault(owner, []).append(f"index/{path}: {problem}")
    return found


def _files(manifest: Manifest) -> list[tuple[str, str, File]]:
    files = [(manifest.template.name, manifest.template.name, manifest.template.file)]
    for shard in manifest.shards:
        files += [(shard.name, os.path.join(shard.name, name), file) for name, file in shard.files.items()]
        if shard.tombstones and shard.tombstones_file:
            files.append((shard.name, shard.tombstones, shard.tombstones_file))
    return files


def _problem(path: str, file: File) -> str | None:
    try:
        now = digest(path)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return (error.strerror or str(error)).lower()
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
    folder = folder_of(gallery.path)
    problems = [line for lines in damaged(folder, manifest).values() for line in lines]
    if problems:
        return [*problems, "`facepipe index GALLERY --repair` rebuilds the damaged shards and only those"]
    try:
        table = Gallery(gallery.path, manifest.table_version)
        return _compare(table, [Shard(folder, entry) for entry in manifest.shards])
    except FacepipeError:
        return []  # cleaned from the log, or vacuumed: there is nothing to compare with


def _compare(table: Gallery, shards: list[Shard]) -> list[str]:
    held, problems = HashTable(), []
    twice = 0
    for shard in shards:
        if len(shard.ids) != shard.entry.vectors:
            problems.append(f"index/{shard.entry.name}: {len(shard.ids)} ids for {shard.entry.vectors} vectors")
        for at in range(0, len(shard.ids), 1 << 20):
            ids = np.asarray(shard.ids[at : at + (1 << 20)])
            live = ids[~np.isin(ids, shard.dead)] if shard.dead.size else ids
            twice += int((~held.add(live.astype(np.uint64))).sum())
    expected, missing = 0, 0
    for file in table.files():
        for batch in face_ids(table.faces_folder, file["path"]):
            found = held.get(batch["face_id"].to_numpy().astype(np.uint64))[0]
            expected += len(found)
            missing += int((~found).sum())
    foreign = held.count - (expected - missing)
    held.close()
    for count, what in ((twice, "faces that the index returns twice"), (missing, "faces of the table that it lacks")):
        if count:
            problems.append(f"index: {count} {what}")
    if foreign > 0:
        problems.append(f"index: {foreign} faces that the table does not hold")
    return problems
