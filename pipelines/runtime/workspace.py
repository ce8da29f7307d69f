"""Where a report is made: a folder beside the final one, which takes its place when everything is in it."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from facepipe.errors import StorageError
from facepipe.gallery import Gallery
from facepipe.storage import describe_error, join
from facepipe.storage.lease import hold_lease
from facepipe.storage.store import open_store

REPORTS = "reports"


def locate_reports(gallery: Gallery) -> str:
    """The folder of a gallery's reports on this machine."""
    return open_store(gallery.path, REPORTS).folder


@contextmanager
def open_report_folder(
    gallery: Gallery, name: str, progress: Callable[[str], None] = lambda line: None
) -> Iterator[str]:
    """A folder to write a report into; it becomes GALLERY/reports/NAME when the block ends without an error.

    One run at a time makes reports. What an interrupted run left is there to go on from. Of a gallery in an object
    store the report before is fetched first, and the new one is uploaded; readers may see some files of either then.
    """
    with hold_lease(join(gallery.path, REPORTS), "reports", progress) as lease:
        store = open_store(gallery.path, f"{REPORTS}/{name}")
        final = store.folder
        partial, old = final + ".partial", final + ".old"
        try:
            if os.path.isdir(old) and not os.path.isdir(final):
                os.rename(old, final)  # a run ended between the two renames below
            store.pull()
            os.makedirs(partial, exist_ok=True)
            yield partial
            lease.check()
            shutil.rmtree(old, ignore_errors=True)
            if os.path.isdir(final):
                os.rename(final, old)
            os.rename(partial, final)
            store.push(last="report.html")
        except OSError as error:
            raise StorageError(f"cannot write {partial!r}: {describe_error(error)}") from error
        shutil.rmtree(old, ignore_errors=True)
