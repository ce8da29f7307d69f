"""The folder that a report is made in: it lies beside the final folder, and replaces it when it is complete.

A run may be paused anywhere, for hours, and another run may make reports when it goes on. So each run works in a folder
of its own name. A run that begins takes over or deletes the folders of earlier ones, which then cannot publish them.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from facepipe.curation.report_folders import (
    PARTIAL,
    PREVIOUS,
    delete_report,
    delete_uploads,
    prepare_folder,
    replace_report,
    require_ours,
    take_over_folders,
)
from facepipe.erasure.steps import HeldLeases
from facepipe.erasure.takeup import take_up_requests
from facepipe.errors import StorageError
from facepipe.gallery import Gallery
from facepipe.gallery.changes import ReadMark
from facepipe.storage import describe_error, join, sync_disks, sync_folder
from facepipe.storage.atomic import swap_folders
from facepipe.storage.lease import Lease, hold_lease
from facepipe.storage.store import open_store
from facepipe.storage.uploads import UploadsUnknownError

REPORTS = "reports"


@dataclass(frozen=True)
class Workspace:
    """A folder in which a report is made.

    Attributes:
        path: The folder on this machine.
        lease: The lease of all reports.
    """

    path: str
    lease: Lease


class ReportUnchangedError(Exception):
    """Raised in the block of `open_report_folder` to keep the report as it is, with a newer mark.

    Attributes:
        mark_name: Name of the mark's file in the report.
        mark: Up to where the gallery was read.
    """

    def __init__(self, mark_name: str, mark: ReadMark):
        super().__init__("the report stays as it is")
        self.mark_name = mark_name
        self.mark = mark


def locate_reports(gallery: Gallery) -> str:
    """Return the folder of a gallery's reports on this machine."""
    return open_store(gallery.path, REPORTS).folder


@contextmanager
def open_report_folder(
    gallery: Gallery, name: str, progress: Callable[[str], None] = lambda line: None
) -> Iterator[Workspace]:
    """Open a folder for writing a report. It becomes GALLERY/reports/NAME if the `with` block ends without an error.

    One run at a time makes reports. Files of an interrupted run are still in the folder, so that you can resume from
    them. Files that somebody put beside the previous report are moved to the new one. If the gallery is in an object
    store, the previous report is fetched first, and the new one is uploaded. Readers may see some files of either
    meanwhile.

    Args:
        gallery: the gallery.
        name: name of the report.
        progress: called with a line of text while another run is waited for.

    Raises:
        GalleryBusyError: another run makes reports, or has begun to because this one was silent for too long.
        StorageError: The folder cannot be written, or holds files of somebody else.
    """
    with hold_lease(join(gallery.path, REPORTS), "reports", progress) as lease:
        gallery.freeze()  # a report reads the gallery several times
        # The report is made in `partial`, which is called `outgoing` from the moment before it changes places with the
        # previous report until that is deleted.
        store = open_store(gallery.path, f"{REPORTS}/{name}")
        final = store.folder
        partial = f"{final}.{lease.id}{PARTIAL}"
        outgoing = f"{final}.{lease.id}{PREVIOUS}"
        try:
            with suppress(UploadsUnknownError):
                delete_uploads(join(gallery.path, REPORTS), lease)
            _restore_report(final, name)
            store.pull()
            require_ours(final, name)
            take_over_folders(final, partial, name)
            prepare_folder(partial, name, gallery.version)
            try:
                yield Workspace(partial, lease)
            except ReportUnchangedError as unchanged:
                _save_mark(final, unchanged, lease)
                delete_report(partial, name)
            else:
                # The new report is on the disk before it takes the place of the previous one, which goes then.
                sync_disks(partial)
                lease.renew()
                # Both steps fail if another run has taken the folder over.
                os.rename(partial, outgoing)
                swap_folders(outgoing, final)
                sync_folder(os.path.dirname(final))
                replace_report(outgoing, final, name)
                # The page comes last, so that it never points at a file that is not uploaded yet.
                store.push(last="report.html", before_each=lease.check)
        except (OSError, StorageError) as error:
            # If the folder is gone another run has taken it over, and the renewal says so.
            if not os.path.isdir(partial) and not os.path.isdir(outgoing):
                lease.renew()
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"cannot write {partial!r}: {describe_error(error)}") from error
        # An erasure that was recorded meanwhile is done now: the new report may hold the images.
        take_up_requests(gallery.path, HeldLeases(reports=lease))


def _restore_report(final: str, name: str) -> None:
    """Put a report back if a run ended between two renames: where two folders cannot change places in one step."""
    previous = final + PREVIOUS
    require_ours(previous, name)
    if os.path.isdir(previous) and not os.path.isdir(final):
        os.rename(previous, final)


def _save_mark(final: str, unchanged: ReportUnchangedError, lease: Lease) -> None:
    """Save a newer mark: the files of the table may have changed without new rows."""
    path = os.path.join(final, unchanged.mark_name)
    # The mark is compared first, so that an unchanged report is not written to.
    if os.path.isdir(final) and ReadMark.load(path) != unchanged.mark:
        lease.renew()
        unchanged.mark.save(path)
