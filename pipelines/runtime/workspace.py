"""Where a report is made: a folder beside the final one, which takes its place when everything is in it."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from facepipe.errors import StorageError
from facepipe.gallery import Gallery, mirror
from facepipe.gallery.lock import writer_lock
from facepipe.storage import join

REPORTS = "reports"


def reports_of(gallery: Gallery) -> str:
    """The folder of a gallery's reports on this machine."""
    return mirror.folder(gallery.path, REPORTS)


@contextmanager
def report_folder(gallery: Gallery, name: str, progress: Callable[[str], None] = lambda line: None) -> Iterator[str]:
    """A folder to write a report into; it becomes GALLERY/reports/NAME when the block ends without an error.

    One run at a time makes reports. What an interrupted run left is there to go on from. Of a gallery in an object
    store the report before is fetched first, and the new one is uploaded; readers may see some files of either then.
    """
    with writer_lock(join(gallery.path, REPORTS), "reports", progress) as lease:
        final = mirror.folder(gallery.path, f"{REPORTS}/{name}")
        partial, old = final + ".partial", final + ".old"
        try:
            if os.path.isdir(old) and not os.path.isdir(final):
                os.rename(old, final)  # a run ended between the two renames below
            mirror.pull(final)
            os.makedirs(partial, exist_ok=True)
            yield partial
            lease.check()
            shutil.rmtree(old, ignore_errors=True)
            if os.path.isdir(final):
                os.rename(final, old)
            os.rename(partial, final)
            mirror.push(mirror.folder(gallery.path, f"{REPORTS}/{name}"), last="report.html")
        except OSError as error:
            raise StorageError(f"cannot write {partial!r}: {(error.strerror or str(error)).lower()}") from error
        shutil.rmtree(old, ignore_errors=True)
