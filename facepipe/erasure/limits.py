"""Limits on how much one erasure may delete without somebody confirming the number of images.

A pattern that matches too much, a source that is not mounted, a retention that lacks a digit, and a wrong clock all
look like orders to delete everything. Nothing brings the rows back. So a large share needs a number that only somebody
who has seen it can give.
"""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

import pyarrow.dataset as ds

from facepipe.erasure.selection import SelectedImages, Selection, read_time
from facepipe.errors import ErasureLimitError
from facepipe.gallery import Gallery
from facepipe.gallery.changes import PartialGallery

CONFIRM_OPTION = "--yes-erase"
"""The option that confirms a number of images, for messages."""

# Largest shares of a gallery's rows: if people or images are named, and if a rule or a pattern selects.
_NAMED_SHARE = 0.5
_RULE_SHARE = 0.1
# Whoever names people or images means these, and in a small gallery one person may be most of it.
_FREE_IMAGES = 1000


@dataclass(frozen=True)
class RecentErasures:
    """What earlier erasures of the same kind have deleted lately.

    Attributes:
        rows: Rows that were deleted.
        total: Rows there were before that.
        share: Largest share of them that may be deleted with this erasure included.
    """

    rows: int
    total: int
    share: float


@dataclass(frozen=True)
class ErasureLimit:
    """How much an erasure may delete.

    Attributes:
        share: Largest share of the rows.
        source: Name of the corpus whose rows the share is of; by default all rows of the gallery.
        below: Where all rows of the corpus lie, if other ones have its name.
        confirmed: Numbers of images that somebody has confirmed: an erasure of exactly so many is not refused.
        free: Number of images up to which nothing is refused.
        setting: What sets the share, for the message; empty for the default.
        recent: What was erased lately; None if that does not count.
        ignored_until: Times in the gallery between now and then are known to be wrong, when ages are judged.
    """

    share: float
    source: str | None = None
    below: tuple[str, ...] = ()
    confirmed: tuple[int, ...] = ()
    free: int = 0
    setting: str = ""
    recent: RecentErasures | None = None
    ignored_until: datetime | None = None


def choose_limit(selection: Selection, confirmed: Collection[int] = ()) -> ErasureLimit:
    """Choose the limit of an erasure that a person orders.

    Args:
        selection: the conditions.
        confirmed: numbers of images that the person has confirmed.
    """
    is_rule = selection.uri is not None or selection.older_than_days is not None or selection.missing
    is_named = selection.is_personal or not is_rule
    return ErasureLimit(
        _NAMED_SHARE if is_named else _RULE_SHARE,
        confirmed=tuple(confirmed),
        free=_FREE_IMAGES if selection.is_personal else 0,
    )


def choose_total_share(gallery: Gallery, selected: SelectedImages, limit: ErasureLimit) -> float:
    """Choose the largest share of the rows that an erasure may come to, with images that come in after it was recorded.

    Args:
        gallery: the gallery.
        selected: what is erased now.
        limit: the limit, which is kept or was confirmed.
    """
    if selected.images not in limit.confirmed and selected.images > limit.free:
        return limit.share
    # Whoever has confirmed much has not confirmed everything.
    return max(limit.share, selected.rows / max(1, count_rows(gallery)) + _RULE_SHARE)


def is_beyond(rows: int, total: int, share: float) -> bool:
    """Tell whether an erasure has come to more than it may.

    Args:
        rows: rows that are erased.
        total: rows of the table, with those.
        share: largest share of them.
    """
    return rows > share * total


def choose_repeat_limit(confirmed: Collection[int] = ()) -> ErasureLimit:
    """Choose the limit of erasures that a person repeats by their receipts."""
    return ErasureLimit(_NAMED_SHARE, confirmed=tuple(confirmed), free=_FREE_IMAGES)


def explain_excess(gallery: Gallery, images: int, rows: int, limit: ErasureLimit) -> str:
    """Explain why an erasure is refused; empty if it is not.

    Args:
        gallery: the gallery in the version in which the images were selected.
        images: number of images.
        rows: number of their rows.
        limit: the limit.
    """
    if not images or images in limit.confirmed or images <= limit.free:
        return ""
    total = count_rows(gallery, limit.source, limit.below)
    whole = "the gallery" if limit.source is None else f"the source {limit.source!r}"
    recent = limit.recent
    if is_beyond(rows, total, limit.share):
        setting = f"{limit.setting} allows" if limit.setting else "may go without asking"
        reason = f"{rows} of the {total} rows of {whole}, more than the {limit.share:.0%} that {setting}"
    elif recent is not None and recent.rows + rows > recent.share * max(recent.total, total):
        reason = (
            f"{rows} of the {total} rows of {whole}, which with the {recent.rows} that were erased lately are "
            f"more than {recent.share:.0%}"
        )
    else:
        return ""
    return (
        f"{images} images would be erased: {reason}. None was erased. If that is right, add {CONFIRM_OPTION} {images}"
    )


def check_limit(gallery: Gallery, selected: SelectedImages, limit: ErasureLimit) -> None:
    """Raise ErasureLimitError if an erasure deletes more than it may."""
    excess = explain_excess(gallery, selected.images, selected.rows, limit)
    if excess:
        raise ErasureLimitError(excess)


def count_rows(gallery: Gallery, source: str | None = None, below: tuple[str, ...] = ()) -> int:
    """Count the rows of a gallery, or of one of its sources, by the log as far as that tells.

    Args:
        gallery: the gallery.
        source: name of the corpus; all by default.
        below: where all rows of the corpus lie, if other ones have its name.
    """
    if source is not None and below:
        own = Selection(source=source, below=below).build_filter(read_time())
        return sum(batch.num_rows for batch in gallery.batches(["source"], own, with_hidden=True))
    if source is None:
        return gallery.count_totals().rows
    files = gallery.files()
    # Files of a run hold one source. Compacted ones may hold several, and only these are read.
    count = 0
    mixed = []
    for file in files:
        low = file.get("min.source")
        high = file.get("max.source")
        if low is not None and low == high:
            count += file["rows"] if low == source else 0
        elif low is None or low <= source <= (high or source):
            mixed.append(file["path"])
    if mixed:
        batches = PartialGallery(gallery, mixed).batches(["source"], ds.field("source") == source)
        count += sum(batch.num_rows for batch in batches)
    return count
