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
class PhotoPlace:
    """Where a face is in its photo.

    Attributes:
        width: width of the photo, in pixels.
        height: height of the photo, in pixels.
        box: left, top, right and bottom edge of the face, in pixels.
    """

    width: int
    height: int
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Face:
    """A face on a page.

    Attributes:
        uri: uri of its image.
        figures: (name, value) pairs shown below it.
        thumb: its JPEG, as stored in the gallery.
        badge: a word on it. "keep", "drop" and "relabel" have colours of their own; any other word is grey.
        face_id: its id. A face without one cannot be decided on.
        person: its label, if any.
        place: where it is in its photo, if that is known.
    """

    uri: str
    figures: tuple[tuple[str, str], ...] = ()
    thumb: bytes | None = None
    badge: str = ""
    face_id: int | None = None
    person: str = ""
    place: PhotoPlace | None = None


@dataclass(frozen=True)
class Decision:
    """One line of the file of decisions that `facepipe apply` reads.

    Attributes:
        decision: `is`, `is_not`, `same_as`, `different_from`, `not_a_face`, `ignore` or `keep`.
        face_id: the face.
        other_face_id: the other face, of `same_as` and `different_from`.
        person: the name, of `is` and `is_not`.
    """

    decision: str
    face_id: int
    other_face_id: int | None = None
    person: str = ""


@dataclass(frozen=True)
class Choice:
    """An answer to the question of a group.

    Attributes:
        key: the letter that gives this answer.
        label: what its button says.
        decisions: what the answer decides.
        agrees: whether it agrees with the suggestion; None if it is neither yes nor no.
    """

    key: str
    label: str
    decisions: tuple[Decision, ...]
    agrees: bool | None = None


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
        choices: possible answers, each with a key of its own.
        has_subject: whether the question is about the first face.
        probability: probability that the suggestion is right, if it was estimated.
        gain: number of faces that a right suggestion sets right. The page ranks by it times the probability.
        distances: distances of the faces shown, of each to all later ones: 0-1, 0-2, ..., 1-2, ...
    """

    title: str
    kind: str
    figures: tuple[tuple[str, str], ...]
    faces: tuple[Face, ...]
    suspicion: float = 0.0
    more: int = 0
    choices: tuple[Choice, ...] = ()
    has_subject: bool = False
    probability: float | None = None
    gain: float = 1.0
    distances: tuple[float, ...] = ()


@dataclass(frozen=True)
class Table:
    """A small table of text: column names, and rows of as many cells."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Step:
    """What the reader can do next: a sentence, and the command to type."""

    text: str
    command: str


@dataclass(frozen=True)
class ReviewTarget:
    """What the decisions on a page are about.

    Attributes:
        gallery: path of the gallery.
        report: name of the report, such as `clean`.
        table_version: version of the gallery's table that the report shows.
    """

    gallery: str
    report: str
    table_version: int


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
        findings: what was found and what it means, in sentences.
        steps: what to do next.
        details: figures on how all this was measured. They stand below the groups.
        review: what decisions are about. Without it nothing can be decided on the page.
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
    findings: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()
    details: tuple[Figure, ...] = ()
    review: ReviewTarget | None = None
