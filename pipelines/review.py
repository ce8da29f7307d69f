"""Open a report of a gallery for a review."""

import os

from facepipe.errors import GalleryError
from facepipe.gallery import Gallery
from facepipe.reports.html import PageFormatError
from facepipe.review import ReviewPage, ReviewSession
from facepipe.storage.store import open_store
from pipelines.runtime.workspace import REPORTS, locate_reports


def open_review(gallery: str, report: str, who: str) -> ReviewSession:
    """Open the page of a report that exists.

    Args:
        gallery: path or URL of the gallery.
        report: name of the report, such as `clean`.
        who: who decides.

    Raises:
        GalleryError: there is no such gallery or report, or an older version wrote the report.
    """
    table = Gallery(gallery)
    command = f"`facepipe {report} {table.path}`"
    open_store(table.path, f"{REPORTS}/{report}").pull()
    path = os.path.join(locate_reports(table), report, "report.html")
    if not os.path.isfile(path):
        raise GalleryError(f"there is no report {report!r} in {table.path!r}: {command} makes it")
    try:
        page = ReviewPage(table.path, report, path)
    except PageFormatError as error:
        raise GalleryError(f"cannot review {path!r}: {error}; {command} makes it again") from error
    if not page.has_questions:
        raise GalleryError(f"an older version wrote {path!r}: {command} makes it again, with questions")
    return ReviewSession(page, who)
