"""What a report says, apart from how it looks.

Any text may be a stranger's file name: `facepipe.reports.html` makes it harmless.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from facepipe.provenance import describe_making


@dataclass(frozen=True)
class Figure:
    """A headline figure.

    Attributes:
        label: what the figure is.
        value: its value, as shown.
        note: a remark below it.
    """

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
        # A chart of numbers that do not fit each other would be drawn wrongly without an error.
        if len(self.edges) != len(self.counts) + 1 or len(self.counts) < 1:
            raise ValueError(f"{self.name!r}: {len(self.counts)} counts between {len(self.edges)} edges")
        if not all(math.isfinite(x) for x in (*self.edges, *self.counts)) or min(self.counts) < 0:
            raise ValueError(f"{self.name!r}: edges and counts must be finite, and counts not negative")


@dataclass(frozen=True)
class Mark:
    """A vertical line in a histogram, such as a threshold; x is in the units of the edges."""

    x: float
    label: str


@dataclass(frozen=True)
class Histogram:
    """Series over one axis.

    Attributes:
        title: heading of the chart.
        x_label: what the axis shows.
        series: the counts; each series has a colour.
        marks: vertical lines.
        log: show counts on a logarithmic axis.
        log_x: show edges on a logarithmic axis; they must be positive.
    """

    title: str
    x_label: str
    series: tuple[Series, ...]
    marks: tuple[Mark, ...] = ()
    log: bool = False
    log_x: bool = False

    def __post_init__(self) -> None:
        if self.log_x and any(series.edges[0] <= 0 for series in self.series):
            raise ValueError(f"{self.title!r}: a logarithmic axis cannot begin at 0 or below")


@dataclass(frozen=True)
class Face:
    """A face on a page.

    Attributes:
        uri: uri of its image.
        figures: (name, value) pairs shown below it.
        thumb: its JPEG, as stored in the gallery.
        badge: a word on it. "keep", "drop" and "relabel" have colours of their own; any other word is grey.
    """

    uri: str
    figures: tuple[tuple[str, str], ...] = ()
    thumb: bytes | None = None
    badge: str = ""


@dataclass(frozen=True)
class Group:
    """Faces to look at together.

    Attributes:
        title: heading of the group.
        kind: an entry of the page's filter, such as "exact" or "merge".
        figures: (name, value) pairs shown beside the heading.
        faces: the faces shown.
        suspicion: the page sorts groups by it, largest first.
        more: number of faces of the group that are not shown.
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
    """A report.

    Attributes:
        title: heading of the page.
        subtitle: line below it.
        figures: headline figures.
        histograms: charts.
        tables: small tables.
        groups: groups of faces, the most suspicious first. They are read once, one at a time.
        notes: remarks below the figures.
        groups_total: number of groups, if `groups` leaves some out.
        made: when and with which command the page was made; by default that of this process.
    """

    title: str
    subtitle: str = ""
    figures: tuple[Figure, ...] = ()
    histograms: tuple[Histogram, ...] = ()
    tables: tuple[Table, ...] = ()
    groups: Iterable[Group] = ()
    notes: tuple[str, ...] = ()
    groups_total: int | None = None
    made: str = field(default_factory=describe_making)
