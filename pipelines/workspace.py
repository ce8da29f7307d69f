"""Where a report is made: a folder beside the final one, which takes its place when everything is in it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from facepipe.errors import StorageError
from facepipe.gallery import Gallery
from facepipe.gallery.lock import writer_lock
from facepipe.storage import join


def reports_of(gallery: Gallery) -> str:
    """The folder of a gallery's reports."""
    return join(gallery.path, "reports")


@contextmanager
def report_folder(gallery: Gallery, name: str) -> Iterator[str]:
    """A folder to write a report into; it becomes GALLERY/reports/NAME when the block ends without an error.

    One run at a time makes reports. What an interrupted run left is there to go on from.
    """
    reports = reports_of(gallery)
    with writer_lock(reports, "reports"):
        final = join(reports, name)
        partial, old = final + ".partial", final + ".old"
        try:
            if os.path.isdir(old) and not os.path.isdir(final):
                os.rename(old, final)  # a run ended between the two renames below
            os.makedirs(partial, exist_ok=True)
            yield partial
            shutil.rmtree(old, ignore_errors=True)
            if os.path.isdir(final):
                os.rename(final, old)
            os.rename(partial, final)
        except OSError as error:
            raise StorageError(f"cannot write {partial!r}: {(error.strerror or str(error)).lower()}") from error
        shutil.rmtree(old, ignore_errors=True)
