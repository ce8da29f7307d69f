"""Purges: rows that an erasure has hidden, and that are still on disk, are removed within the days it was given.

`erased/ID.purge` says by when, and in which files of the table the rows are. It names nobody. It is written before the
receipt, and deleted when no such file is left. So neither a crash nor a full disk can make a purge forgotten:
`facepipe verify`, `facepipe doctor` and `facepipe nightly` say that it is overdue.
"""

import json
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from facepipe import storage
from facepipe.erasure.receipt import Receipt
from facepipe.erasure.vectors import follow_rewrite
from facepipe.errors import GalleryError
from facepipe.gallery import Gallery
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.maintenance.purge import purge_files
from facepipe.gallery.maintenance.vacuum import claim_unreferenced, delete_files, delete_history
from facepipe.gallery.suppressed import get_erased_folder, write_erased_file
from facepipe.index import manifest as manifests
from facepipe.observe.runs import new_run_id
from facepipe.storage import conditional
from facepipe.storage.lease import ERASURE, Lease, hold_lease

MOST_DAYS = 28.0
"""Longest time that hidden rows may stay on disk. It is below the month in which the GDPR has requests answered."""

_ENDING = ".purge"
_REPORTS = "reports"
# A nightly job comes once a day. What falls due before the next one is purged by this one.
_MARGIN = timedelta(days=1)


@dataclass(frozen=True)
class Purge:
    """Rows of an erasure that are hidden and still on disk.

    Attributes:
        id: Id of the erasure.
        due: When they have to be gone.
        files: Files of the table that held them when they were hidden.
    """

    id: str
    due: datetime
    files: tuple[str, ...]

    def is_overdue(self, now: datetime | None = None) -> bool:
        """Tell whether the time is over."""
        return (now or datetime.now(UTC)) >= self.due


def plan_purge(gallery: Gallery, receipt: Receipt, days: float) -> Purge | None:
    """Plan the purge of what an erasure has hidden; None if nothing of it is in a file of the table."""
    current = set(gallery.list_paths())
    files = tuple(sorted(current.intersection(receipt.files_before)))
    if not files:
        return None
    return Purge(receipt.id, datetime.fromisoformat(receipt.at) + timedelta(days=days), files)


def record_purge(gallery: str, purge: Purge) -> None:
    """Record a purge, so that it is not forgotten."""
    content = {"due": purge.due.isoformat(timespec="seconds"), "files": list(purge.files)}
    write_erased_file(gallery, purge.id + _ENDING, json.dumps(content).encode())


def _forget_purge(gallery: str, name: str) -> None:
    storage.delete(storage.join(get_erased_folder(gallery), name + _ENDING))


def list_purges(gallery: str) -> list[Purge]:
    """List the purges that are not done, the one that is due first at the front.

    Raises:
        GalleryError: a record is damaged.
    """
    folder = get_erased_folder(gallery)
    purges = []
    for name in storage.list_names(folder):
        if name.endswith(_ENDING) and "/" not in name:
            content = conditional.read_tagged(storage.join(folder, name))
            if content is not None:  # done by another run just now
                purges.append(_decode(content[0], name, gallery))
    return sorted(purges, key=lambda purge: (purge.due, purge.id))


def _decode(data: bytes, name: str, gallery: str) -> Purge:
    try:
        content = json.loads(data)
        due = datetime.fromisoformat(content["due"])
        files = tuple(content["files"])
        if due.tzinfo is None or not all(isinstance(file, str) for file in files):
            raise ValueError("not a record of a purge")
    except (ValueError, TypeError, KeyError) as error:
        path = storage.join(get_erased_folder(gallery), name)
        raise GalleryError(
            f"{path!r}, which says by when erased rows leave the disk, is damaged: delete it, and run "
            f"`facepipe compact --all {gallery}`, which removes all hidden rows"
        ) from error
    return Purge(name.removesuffix(_ENDING), due, files)


def describe_overdue(gallery: str) -> list[str]:
    """Describe the purges whose time is over."""
    return [
        f"the erasure {purge.id} has hidden rows that had to leave the disk by {format_due(purge.due)}, and they have "
        f"not: run `facepipe erase {gallery} --purge`"
        for purge in list_purges(gallery)
        if purge.is_overdue()
    ]


def format_due(due: datetime) -> str:
    """Format a time for people."""
    return due.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def choose_due(purges: list[Purge], *, margin: bool, everything: bool = False) -> list[Purge]:
    """Choose the purges to do now.

    Args:
        purges: those that are not done.
        margin: whether those count that fall due within a day: by the next night they would be overdue.
        everything: choose all.
    """
    now = datetime.now(UTC) + (_MARGIN if margin else timedelta(0))
    return [purge for purge in purges if everything or purge.is_overdue(now)]


def do_purges(gallery: str, purges: list[Purge], lease: Lease, committer: Committer | None = None) -> int:
    """Remove what purges concern from the disk: their files of the table are written anew without deleted rows.

    A file is written once, for however many erasures, also those whose time is not over. Old files and the older log go
    at once, because they hold the rows and quote names. Everything can be repeated after a crash.

    Args:
        gallery: folder or URL of the gallery.
        purges: what to purge.
        lease: of the gallery.
        committer: of the run that holds the lease, whose parts that are not committed yet are left alone.

    Returns:
        How many files of the table were written anew.

    Raises:
        GalleryBusyError: a run is reading the old files under the lease of the index or of the reports.
    """
    if not purges:
        return 0
    with ExitStack() as stack:
        # A run that reads an older version of the table holds one of these leases.
        index = _hold_used(stack, gallery, manifests.FOLDER, "index")
        _hold_used(stack, gallery, _REPORTS, "reports")
        own = committer or Committer(Gallery(gallery), new_run_id(), lease)
        stack.enter_context(own.exclude_commits())
        table = Gallery(gallery)
        recorded = list_purges(gallery)
        names = {name for purge in purges for name in purge.files}
        count = purge_files(table, [file for file in table.files() if file["path"] in names], own)
        purged = Gallery(gallery)
        if index is not None:
            follow_rewrite(gallery, index)
        _delete_old_files(gallery, lease, own, {name for purge in recorded for name in purge.files})
        # Others, whose time is not over, are done as well if they concerned the same files. What another program has
        # brought back is not purged, and must not be forgotten.
        left = set(purged.list_paths())
        for purge in recorded:
            if left.isdisjoint(purge.files):
                lease.check()
                _forget_purge(gallery, purge.id)
        return count


def _hold_used(stack: ExitStack, gallery: str, folder: str, kind: str) -> Lease | None:
    """Hold the lease of a folder of the gallery; None if there is no such folder."""
    path = storage.join(gallery, folder)
    if not list(storage.list_names(path)):
        return None
    return stack.enter_context(hold_lease(path, kind, purpose=ERASURE))


def _delete_old_files(gallery: str, lease: Lease, committer: Committer, names: set[str]) -> None:
    """Delete what no longer belongs to the table, and its older log, but no parts that are not committed yet."""
    unreferenced = [
        entry
        for entry in claim_unreferenced(gallery, lease)
        if not _get_base_name(entry.url).startswith(committer.part_prefix) or _get_base_name(entry.url) in names
    ]
    delete_files(unreferenced, lease)
    delete_history(Gallery(gallery), lease)
    # After a power cut nothing of it comes back.
    if not storage.is_remote(gallery):
        storage.sync_disks(gallery, storage.join(gallery, "faces"))


def _get_base_name(url: str) -> str:
    return url.rsplit("/", 1)[-1]
