"""Images that the gallery holds and their source no longer lists: the listing finds them, the driver marks them."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.rewrite import Rewrite, rewrite_files
from facepipe.gallery.commits.unlisted import ListingFigures, load_unlisted
from facepipe.gallery.sources import SourceRows
from facepipe.gallery.table import Gallery
from facepipe.hashing import hash64_column
from facepipe.schema import FACES

TOO_MANY_MISSING = "more than missing.at_most allows"


def describe_broken(figures: ListingFigures) -> str:
    """Describe how many places of a source could not be listed, and name the first."""
    places = "1 place" if figures.broken == 1 else f"{figures.broken} places"
    example = f", such as {figures.broken_place}" if figures.broken_place else ""
    return f"{places} of the source could not be listed{example}"


@dataclass(frozen=True)
class MissingGuard:
    """Decides whether the missing images of a source are marked.

    Attributes:
        rows: Which rows are of the source.
        figures: Figures of its listing.
        at_most: Share of its images that may be missing.
    """

    rows: SourceRows
    figures: ListingFigures
    at_most: float

    def explain_refusal(self, missing: int) -> str:
        """Return why nothing is marked, or "" if nothing is wrong.

        Args:
            missing: images that were not listed, have not moved, and are not marked yet.
        """
        figures = self.figures
        if figures.broken:
            return describe_broken(figures)
        if missing > int(self.at_most * figures.held):
            return f"{missing} of {figures.held} images are missing at once, {TOO_MANY_MISSING}"
        # Several small losses are one large one.
        before = self.rows.source.find_largest_listing(self.at_most)
        if missing and before is not None:
            lost = before.images - figures.listed
            if lost > int(self.at_most * before.images):
                return (
                    f"the source lists {figures.listed} images; on {before.at[:10]} it listed {before.images}. These "
                    f"losses together are {TOO_MANY_MISSING}"
                )
        return ""


def mark_missing(gallery: Gallery, rows: SourceRows, folder: str, figures: ListingFigures, commit: Committer) -> int:
    """Set `missing_since` in the rows of images that were not listed.

    Args:
        gallery: the gallery.
        rows: which rows are of the source.
        folder: folder of the run that holds what the listing found out.
        figures: figures of the listing.
        commit: commits the change.

    Returns:
        How many images were marked.
    """
    image_count = 0
    now = pa.scalar(datetime.now(UTC), FACES.field("missing_since").type)
    name = rows.source.name
    unlisted = load_unlisted(folder, figures)

    def find_rows(table: pa.Table) -> Any:
        nonlocal image_count
        is_own = rows.contains(table)
        is_unlisted = np.zeros(table.num_rows, bool)
        if is_own.any():
            is_unlisted[is_own] = unlisted.get(hash64_column(table["uri"].filter(pa.array(is_own))))[0]
        mask = pc.and_(pc.is_null(table["missing_since"]), pa.array(is_unlisted))
        # An image has several rows: its first face, or its only row, counts.
        first_rows = pc.and_(mask, pc.fill_null(pc.equal(table["face_index"], 0), True))
        image_count += pc.sum(first_rows).as_py() or 0
        return mask

    def set_time(table: pa.Table, mask: Any) -> pa.Table:
        n = table.schema.get_field_index("missing_since")
        return table.set_column(n, FACES.field("missing_since"), pc.if_else(mask, now, table["missing_since"]))

    def may_hold_source(file: dict[str, Any]) -> bool:
        # A file without statistics of the source may hold it.
        return (file.get("min.source") or "") <= name <= (file.get("max.source") or name)

    def make_actions() -> list[Any]:
        # The count begins anew because a commit that was overtaken is made again.
        nonlocal image_count
        image_count = 0
        rewrite = Rewrite(
            columns=("uri", "source", "missing_since", "face_index"),
            matches=find_rows,
            change=set_time,
            may_match=may_hold_source,
            data_change=False,
            change_marked=lambda table: set_time(table, pa.scalar(True)),
        )
        return list(rewrite_files(Gallery(gallery.path), rewrite))

    try:
        commit.commit_actions(make_actions, {"job": "missing"})
    finally:
        unlisted.close()
    return image_count
