"""The folder that a report is made in: it lies beside the final folder, and replaces it when it is complete."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from facepipe.curation.report_folders import PARTIAL, PREVIOUS, prepare_folder, replace_report, require_ours
from facepipe.erasure.steps import HeldLeases
from facepipe.erasure.takeup import take_up_requests
from facepipe.errors import StorageError
from facepipe.gallery import Gallery
from facepipe.storage import describe_error, join, sync_disks, sync_folder
from facepipe.storage.lease import hold_lease
from facepipe.storage.store import open_store

REPORTS = "reports"


def locate_reports(gallery: Gallery) -> str:
    """Return the folder of a gallery's reports on this machine."""
    return open_store(gallery.path, REPORTS).folder


@contextmanager
def open_report_folder(
    gallery: Gallery, name: str, progress: Callable[[str], None] = lambda line: None
) -> Iterator[str]:
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
        StorageError: The folder cannot be written, or holds files of somebody else.
    """
    with hold_lease(join(gallery.path, REPORTS), "reports", progress) as lease:
        gallery.freeze()  # a report reads the gallery several times
        # The report is made in `partial`; `previous` holds the old one while the two change places.
        store = open_store(gallery.path, f"{REPORTS}/{name}")
        final = store.folder
        partial = final + PARTIAL
        previous = final + PREVIOUS
        try:
            require_ours(previous, name)
            if os.path.isdir(previous) and not os.path.isdir(final):
                os.rename(previous, final)  # a run ended between the two renames below
            store.pull()
            require_ours(final, name)
            prepare_folder(partial, name)
            yield partial
            # The new report is on the disk before it takes the place of the previous one, which goes then.
            sync_disks(partial)
            lease.check()
            # Move the previous report away, and the new one into its place.
            replace_report(previous, final, name)
            if os.path.isdir(final):
                os.rename(final, previous)
            os.rename(partial, final)
            sync_folder(os.path.dirname(final))
            replace_report(previous, final, name)
            # The page comes last, so that it never points at a file that is not uploaded yet.
            store.push(last="report.html")
        except OSError as error:
            raise StorageError(f"cannot write {partial!r}: {describe_error(error)}") from error
        # An erasure that was recorded meanwhile is done now: the new report may hold the images.
        take_up_requests(gallery.path, HeldLeases(reports=lease))
