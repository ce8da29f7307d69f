"""What a report says, apart from how it looks. Any text may be a stranger's file name: `html` makes it harmless."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A headline figure: what it is, its value as shown, and a remark below it."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Series:
    """Counts of n bins between n + 1 rising edges."""

    name: str
    edges: tuple[float, ...]
    counts: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.edges) != len(self.counts) + 1 or len(self.counts) < 1:
            raise ValueError(f"{self.name!r}: {len(self.counts)} counts between {len(self.edges)} edges")
        if not all(math.isfinite(x) for x in (*self.edges, *self.counts)) or min(self.counts) < 0:
            raise ValueError(f"{self.name!r}: edges and counts must be finite, and counts not negative")


@dataclass(frozen=True)
class Mark:
    """A vertical line in a histogram, such as a threshold; x in the units of the edges."""

    x: float
    label: str


@dataclass(frozen=True)
class Histogram:
    """Series over one axis. log: counts on a logarithmic axis; log_x: positive edges on one."""

    title: str
    x_label: str
    series: tuple[Series, ...]
    marks: tuple[Mark, ...] = ()
    log: bool = False
    log_x: bool = False

    def __post_init__(self) -> None:
        if self.log_x and any(s.edges[0] <= 0 for s in self.series):
            raise ValueError(f"{self.title!r}: a logarithmic axis cannot begin at 0 or below")


@dataclass(frozen=True)
class Face:
    """A face: its image's uri, figures as (name, value), its JPEG as stored in the gallery, and a word on it.

    The badges "keep", "drop" and "relabel" have colours of their own; any other word is shown in grey.
    """

    uri: str
    figures: tuple[tuple[str, str], ...] = ()
    thumb: bytes | None = None
    badge: str = ""


@dataclass(frozen=True)
class Group:
    """Faces to be looked at together.

    kind: what the page's filter offers, such as "exact" or "merge"; more: how many faces of the group are not shown.
    """

    title: str
    kind: str
    figures: tuple[tuple[str, str], ...]
    faces: tuple[Face, ...]
    suspicion: float = 0.0
    more: int = 0


@dataclass(frozen=True)
class Table:
    """A small table of text: column names, and rows of as many cells."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Report:
    """A report. groups: the most suspicious first, taken once and never held all together.

    groups_total: how many groups there are, where `groups` leaves some out.
    """

    title: str
    subtitle: str = ""
    figures: tuple[Figure, ...] = ()
    histograms: tuple[Histogram, ...] = ()
    tables: tuple[Table, ...] = ()
    groups: Iterable[Group] = ()
    notes: tuple[str, ...] = ()
    groups_total: int | None = None
