"""Delete files that no reader needs any more: parts outside the table, and the older log."""

import json
import re
import time
from collections.abc import Iterator
from urllib.parse import unquote

from facepipe import storage
from facepipe.gallery.commits.log import LOG, SCRATCH, UNFINISHED, write_checkpoint
from facepipe.gallery.commits.parts import is_part
from facepipe.gallery.table import Gallery
from facepipe.storage.inside import is_link

_VERSION = re.compile(r"(\d{20})\.(?:json|checkpoint(?:\.\d+\.\d+)?\.parquet|crc)")


def find_unreferenced(gallery: Gallery, older_than: float = 0.0) -> list[storage.Entry]:
    """Find parts in faces/ that the table does not name. Other Parquet files there are of somebody else.

    The caller holds the gallery's lease, because parts that a run has written and not yet committed are among them.

    Args:
        gallery: the gallery.
        older_than: seconds since which the table must not have named a file, and for which the file must have existed.
    """
    now = time.time()
    entries, others = _list_unnamed(gallery)
    # A table that other programs wrote to may have had files of any name. Its log says which.
    if others:
        removed = set(_read_removed_since(gallery, 0.0))
        entries += [entry for entry in others if _get_name(gallery, entry) in removed]
    # Files that left the table a short time ago may still be read by someone with an older version.
    if older_than:
        recent = set(_read_removed_since(gallery, now - older_than))
        entries = [entry for entry in entries if _get_name(gallery, entry) not in recent]
        entries = [entry for entry in entries if now - entry.modified > older_than]
    return entries


def find_foreign(gallery: Gallery) -> list[storage.Entry]:
    """Find Parquet files in faces/ that were never part of the table, as far as its log tells. Nothing deletes them."""
    others = _list_unnamed(gallery)[1]
    removed = set(_read_removed_since(gallery, 0.0)) if others else set()
    return [entry for entry in others if _get_name(gallery, entry) not in removed]


def _list_unnamed(gallery: Gallery) -> tuple[list[storage.Entry], list[storage.Entry]]:
    """List the Parquet files that the table does not name: parts, and others. Links are in neither list."""
    named = {file["path"] for file in gallery.files()}
    parts: list[storage.Entry] = []
    others: list[storage.Entry] = []
    for entry in storage.list_files(gallery.faces_folder):
        name = _get_name(gallery, entry)
        is_candidate = name.endswith(".parquet") and not name.startswith((LOG, SCRATCH)) and name not in named
        if is_candidate and not is_link(entry.url):
            (parts if is_part(name) else others).append(entry)
    return parts, others


def _get_name(gallery: Gallery, entry: storage.Entry) -> str:
    return entry.url.removeprefix(gallery.faces_folder.rstrip("/") + "/")


def list_log(gallery: Gallery) -> Iterator[storage.Entry]:
    """List the files of the table's log: entries and checkpoints. Other files may lie beside them."""
    base = storage.join(gallery.faces_folder, LOG).rstrip("/") + "/"
    for entry in storage.list_files(base):
        if _VERSION.fullmatch(entry.url.removeprefix(base)):
            yield entry


def _read_removed_since(gallery: Gallery, time_s: float) -> Iterator[str]:
    """Yield the files that left the table after a time; the log's file of a version is as old as the version."""
    for entry in list_log(gallery):
        if entry.url.endswith(".json") and entry.modified > time_s:
            for line in storage.read(entry.url).splitlines():
                action = json.loads(line).get("remove")
                if action:
                    yield unquote(action["path"])


def delete_unreferenced(gallery: Gallery, older_than: float = 0.0) -> list[storage.Entry]:
    """Delete the files that `find_unreferenced` finds; return them."""
    entries = find_unreferenced(gallery, older_than)
    for entry in entries:
        storage.delete(entry.url)
    return entries


def delete_history(gallery: Gallery) -> int:
    """Delete the log of all versions before the newest, which is kept as a checkpoint.

    The log holds the smallest and largest uri and identity of files that were deleted long ago.

    Returns:
        The number of files deleted.
    """
    # The checkpoint holds the whole state, so that the entries before it are not needed. It is on disk before they go.
    newest = write_checkpoint(gallery.faces_folder)
    base = storage.join(gallery.faces_folder, LOG).rstrip("/") + "/"
    count = 0
    for entry in list(storage.list_files(base)):
        name = entry.url.removeprefix(base)
        version = _VERSION.fullmatch(name)
        if UNFINISHED.fullmatch(name) or (version and int(version[1]) < newest):
            storage.delete(entry.url)
            count += 1
    return count
