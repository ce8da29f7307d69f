"""A report as one HTML file that needs no network and no server, and does not trust the names it shows.

The page holds its own content as JSON: one object of what its head shows, and one line per group. `edit_report` reads
it, takes parts out, and renders the page again.
"""

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import lru_cache
from importlib.resources import files
from typing import Any, TextIO

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from facepipe.errors import StorageError
from facepipe.reports.chart import HEIGHT, WIDTH, draw_chart
from facepipe.reports.model import (
    Choice,
    Face,
    Figure,
    Group,
    Histogram,
    Mark,
    Report,
    ReviewTarget,
    Series,
    Step,
    Table,
)
from facepipe.reports.thumbs import shrink
from facepipe.storage import replace_file, write_beside

__all__ = [
    "PAGE_MARK",
    "JsonGroup",
    "PageFormatError",
    "build_served_policy",
    "edit_report",
    "find_groups",
    "iterate_groups",
    "read_head",
    "render_served_page",
    "write_report",
]

JsonGroup = dict[str, Any]  # a group as a page holds it: the fields of Group, empty ones left out

# What JSON leaves as it is and HTML may take for markup. JSON itself escapes everything that is not ASCII.
_MARKUP = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}
# Controls (except line breaks and tabs), and characters that hide or reverse the direction of text.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
# Cells that are aligned as numbers: a sign, digits, and a unit of up to three letters.
_NUMBER = re.compile(r"[-+−]?[\d.,]*\d\s?(%|[a-zA-Z]{1,3})?")

# The parts of the page's script, in this order: the decisions, the list of groups, and the work with both.
_SCRIPTS = ("decisions.js", "workbench.js", "report.js")

# Lines of report.html.j2 between which the page's own content stands.
PAGE_MARK = '<script type="application/json" id="report">'
"""Beginning of a line that only pages of facepipe have: their content follows."""
_GROUPS_START = '<script type="application/json" id="data">['
_GROUPS_END = "]</script>"
_SUMMARY_START = '<script type="application/json" id="summary">'
_SCRIPT_END = "</script>"


class PageFormatError(ValueError):
    """A page that does not hold its content as `edit_report` expects, such as one of facepipe 0.1.0."""


def write_report(report: Report, path: str | os.PathLike[str], max_picture_bytes: int = 24 << 20) -> None:
    """Write a report as one HTML file, whole or not at all.

    Args:
        report: what to write.
        path: the file.
        max_picture_bytes: bytes that pictures of faces may take in the file. Groups beyond it have no pictures.

    Raises:
        StorageError: the file cannot be written.
    """
    target = os.fspath(path)
    groups = _GroupLines(report, max_picture_bytes)
    # The page is rendered in pieces into a file beside the target, which then takes its place.
    with (
        replace_file(target, unique=True, what="report") as unfinished,
        open(unfinished, "w", encoding="utf-8", newline="\n") as file,
    ):
        file.writelines(_render_page(report, groups.iterate(), groups.summarise))


def edit_report(
    path: str,
    edit_head: Callable[[Report], Report],
    edit_group: Callable[[JsonGroup], JsonGroup | None],
) -> bool:
    """Take parts out of a page and render it again, whole or not at all.

    Groups are read one at a time. Pictures stay as they are.

    Args:
        path: a page that `write_report` wrote.
        edit_head: returns the report, without groups, as its head should be.
        edit_group: returns a group as it should be, or None to drop it.

    Returns:
        Whether anything changed. If not, the file stays as it was.

    Raises:
        PageFormatError: the page does not hold its content.
        OSError: the page cannot be read or written.
    """
    with open(path, encoding="utf-8", newline="\n") as page, write_beside(path) as unfinished:
        # The three parts are read in the order of the page, so that one pass is enough.
        old_head = _read_head(page)
        new_head = edit_head(old_head)
        groups = _EditedGroups(page, edit_group)
        with open(unfinished, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(_render_page(new_head, groups.iterate(), groups.summarise))
        # An unchanged page is dropped, and the old file stays.
        is_changed = groups.is_changed or new_head != old_head
        if not is_changed:
            os.unlink(unfinished)
    return is_changed


def iterate_groups(path: str) -> Iterator[JsonGroup]:
    """Read the groups of a page one at a time; a page without groups gives none."""
    with open(path, encoding="utf-8", newline="\n") as page:
        # Skip to the groups; each has a line of its own up to the end mark.
        for line in page:
            if line.startswith(_GROUPS_START):
                break
        for line in page:
            if line.startswith(_GROUPS_END):
                return
            text = line.removeprefix(",").strip()
            if text:
                yield json.loads(text)


def read_head(path: str) -> Report:
    """Read what the head of a page shows: the report without its groups.

    Raises:
        PageFormatError: the page does not hold its content.
        OSError: the page cannot be read.
    """
    with open(path, encoding="utf-8", newline="\n") as page:
        return _read_head(page)


def find_groups(path: str) -> list[int]:
    """Find the offsets, in bytes, of the lines of a page that hold its groups."""
    offsets = []
    start = _GROUPS_START.encode()
    end = _GROUPS_END.encode()
    with open(path, "rb") as page:
        # Skip to the groups; each has a line of its own up to the end mark.
        offset = 0
        is_group = False
        for line in page:
            if is_group and line.startswith(end):
                break
            if is_group and line.removeprefix(b",").strip():
                offsets.append(offset)
            is_group = is_group or line.startswith(start)
            offset += len(line)
    return offsets


def render_served_page(head: Report, groups: Iterable[JsonGroup], total: int, server: dict[str, Any]) -> str:
    """Render a page that `facepipe review` serves: its pictures have addresses, and it saves what is decided.

    Args:
        head: the content of the head.
        groups: the groups of one part of the page.
        total: number of groups of all parts.
        server: what the page's script needs to know.
    """
    lines = (_to_line(group, is_first=n == 0) for n, group in enumerate(groups))
    summary = Markup(_dump_json({"total": total, "bare": 0}))
    return "".join(_render_page(head, lines, lambda: summary, server))


def build_served_policy() -> str:
    """Build the content security policy of a page that is served: it may talk to its own server only."""
    return f"default-src 'none'; img-src 'self' data:; connect-src 'self'; {_build_code_policy()}"


def _render_page(
    report: Report,
    group_lines: Iterable[Markup],
    summarise: Callable[[], Markup],
    server: dict[str, Any] | None = None,
) -> Iterator[str]:
    """Render a page piece by piece.

    Args:
        report: the content of the head.
        group_lines: lines of JSON.
        summarise: called after the last line.
        server: what the script of a served page needs to know; None in a file.
    """
    template = _create_environment().get_template("report.html.j2")
    return template.generate(
        report=report,
        charts=[draw_chart(histogram) for histogram in report.histograms],
        width=WIDTH,
        height=HEIGHT,
        style=Markup(_read_asset("report.css")),
        script=Markup(_read_script()),
        policy=f"default-src 'none'; img-src data:; {_build_code_policy()}"
        if server is None
        else build_served_policy(),
        head=Markup(_dump_head(report)),
        groups=group_lines,
        summary=summarise,
        server=None if server is None else Markup(_dump_json(server)),
    )


def _read_script() -> str:
    return "".join(_read_asset(name) for name in _SCRIPTS)


@lru_cache(maxsize=1)
def _build_code_policy() -> str:
    """Build the part of the policy that allows exactly our style and script, by their hashes."""
    style = _hash_source(_read_asset("report.css"))
    script = _hash_source(_read_script())
    return f"style-src {style}; script-src {script}; base-uri 'none'; form-action 'none'"


def _dump_head(report: Report) -> str:
    """Write what the head of a page shows: the report without its groups."""
    # These keys are what `_read_head` reads.
    return _dump_json(
        {
            "title": report.title,
            "subtitle": report.subtitle,
            "findings": report.findings,
            "steps": [asdict(step) for step in report.steps],
            "figures": [asdict(figure) for figure in report.figures],
            "details": [asdict(figure) for figure in report.details],
            "histograms": [asdict(histogram) for histogram in report.histograms],
            "tables": [asdict(table) for table in report.tables],
            "notes": report.notes,
            "made": report.made,
            "review": None if report.review is None else asdict(report.review),
        }
    )


def _read_head(page: TextIO) -> Report:
    """Read what the head of a page shows; the page's groups are not read yet."""
    for line in page:
        if line.startswith(PAGE_MARK):
            head = json.loads(line.removeprefix(PAGE_MARK).rstrip("\n").removesuffix(_SCRIPT_END))
            review = head.get("review")
            # Pages of older versions lack what has a default here.
            return Report(
                title=head["title"],
                subtitle=head["subtitle"],
                findings=tuple(head.get("findings", ())),
                steps=tuple(Step(**step) for step in head.get("steps", ())),
                details=tuple(Figure(**figure) for figure in head.get("details", ())),
                review=None if review is None else ReviewTarget(**review),
                figures=tuple(Figure(**figure) for figure in head["figures"]),
                histograms=tuple(_read_histogram(histogram) for histogram in head["histograms"]),
                tables=tuple(_read_table(table) for table in head["tables"]),
                notes=tuple(head["notes"]),
                made=head.get("made", ""),
            )
        # The head stands before the groups: a page of an older version has none.
        if line.startswith(_GROUPS_START):
            break
    raise PageFormatError("the page does not hold its content: an older facepipe wrote it")


def _read_histogram(values: dict[str, Any]) -> Histogram:
    series = [
        Series(name=item["name"], edges=tuple(item["edges"]), counts=tuple(item["counts"])) for item in values["series"]
    ]
    marks = [Mark(**item) for item in values["marks"]]
    return Histogram(**(values | {"series": tuple(series), "marks": tuple(marks)}))


def _read_table(values: dict[str, Any]) -> Table:
    rows = tuple(tuple(row) for row in values["rows"])
    return Table(title=values["title"], columns=tuple(values["columns"]), rows=rows)


class _GroupLines:
    """The groups of a report as lines of JSON, made one at a time, and their counts."""

    def __init__(self, report: Report, max_picture_bytes: int) -> None:
        self._report = report
        self._free_bytes = max_picture_bytes
        self._shown = 0
        self._without_picture = 0

    def iterate(self) -> Iterator[Markup]:
        """Make the lines."""
        # Lines are made while the page is rendered, so that one group is in memory at a time.
        try:
            for group in self._report.groups:
                yield _to_line(self._to_json(group), is_first=not self._shown)
                self._shown += 1
        except OSError as error:  # raised while reading; it must not look like a failure to write the report
            raise StorageError(f"cannot read what the report shows: {error}") from error

    def summarise(self) -> Markup:
        """Count all groups, and faces whose picture had no room; call it after the last line."""
        # The summary comes after the groups, because only then the counts are known.
        total = self._report.groups_total
        if total is None:
            total = self._shown
        return Markup(_dump_json({"total": total, "bare": self._without_picture}))

    def _to_json(self, group: Group) -> JsonGroup:
        entry = {
            "title": group.title,
            "kind": group.kind,
            "figures": group.figures,
            "suspicion": _to_finite(group.suspicion),
            "more": int(group.more),
            "faces": [self._face_to_json(face) for face in group.faces],
        }
        if group.choices:
            entry["choices"] = [_choice_to_json(choice) for choice in group.choices]
            entry["gain"] = _to_finite(group.gain)
        if group.has_subject:
            entry["subject"] = True
        if group.probability is not None:
            entry["probability"] = round(_to_finite(group.probability), 4)
        if group.distances:
            entry["distances"] = [round(_to_finite(distance), 3) for distance in group.distances]
        return entry

    def _face_to_json(self, face: Face) -> dict[str, Any]:
        place = None
        if face.place is not None:
            place = (face.place.width, face.place.height, *face.place.box)
        optional = {
            "figures": face.figures,
            "badge": face.badge,
            "id": "" if face.face_id is None else str(face.face_id),
            "person": face.person,
            "place": place,
            "jpeg": self._encode_picture(face.thumb),
        }
        # Empty values are left out, to keep the page small.
        return {"uri": face.uri} | {key: value for key, value in optional.items() if value}

    def _encode_picture(self, thumb: bytes | None) -> str:
        """Return a picture in base64, or nothing if there is no picture or no room for it."""
        # Encode a picture while there is room, counted in characters of base64.
        picture = shrink(thumb) if thumb and self._free_bytes > 0 else None
        text = base64.b64encode(picture).decode() if picture else ""
        if len(text) > self._free_bytes:
            # No room is left for smaller pictures of later groups either: the most suspicious come first.
            self._free_bytes = 0
            text = ""
        self._free_bytes -= len(text)
        if thumb and self._free_bytes <= 0 and not text:
            self._without_picture += 1
        return text


class _EditedGroups:
    """The groups of a page as lines of JSON, edited one at a time, and their counts."""

    def __init__(self, page: TextIO, edit_group: Callable[[JsonGroup], JsonGroup | None]) -> None:
        self._page = page
        self._edit_group = edit_group
        self._dropped = 0
        self._is_first = True
        self.is_changed = False

    def iterate(self) -> Iterator[Markup]:
        """Edit the groups and make their lines."""
        # Skip to the groups; the head has been read by now.
        for line in self._page:
            if line.startswith(_GROUPS_START):
                break
        for line in self._page:
            if line.startswith(_GROUPS_END):
                return
            text = line.removeprefix(",").strip()
            if not text:
                continue
            # A changed group is noted, a dropped one is counted, and the rest goes on.
            group = json.loads(text)
            edited = self._edit_group(group)
            self.is_changed |= edited != group
            if edited is None:
                self._dropped += 1
                continue
            yield _to_line(edited, is_first=self._is_first)
            self._is_first = False

    def summarise(self) -> Markup:
        """Count the groups that are left."""
        # The old summary follows the groups: only its total changes.
        for line in self._page:
            if line.startswith(_SUMMARY_START):
                text = line.removeprefix(_SUMMARY_START).rstrip("\n").removesuffix(_SCRIPT_END)
                summary = json.loads(text)
                return Markup(_dump_json(summary | {"total": summary["total"] - self._dropped}))
        raise PageFormatError("the page ends before its summary")


def _choice_to_json(choice: Choice) -> dict[str, Any]:
    """Turn a choice into JSON. Ids are texts: the numbers of a browser have 53 bits."""
    rows = []
    for decision in choice.decisions:
        row: dict[str, Any] = {"decision": decision.decision, "faces": [str(decision.face_id)]}
        if decision.other_face_id is not None:
            row["other"] = str(decision.other_face_id)
        if decision.person:
            row["person"] = decision.person
        rows.append(row)
    entry: dict[str, Any] = {"key": choice.key, "label": choice.label, "rows": rows}
    if choice.agrees is not None:
        entry["agrees"] = choice.agrees
    return entry


def _to_line(group: JsonGroup, *, is_first: bool) -> Markup:
    comma = "" if is_first else ","
    return Markup(comma + _dump_json(group) + "\n")


def _dump_json(value: Any) -> str:
    """Write JSON that means nothing to an HTML parser."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).translate(_MARKUP)


def _to_finite(value: float) -> float:
    """Return a number that JSON can hold: NaN becomes 0, infinities become large."""
    if math.isnan(value):
        return 0.0
    return max(-1e300, min(1e300, float(value)))


def _show_hidden(value: Any) -> Any:
    """Spell out controls and lone surrogates, so that nothing hides in a text."""
    if isinstance(value, Markup):
        return value
    return _HIDDEN.sub(lambda match: f"\\u{{{ord(match[0]):x}}}", str(value))


def _read_asset(name: str) -> str:
    return files("facepipe.reports").joinpath(name).read_text(encoding="utf-8")


def _hash_source(text: str) -> str:
    """Return the source expression of a content security policy that allows exactly this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@lru_cache(maxsize=1)
def _create_environment() -> Environment:
    # Everything is escaped by default, and hidden characters are spelled out.
    environment = Environment(
        loader=FunctionLoader(_read_asset),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_show_hidden,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["number"] = lambda cell: _NUMBER.fullmatch(cell) is not None
    return environment
