"""What keeps nights from emptying a gallery: limits on what they erase, alone and together, and a look at the clock.

Nobody watches a night. A wrong clock, a source that is not mounted, or a retention that lacks a digit would erase a
gallery for ever. Each night's erasures are limited to a share of their source, and those of several nights as well.
"""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from datetime import date, datetime, timedelta

from pydantic import TypeAdapter, ValidationError

from facepipe import storage
from facepipe.erasure.clock import ClockReading, read_clock
from facepipe.erasure.limits import ErasureLimit, RecentErasures, count_rows
from facepipe.erasure.selection import Selection, read_time
from facepipe.errors import StorageError
from facepipe.gallery import Gallery
from facepipe.gallery.sources import GallerySource, SourceRegister
from facepipe.gallery.table import RUNS
from facepipe.hashing import hash64
from facepipe.sources import locate_source
from pipelines.nightly.config import NightlyConfig, NightSource

CLOCK_OPTION = "--yes-clock"
"""The option that confirms the date of the clock, for messages."""

RETENTION = "retention"
MISSING = "missing"

_LEDGER = "nights.json"
_NIGHTS = 7  # erasures of a kind that are added up
_DAYS = timedelta(days=30)  # older ones do not count
_RECENT_FACTOR = 3  # times the share of one night, for these nights together
_LEAST_SHARE = 0.1
_MOST_SHARE = 0.5
_FORMAT = 1


@dataclass(frozen=True)
class PlannedErasure:
    """What a night erases for one reason.

    Attributes:
        reason: RETENTION or MISSING.
        source: Name of the corpus.
        selection: The images.
        share: Largest share of the source's rows.
        setting: The setting that the share comes from.
        below: Where all images of the source lie, if other sources have its name; else nothing.
    """

    reason: str
    source: str
    selection: Selection
    share: float
    setting: str
    below: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Reason and source, for people."""
        return f"{self.reason} {self.source}"


def plan_erasures(config: NightlyConfig, gallery: Gallery) -> list[PlannedErasure]:
    """Plan what a night erases.

    A source that the gallery does not know has no images.

    Args:
        config: settings of the job.
        gallery: the gallery.
    """
    register = SourceRegister.read(gallery)
    planned = []
    for source in config.source:
        known = register.find(locate_source(source.to_source()), source.name)
        if known is not None:
            planned += plan_source_erasures(config, source, known, register)
    return planned


def plan_source_erasures(
    config: NightlyConfig, source: NightSource, known: GallerySource, register: SourceRegister
) -> list[PlannedErasure]:
    """Plan what a night erases of a source.

    Images past their retention do not come back. Missing ones may, if their source lists them again.

    Args:
        config: settings of the job.
        source: the source.
        known: the source as the gallery knows it.
        register: all sources that it knows.
    """
    name = known.name
    # Another source may have the same name: only what lies at the place of this one is its own.
    below = known.list_own_roots()
    shares_name = known.is_strict or sum(other.name == name for other in register.sources) > 1
    others = below if shares_name else ()
    planned = []
    if source.retention_days is not None:
        outdated = Selection(source=name, below=below, older_than_days=source.retention_days)
        share = _choose_retention_share(config, source.retention_days)
        planned.append(PlannedErasure(RETENTION, name, outdated, share, "night.retention_at_most", others))
    if source.missing == "erase":
        gone = Selection(source=name, below=below, missing=True)
        share = config.night.missing_at_most
        planned.append(PlannedErasure(MISSING, name, gone, share, "night.missing_at_most", others))
    return planned


def _choose_retention_share(config: NightlyConfig, days: float) -> float:
    """Choose the largest share that may be past its retention at once.

    In a steady gallery one part in `days` falls due every night. Three nights' worth may come together.
    """
    if config.night.retention_at_most is not None:
        return config.night.retention_at_most
    return min(_MOST_SHARE, max(_LEAST_SHARE, _RECENT_FACTOR / days))


def is_dated(source: NightSource) -> bool:
    """Tell whether it matters when images of a source were embedded."""
    return source.retention_days is not None


def list_dated_sources(config: NightlyConfig, gallery: Gallery) -> list[str]:
    """List the names that a gallery has for the sources with a retention."""
    register = SourceRegister.read(gallery)
    known = [
        register.find(locate_source(source.to_source()), source.name) for source in config.source if is_dated(source)
    ]
    return [source.name for source in known if source is not None]


@dataclass
class _Erased:
    """An erasure of a night.

    Attributes:
        key: Hash of its kind and source.
        at: When it was.
        rows: Its rows.
        total: Rows of the source before.
        share: Largest share that the night allowed; 0 if it was not noted.
    """

    key: str
    at: datetime
    rows: int
    total: int
    share: float = 0.0


@dataclass
class _Ledger:
    """What nights have erased, and until when times in the gallery are known to be wrong."""

    erasures: list[_Erased] = field(default_factory=list)
    ignored_until: datetime | None = None
    format: int = _FORMAT


class NightGuard:
    """The limits of one night."""

    def __init__(self, gallery: str, confirmed: Collection[int] = (), clock_date: date | None = None):
        """Read what earlier nights did.

        Args:
            gallery: folder or URL of the gallery.
            confirmed: numbers of images that somebody has confirmed.
            clock_date: date of the clock that somebody has confirmed.
        """
        self._gallery = gallery
        self._confirmed = tuple(confirmed)
        self._clock_date = clock_date
        self._path = storage.join(gallery, RUNS, _LEDGER)
        self._ledger = self._read_ledger()

    @property
    def ignored_until(self) -> datetime | None:
        """Until when times in the gallery are known to be wrong; None if none are."""
        return self._ledger.ignored_until

    def check_clock(self) -> str:
        """Return why the clock cannot be believed; empty if nothing speaks against it.

        An image that is embedded with a wrong time is erased at a wrong time.
        """
        table = Gallery(self._gallery)
        clock = read_clock(table, ignored_until=self._ledger.ignored_until)
        if not clock.problem:
            return ""
        if self._clock_date == clock.claimed.date():
            self._ignore_later_times(clock)
            return ""
        return f"{clock.problem}. Set the clock right; if it is right, add {CLOCK_OPTION} {clock.claimed.date()}"

    def _ignore_later_times(self, clock: ClockReading) -> None:
        """Note that the times in the gallery that are later than now are wrong, for this night and later ones."""
        self._ledger.ignored_until = max(clock.latest, self._ledger.ignored_until or clock.latest)
        self._save_ledger()

    def get_limit(self, planned: PlannedErasure) -> ErasureLimit:
        """Return the limit of an erasure."""
        recent = self._list_recent(planned)
        share = _RECENT_FACTOR * planned.share
        counted = None
        # Where a retention is short, everything may go within these nights.
        if recent and share < 1:
            total = max(erased.total for erased in recent)
            counted = RecentErasures(sum(erased.rows for erased in recent), total, share)
        return ErasureLimit(
            planned.share,
            source=planned.source,
            below=planned.below,
            confirmed=self._confirmed,
            setting=planned.setting,
            recent=counted,
            ignored_until=self._ledger.ignored_until,
        )

    def note_erasure(self, planned: PlannedErasure, rows: int) -> None:
        """Note what was erased, so that later nights count it."""
        total = rows + count_rows(Gallery(self._gallery), planned.source, planned.below)
        key = self._hash(planned)
        # Of each kind only the last ones are kept.
        same = [erased for erased in self._ledger.erasures if erased.key == key][1 - _NIGHTS :]
        others = [erased for erased in self._ledger.erasures if erased.key != key]
        self._ledger.erasures = [*others, *same, _Erased(key, read_time(), rows, total, planned.share)]
        self._save_ledger()

    def _list_recent(self, planned: PlannedErasure) -> list[_Erased]:
        """List the erasures of a kind that count, oldest first. Times that are in the future count as well.

        A night with a larger share accepts what was erased until then, and counting begins anew.
        """
        begin = read_time() - _DAYS
        key = self._hash(planned)
        counted: list[_Erased] = []
        for erased in self._ledger.erasures:
            if erased.key != key:
                continue
            if erased.share > planned.share:
                counted = []
            elif erased.at > begin:
                counted.append(erased)
        return counted

    def _hash(self, planned: PlannedErasure) -> str:
        """Hash what an erasure is: names of sources stay out of the records of runs."""
        return f"{hash64(planned.setting, planned.source, *planned.below):016x}"

    def _read_ledger(self) -> _Ledger:
        """Read the file of the ledger; a new one if there is none, or it is damaged."""
        if not storage.file_exists(self._path):
            return _Ledger()
        try:
            return TypeAdapter(_Ledger).validate_json(storage.read(self._path.encode()))
        except (StorageError, ValidationError):
            return _Ledger()

    def _save_ledger(self) -> None:
        storage.replace(self._path, json.dumps(asdict(self._ledger), default=str).encode())
