"""Delete files that no reader needs any more: parts outside the table, and the older log.

A run may be paused anywhere, for hours, and another run may have taken the gallery over when it goes on. What is
deleted here was listed while the lease was provably held. So no later run has written it, and no name is used twice.
An earlier run, which may be asleep before its commit, finds the version taken that its commit needs.
"""

import json
import re
import time
from collections.abc import Iterator
from urllib.parse import unquote

from facepipe import storage
from facepipe.gallery.commits.committer import fence_commits
from facepipe.gallery.commits.log import LOG, OUTDATED, SCRATCH, UNFINISHED, write_checkpoint
from facepipe.gallery.commits.parts import is_part
from facepipe.gallery.marks import is_marks_file
from facepipe.gallery.table import Gallery
from facepipe.storage.inside import is_link
from facepipe.storage.lease import Lease, hold_lease
from facepipe.storage.uploads import abort_uploads

_VERSION = re.compile(r"(\d{20})\.(?:json|checkpoint(?:\.\d+\.\d+)?\.parquet|crc)")


def find_unreferenced(gallery: Gallery, older_than: float = 0.0) -> list[storage.Entry]:
    """Find parts in faces/ that the table does not name, for counting. Other files there are of somebody else.

    Parts that a run has written and not yet committed are among them, unless the caller holds the gallery's lease.

    Args:
        gallery: the gallery.
        older_than: seconds since which the table must not have named a file, and for which the file must have existed.
    """
    return _select_unreferenced(gallery, _list_candidates(gallery), older_than, time.time())


def find_foreign(gallery: Gallery) -> list[storage.Entry]:
    """Find Parquet files in faces/ that were never part of the table, as far as its log tells. Nothing deletes them."""
    others = _split_unnamed(gallery, _list_candidates(gallery))[1]
    removed = set(_read_removed_since(gallery, 0.0)) if others else set()
    return [entry for entry in others if _get_name(gallery, entry) not in removed]


def _list_candidates(gallery: Gallery) -> list[storage.Entry]:
    """List the Parquet files in faces/, named by the table or not. Links are left out."""
    entries = []
    for entry in storage.list_files(gallery.faces_folder):
        name = _get_name(gallery, entry)
        if name.endswith(".parquet") and not name.startswith((LOG, SCRATCH)) and not is_link(entry.url):
            entries.append(entry)
    return entries


def _select_unreferenced(
    gallery: Gallery, entries: list[storage.Entry], older_than: float, now: float
) -> list[storage.Entry]:
    """Select the files that the table's version does not name, and has not named for a time."""
    unreferenced, others = _split_unnamed(gallery, entries)
    # A table that other programs wrote to may have had files of any name. Its log says which.
    if others:
        removed = set(_read_removed_since(gallery, 0.0))
        unreferenced += [entry for entry in others if _get_name(gallery, entry) in removed]
    # Files that left the table a short time ago may still be read by someone with an older version.
    if older_than:
        recent = set(_read_removed_since(gallery, now - older_than))
        unreferenced = [entry for entry in unreferenced if _get_name(gallery, entry) not in recent]
        unreferenced = [entry for entry in unreferenced if now - entry.modified > older_than]
    return unreferenced


def _split_unnamed(gallery: Gallery, entries: list[storage.Entry]) -> tuple[list[storage.Entry], list[storage.Entry]]:
    """Split the files that the table does not name into parts and others."""
    named = {*gallery.list_paths(), gallery.marks_file}
    parts: list[storage.Entry] = []
    others: list[storage.Entry] = []
    for entry in entries:
        name = _get_name(gallery, entry)
        if name not in named:
            (parts if is_part(name) or is_marks_file(name) else others).append(entry)
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
    """Yield the files, and marks, that left the table after a time. An entry is as old as its version."""
    for entry in list_log(gallery):
        if entry.url.endswith(".json") and entry.modified > time_s:
            for line in storage.read(entry.url).splitlines():
                action = json.loads(line)
                if action.get("remove"):
                    yield unquote(action["remove"]["path"])
                elif OUTDATED in (action.get("commitInfo") or {}):
                    yield action["commitInfo"][OUTDATED]


def claim_unreferenced(gallery: str, lease: Lease, older_than: float = 0.0) -> list[storage.Entry]:
    """Find the files in faces/ that no run and no reader needs any more, and that stay unneeded.

    Parts that the caller itself has not committed yet are among them.

    Args:
        gallery: path or URL of the gallery.
        lease: of the gallery.
        older_than: seconds since which the table must not have named a file, and for which the file must have existed.

    Returns:
        The files, to be deleted by `delete_files`.

    Raises:
        GalleryBusyError: another run has taken the lease over.
    """
    # List first. The lease is renewed afterwards: so everything in the list was there before any later run began.
    listed = _list_candidates(Gallery(gallery))
    now = lease.renew()  # by the clock that dates the files
    if not _select_unreferenced(Gallery(gallery), listed, older_than, now):
        return []
    # No commit of an earlier run is accepted from here on, so that the log says the last word about the list.
    fence_commits(gallery, lease)
    return _select_unreferenced(Gallery(gallery), listed, older_than, now)


def delete_files(entries: list[storage.Entry], lease: Lease) -> None:
    """Delete the files that `claim_unreferenced` has found. Raises GalleryBusyError if the lease is lost."""
    storage.delete_many((entry.url for entry in entries), before_batch=lease.check)


def delete_uploads(gallery: str, lease: Lease) -> int:
    """Have the store delete parts of the table's files whose upload never ended; return how many uploads there were.

    Args:
        gallery: path or URL of the gallery.
        lease: of the gallery. Uploads that have begun since it was taken are spared.

    Raises:
        GalleryBusyError: another run has taken the lease over.
        UploadsUnknownError: the store cannot be asked for them.
    """
    folder = storage.join(gallery, "faces")
    return len(abort_uploads(folder, lease, lambda name: is_part(name) or name.startswith(f"{LOG}/")))


def delete_history(gallery: Gallery, lease: Lease) -> int:
    """Delete the log of all versions before the newest, which is kept as a checkpoint.

    The log holds the smallest and largest uri and identity of files that were deleted long ago.

    Args:
        gallery: the gallery; its newest version counts.
        lease: of the gallery.

    Returns:
        The number of files deleted.

    Raises:
        GalleryBusyError: another run has taken the lease over.
    """
    return delete_older_log(gallery.faces_folder, lease)


def delete_older_log(folder: str, lease: Lease) -> int:
    """Delete the log of all versions of a table before the newest, which is kept as a checkpoint.

    Args:
        folder: path or URL of the table.
        lease: under which the table is written.

    Returns:
        The number of files deleted.

    Raises:
        GalleryBusyError: another run has taken the lease over.
    """
    # The checkpoint holds the whole state, so that the entries before it are not needed. It is on disk before they go.
    newest = write_checkpoint(folder, lease)
    base = storage.join(folder, LOG).rstrip("/") + "/"
    outdated = []
    for entry in storage.list_files(base):
        name = entry.url.removeprefix(base)
        version = _VERSION.fullmatch(name)
        # What a killed commit left has no version. It may look like what a commit has just begun to write.
        if UNFINISHED.fullmatch(name) or (version and int(version[1]) < newest):
            outdated.append(entry.url)
    lease.renew()
    storage.delete_many(outdated, before_batch=lease.check)
    return len(outdated)


def delete_older_versions(gallery: str) -> int:
    """Hold a gallery's lease, and delete the log of all versions before the newest.

    Args:
        gallery: path or URL.

    Returns:
        The number of files deleted.

    Raises:
        GalleryBusyError: another run holds the lease.
    """
    with hold_lease(gallery) as lease:
        return delete_history(Gallery(gallery), lease)
