"""Delete files that no reader needs any more: parts outside the table, and the older log."""

import json
import re
import time
from collections.abc import Iterator
from urllib.parse import unquote

from facepipe import storage
from facepipe.gallery.table import Gallery, open_table

_LOG = "_delta_log"
_VERSION = re.compile(r"^(\d{20})\.(?:json|checkpoint(?:\.\d+\.\d+)?\.parquet|crc)$")
_UNFINISHED = re.compile(r"#\d+$|\.tmp$")  # what a writer leaves in the log if it is killed in a commit


def find_unreferenced(gallery: Gallery, older_than: float = 0.0) -> list[storage.Entry]:
    """Find Parquet files below faces/ that the table does not name.

    The caller holds the gallery's lease, because parts that a run has written and not yet committed are among them.

    Args:
        gallery: the gallery.
        older_than: seconds since which the table must not have named a file, and for which the file must have existed.
    """
    base = gallery.faces_folder.rstrip("/") + "/"
    named = {file["path"] for file in gallery.files()}
    now = time.time()
    # Files that left the table a short time ago may still be read by someone with an older version.
    if older_than:
        named |= set(_read_removed_since(gallery, now - older_than))
    unreferenced = []
    for entry in storage.list_files(gallery.faces_folder):
        name = entry.url.removeprefix(base)
        is_part = name.endswith(".parquet") and not name.startswith(_LOG)
        is_old = not older_than or now - entry.modified > older_than
        if is_part and is_old and name not in named:
            unreferenced.append(entry)
    return unreferenced


def _read_removed_since(gallery: Gallery, time_s: float) -> Iterator[str]:
    """Yield the files that left the table after a time; the log's file of a version is as old as the version."""
    for entry in storage.list_files(storage.join(gallery.faces_folder, _LOG)):
        if entry.url.endswith(".json") and entry.modified > time_s:
            for line in storage.read(entry.url.encode()).splitlines():
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
    table = open_table(gallery.faces_folder)
    # The checkpoint holds the whole state, so that the entries before it are not needed.
    table.create_checkpoint()
    base = storage.join(gallery.faces_folder, _LOG).rstrip("/") + "/"
    count = 0
    for entry in list(storage.list_files(base)):
        name = entry.url.removeprefix(base)
        version = _VERSION.match(name)
        if _UNFINISHED.search(name) or (version and int(version[1]) < table.version()):
            storage.delete(entry.url)
            count += 1
    return count
