"""Whether this machine's clock can be believed, before images are erased for their age.

No clock is trusted. What it can be compared with is what the gallery holds: times of ingestion and of runs. If nothing
was seen for weeks, either nobody ran facepipe or the clock is ahead, and nothing here can tell which. So a gap counts
as a week only, and what would be erased beyond that needs a confirmation.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise

from facepipe import storage
from facepipe.erasure.limits import CONFIRM_OPTION, ErasureLimit
from facepipe.erasure.selection import SelectedImages, Selection, read_time, select_images
from facepipe.gallery import Gallery
from facepipe.gallery.table import RUNS

MAX_GAP = timedelta(days=7)
"""Longest time between two signs of life that is believed."""
TOLERANCE = timedelta(hours=1)
"""Difference between two clocks that is normal."""

_PROBE = "clock"
_RUN_TIME = re.compile(r"(\d{8}T\d{6})-[0-9a-f]{6}\.json")


@dataclass(frozen=True)
class ClockReading:
    """The time, and what speaks for it and against it.

    Attributes:
        claimed: The time by this machine's clock.
        now: The time to go by: of two clocks that differ, the earlier one.
        seen: Times at which facepipe was seen at work on the gallery, in order, none after `now`.
        is_confirmed: Whether an object store, whose clock is another one, has about the same time.
        problem: Why the clock is wrong; empty if nothing says so.
        latest: The latest time that the gallery or its store has, which may be after `now`.
    """

    claimed: datetime
    now: datetime
    seen: tuple[datetime, ...] = ()
    is_confirmed: bool = False
    problem: str = ""
    latest: datetime = datetime.min.replace(tzinfo=UTC)

    def find_time_before(self, days: float) -> datetime:
        """Find the latest time that lies so many days back, counting long gaps as a week each.

        It is never later than by the clock alone.
        """
        age = timedelta(days=days)
        if self.is_confirmed and not self.problem:
            return self.now - age
        # Walk back from now, from one sign of life to the one before it.
        time = self.now
        for earlier in reversed(self.seen):
            counted = min(time - earlier, MAX_GAP)
            if counted >= age:
                break
            age -= counted
            time = earlier
        return time - age

    def find_longest_gap(self) -> tuple[datetime, datetime] | None:
        """Find the longest gap that is not believed; None if there is none."""
        times = [*self.seen, self.now]
        gaps = [(later - earlier, earlier, later) for earlier, later in pairwise(times)]
        length, earlier, later = max(gaps, default=(timedelta(0), self.now, self.now))
        return (earlier, later) if length > MAX_GAP and not self.is_confirmed else None


def read_clock(gallery: Gallery, *, ignored_until: datetime | None = None, writes: bool = True) -> ClockReading:
    """Read the clock, and compare it with what the gallery holds and with the clock of its disk or store.

    Args:
        gallery: the gallery.
        ignored_until: times between now and then are known to be wrong.
        writes: whether a small file may be written, to see which time the disk or store gives it.

    Raises:
        StorageError: the gallery cannot be read or written.
    """
    claimed = read_time()
    now = claimed
    seen = sorted({*_read_run_times(gallery.path), *_read_ingestion_times(gallery)})
    future = [time for time in seen if time > now + TOLERANCE]
    problem = ""
    own = f"this machine's clock says {format_time(claimed)}"
    if future and (ignored_until is None or future[-1] > ignored_until):
        problem = f"{own}, but the gallery holds rows or runs of {format_time(future[-1])}"
    store_time = read_store_time(gallery.path) if writes else None
    is_known = ignored_until is not None and store_time is not None and store_time <= ignored_until
    if store_time is not None and abs(store_time - now) > TOLERANCE and not is_known:
        problem = f"{own}, and that of the disk or store {format_time(store_time)}"
        now = min(now, store_time)
    is_confirmed = store_time is not None and storage.is_remote(gallery.path) and not problem
    latest = max([claimed, *seen[-1:], *([store_time] if store_time else [])])
    return ClockReading(claimed, now, tuple(time for time in seen if time <= now), is_confirmed, problem, latest)


@dataclass(frozen=True)
class ErasableImages:
    """What may be erased of a selection, as far as the clock can be believed.

    Attributes:
        images: The images.
        time: The time from which ages are counted.
        doubts: Why others that this machine's clock takes for old enough are not among them, or may be missing.
    """

    images: SelectedImages
    time: datetime
    doubts: tuple[str, ...] = ()


def select_erasable(
    gallery: Gallery, selection: Selection, limit: ErasureLimit, *, writes: bool = True
) -> ErasableImages:
    """Select the images of a selection that may be erased as far as the clock can be believed.

    Args:
        gallery: the gallery.
        selection: the conditions.
        limit: of the erasure. If somebody has confirmed the number of images, this machine's clock alone counts.
        writes: as for `read_clock`.
    """
    days = selection.older_than_days
    if days is None:
        time = read_time()
        return ErasableImages(select_images(gallery, selection, time), time)
    clock = read_clock(gallery, ignored_until=limit.ignored_until, writes=writes)
    time = clock.find_time_before(days) + timedelta(days=days)
    selected = select_images(gallery, selection, time)
    if time == clock.claimed and not clock.problem:
        return ErasableImages(selected, time)
    by_clock = select_images(gallery, selection, clock.claimed)
    if by_clock.images in limit.confirmed:
        return ErasableImages(by_clock, clock.claimed)
    left = by_clock.images - selected.images
    if left:
        gap = clock.find_longest_gap()
        reason = clock.problem
        if not reason and gap is not None:
            reason = f"nothing was seen at work here from {format_time(gap[0])} to {format_time(gap[1])}"
        doubt = (
            f"{left} images are older than {days:g} days by this machine's clock, which may be wrong: {reason}. They "
            f"stay. If the clock is right, add {CONFIRM_OPTION} {by_clock.images}"
        )
        return ErasableImages(selected, time, (doubt,))
    if clock.problem:
        return ErasableImages(selected, time, (f"{clock.problem}: images may be older than it takes them for",))
    return ErasableImages(selected, time)


def _read_run_times(gallery: str) -> Iterable[datetime]:
    """Read when runs began, from the names of their records."""
    for name in storage.list_names(storage.join(gallery, RUNS)):
        match = _RUN_TIME.fullmatch(name)
        if match:
            yield datetime.strptime(match[1], "%Y%m%dT%H%M%S").replace(tzinfo=UTC)


def _read_ingestion_times(gallery: Gallery) -> Iterable[datetime]:
    """Read the first and the last ingestion in each of the table's files, from the log, to the hour."""
    for file in gallery.files():
        for bound in ("min.ingested_at", "max.ingested_at"):
            if file.get(bound) is not None:
                yield _to_utc(file[bound]).replace(minute=0, second=0, microsecond=0)


def _to_utc(time: datetime) -> datetime:
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


def read_store_time(gallery: str) -> datetime | None:
    """Read the time that the disk or store gives a file which is written now."""
    path = storage.join(gallery, RUNS, _PROBE)
    storage.replace(path, b"")
    time = datetime.fromtimestamp(storage.get_entry(path).modified, UTC)
    storage.delete(path)
    return time


def format_time(time: datetime) -> str:
    """Format a time in UTC, ISO 8601."""
    return time.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
