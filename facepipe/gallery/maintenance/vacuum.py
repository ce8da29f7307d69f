"""Files that no reader needs any more: parts that left the table or never came into it, and the older log."""

import json
import re
import time
from collections.abc import Iterator
from urllib.parse import unquote

from facepipe import storage
from facepipe.gallery.table import Gallery, open_table

_LOG = "_delta_log"
_VERSION = re.compile(r"^(\d{20})\.(?:json|checkpoint(?:\.\d+\.\d+)?\.parquet|crc)$")
_TORN = re.compile(r"#\d+$|\.tmp$")  # what a writer that was killed in a commit leaves in the log


def find_unreferenced(gallery: Gallery, older_than: float = 0.0) -> list[storage.Entry]:
    """Parquet files below faces/ that the table does not name, and has not named for `older_than` seconds, nor are they
    younger than that.

    The caller holds the gallery's lease: what a run in flight has written and not yet committed is among them.
    """
    base = gallery.faces_folder.rstrip("/") + "/"
    named = {file["path"] for file in gallery.files()}
    now = time.time()
    if older_than:
        named |= set(_left_since(gallery, now - older_than))
    return [
        found
        for found in storage.list_files(gallery.faces_folder)
        if (name := found.url.removeprefix(base)).endswith(".parquet")
        and not name.startswith(_LOG)
        and name not in named
        and (not older_than or now - found.modified > older_than)
    ]


def _left_since(gallery: Gallery, when: float) -> Iterator[str]:
    """Files that were in the table at a time and are no more; a version's own file is as old as the version."""
    for found in storage.list_files(storage.join(gallery.faces_folder, _LOG)):
        if found.url.endswith(".json") and found.modified > when:
            for line in storage.read(found.url.encode()).splitlines():
                left = json.loads(line).get("remove")
                if left:
                    yield unquote(left["path"])


def delete_unreferenced(gallery: Gallery, older_than: float = 0.0) -> list[storage.Entry]:
    """Delete what `find_unreferenced` finds; what was deleted."""
    found = find_unreferenced(gallery, older_than)
    for file in found:
        storage.delete(file.url)
    return found


def delete_history(gallery: Gallery) -> int:
    """Delete the log of all versions before the newest, which is kept as a checkpoint; how many files went.

    The log holds the smallest and largest uri and identity of files that are long gone.
    """
    table = open_table(gallery.faces_folder)
    table.create_checkpoint()
    base, deleted = storage.join(gallery.faces_folder, _LOG).rstrip("/") + "/", 0
    for found in list(storage.list_files(base)):
        name = found.url.removeprefix(base)
        version = _VERSION.match(name)
        if _TORN.search(name) or (version and int(version[1]) < table.version()):
            storage.delete(found.url)
            deleted += 1
    return deleted
