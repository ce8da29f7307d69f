"""A report as one HTML file that needs no network, no server and no trust in the names it shows."""

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from facepipe.errors import StorageError
from facepipe.reports import chart
from facepipe.reports.model import Face, Group, Report
from facepipe.reports.thumbs import shrink
from facepipe.storage import replace_file

# What JSON leaves as it is and HTML may take for markup; JSON itself escapes all that is not ASCII.
_MARKUP = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}
# Controls (but for line breaks and tabs), and the characters that make text run the other way or hide.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
_NUMBER = re.compile(r"[-+−]?[\d.,]*\d\s?(%|[a-zA-Z]{1,3})?")


def write_report(report: Report, path: str | os.PathLike[str], budget: int = 24 << 20) -> None:
    """Write a report as one HTML file, whole or not at all.

    budget: bytes that pictures of faces may take in the file; groups beyond it are shown without pictures.
    Raises StorageError where the file cannot be written.
    """
    target = os.fspath(path)
    with (
        replace_file(target, unique=True, what="report") as unfinished,
        open(unfinished, "w", encoding="utf-8", newline="\n") as file,
    ):
        file.writelines(_pieces(report, budget))


def _pieces(report: Report, budget: int) -> Iterator[str]:
    style, script = _asset("report.css"), _asset("report.js")
    groups = _Groups(report, budget)
    policy = f"style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    template = _environment().get_template("report.html.j2")
    return template.generate(
        report=report,
        charts=[chart.chart(histogram) for histogram in report.histograms],
        width=chart.WIDTH,
        height=chart.HEIGHT,
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; {policy}",
        groups=groups.lines(),
        summary=groups.summary,
    )


class _Groups:
    """The groups as lines of JSON, made one at a time, and what they came to."""

    def __init__(self, report: Report, budget: int):
        self._report, self._left = report, budget
        self._shown, self._bare = 0, 0

    def lines(self) -> Iterator[Markup]:
        try:
            for group in self._report.groups:
                yield Markup(("," if self._shown else "") + _json(self._record(group)) + "\n")
                self._shown += 1
        except OSError as error:  # of reading; it must not pass for a failure to write the report
            raise StorageError(f"cannot read what the report is to show: {error}") from error

    def summary(self) -> Markup:
        """To be asked for after the last line: counts of groups there are, and of faces whose picture had no room."""
        total = self._report.groups_total
        return Markup(_json({"total": self._shown if total is None else total, "bare": self._bare}))

    def _record(self, group: Group) -> dict[str, Any]:
        return {
            "title": group.title,
            "kind": group.kind,
            "figures": group.figures,
            "suspicion": _finite(group.suspicion),
            "more": int(group.more),
            "faces": [self._face(face) for face in group.faces],
        }

    def _face(self, face: Face) -> dict[str, Any]:
        rest = {"figures": face.figures, "badge": face.badge, "jpeg": self._picture(face.thumb)}
        return {"uri": face.uri, **{key: value for key, value in rest.items() if value}}

    def _picture(self, thumb: bytes | None) -> str:
        small = shrink(thumb) if thumb and self._left > 0 else None
        text = base64.b64encode(small).decode() if small else ""
        if len(text) > self._left:
            self._left, text = 0, ""  # spent: a later, smaller picture must not jump the queue
        self._left -= len(text)
        self._bare += bool(thumb) and self._left <= 0 and not text
        return text


def _json(value: Any) -> str:
    """JSON that means nothing to an HTML parser."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).translate(_MARKUP)


def _finite(value: float) -> float:
    """A number that JSON has; whatever is unknown is not suspicious."""
    return 0.0 if math.isnan(value) else max(-1e300, min(1e300, float(value)))


def _visible(value: Any) -> Any:
    """Text in which nothing hides: controls and lone surrogates are spelt out."""
    if isinstance(value, Markup):
        return value
    return _HIDDEN.sub(lambda found: f"\\u{{{ord(found[0]):x}}}", str(value))


def _asset(name: str) -> str:
    return files("facepipe.reports").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_asset),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["number"] = lambda cell: _NUMBER.fullmatch(cell) is not None
    return environment
