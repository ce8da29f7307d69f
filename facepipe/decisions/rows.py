"""Decisions as people write them, checked value by value and brought into columns."""

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from facepipe.decisions.schema import KINDS, UNDO
from facepipe.sources.labels import format_label

PROPOSED = pa.schema(
    [
        ("decision_id", pa.string()),
        ("decision", pa.string()),
        ("face_id", pa.int64()),
        ("other_face_id", pa.int64()),
        ("image_id", pa.string()),
        ("box", pa.list_(pa.float32())),
        ("other_image_id", pa.string()),
        ("other_box", pa.list_(pa.float32())),
        ("uri", pa.string()),
        ("other_uri", pa.string()),
        ("person", pa.string()),
        ("other_person", pa.string()),
        ("who", pa.string()),
        ("decided_at", pa.timestamp("us", "UTC")),
        ("why", pa.string()),
        ("undoes", pa.string()),
        ("source", pa.string()),
        ("place", pa.string()),  # file and line, for messages
    ]
)
"""The columns of rows that are not in the table yet."""

_BATCH_ROWS = 1 << 13
_MAX_ID = 1 << 63
# Whole numbers up to here are exact in a float, such as JavaScript's numbers.
_MAX_EXACT = 1 << 53
_ID = re.compile(r"[0-9]{1,40}")
_DIGEST = re.compile(r"[0-9a-f]{32}")
_MAX_TEXT = 10_000
_MAX_NAME = 1000


class RowError(ValueError):
    """A row cannot be used; the message says why."""


@dataclass(frozen=True)
class Problem:
    """A row that cannot be applied.

    Attributes:
        place: where it is, such as `corrections.jsonl:7`.
        reason: why it cannot be applied.
    """

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass(frozen=True)
class WrittenRow:
    """A row as it stands in a file.

    Attributes:
        place: where it is, for messages.
        values: its values by name; None if the row is not readable.
        source: name of the file or report.
        error: why the row is not readable.
    """

    place: str
    values: Mapping[str, Any] | None
    source: str = ""
    error: str = ""


@dataclass
class Problems:
    """Rows that cannot be applied: all are counted, the first ones kept.

    Attributes:
        count: how many there are.
        first: the first ones.
    """

    count: int = 0
    first: list[Problem] = field(default_factory=list)
    most: int = 100

    def add(self, place: str, reason: str) -> None:
        """Add a problem."""
        self.count += 1
        if len(self.first) < self.most:
            self.first.append(Problem(place, reason))


def parse_rows(rows: Iterable[WrittenRow], problems: Problems) -> Iterator[pa.Table]:
    """Check rows and bring them into columns, some thousands at a time.

    Args:
        rows: the rows.
        problems: rows that cannot be used are added to it.

    Yields:
        Tables with the columns of PROPOSED.
    """
    batch: list[dict[str, Any]] = []
    for row in rows:
        if not isinstance(row.values, Mapping):
            problems.add(row.place, row.error or f"{_shorten(row.values)} is not an object with names")
            continue
        try:
            values = parse_row(row.values)
        except RowError as error:
            problems.add(row.place, str(error))
            continue
        values["source"] = row.source or None
        values["place"] = row.place
        batch.append(values)
        if len(batch) == _BATCH_ROWS:
            yield pa.Table.from_pylist(batch, PROPOSED)
            batch = []
    if batch:
        yield pa.Table.from_pylist(batch, PROPOSED)


def parse_row(values: Mapping[str, Any]) -> dict[str, Any]:
    """Check the values of one row. Names that are not known are passed over.

    Returns:
        Values by the names of PROPOSED, without `source` and `place`.

    Raises:
        RowError: the row cannot be used.
    """
    decision = _parse_decision(values.get("decision"))
    kind = KINDS[decision]
    row: dict[str, Any] = {
        "decision": decision,
        "decision_id": _parse_digest(values.get("decision_id"), "decision_id"),
        "who": _parse_text(values.get("who"), "who", _MAX_NAME),
        "why": _parse_text(values.get("why"), "why", _MAX_TEXT),
        "decided_at": _parse_time(_get_either(values, "decided_at", "when")),
    }
    if decision == UNDO:
        row["undoes"] = _parse_digest(values.get("undoes"), "undoes")
        if row["undoes"] is None:
            raise RowError("undo needs `undoes`, the decision_id of what it takes back")
        if row["undoes"] == row["decision_id"]:
            raise RowError("it undoes itself")
        return row
    if kind.has_person:
        row["person"] = _parse_person(values.get("person"), "person")
        if row["person"] is None:
            raise RowError(f"`{decision}` needs a `person`")
    if "other_person" in values:
        row["other_person"] = _parse_person(values.get("other_person"), "other_person")
    if kind.faces:
        row |= _parse_face(values, "")
    if kind.faces == 2:
        row |= _parse_face(values, "other_")
        if row["face_id"] is not None and row["face_id"] == row["other_face_id"]:
            raise RowError(f"`{decision}` needs two faces, and both are {row['face_id']}")
    return row


def _get_either(values: Mapping[str, Any], *names: str) -> Any:
    """Return the first value that is there."""
    for name in names:
        if not _is_absent(values.get(name)):
            return values[name]
    return None


def _is_absent(value: Any) -> bool:
    is_nan = isinstance(value, float) and math.isnan(value)
    return value is None or value == "" or is_nan


def _parse_decision(value: Any) -> str:
    if _is_absent(value):
        raise RowError(f"it has no `decision`: give one of {', '.join(KINDS)}")
    if not isinstance(value, str) or value.strip() not in KINDS:
        near = difflib.get_close_matches(str(value)[:100], KINDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(KINDS)}"
        raise RowError(f"unknown decision {_shorten(value)}: {hint}")
    return value.strip()


def _parse_face(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Check what names a face: its id, its image and box, or an image that has one face."""
    face: dict[str, Any] = {
        f"{prefix}face_id": parse_face_id(values.get(f"{prefix}face_id"), f"{prefix}face_id"),
        f"{prefix}image_id": _parse_digest(values.get(f"{prefix}image_id"), f"{prefix}image_id"),
        f"{prefix}box": _parse_box(values.get(f"{prefix}box"), f"{prefix}box"),
        f"{prefix}uri": _parse_text(_get_either(values, f"{prefix}uri", f"{prefix}path"), f"{prefix}uri", 1 << 16),
    }
    if all(face[f"{prefix}{name}"] is None for name in ("face_id", "image_id", "uri")):
        raise RowError(f"it names no face: give `{prefix}face_id`, or `{prefix}image_id`, or `{prefix}uri`")
    return face


def parse_face_id(value: Any, name: str = "face_id") -> int | None:
    """Check a face id, which may be a text or an exact number; None if there is none.

    Raises:
        RowError: it cannot be the id of a face.
    """
    if _is_absent(value):
        return None
    if isinstance(value, str) and _ID.fullmatch(value.strip()):
        number = int(value)
    elif isinstance(value, str) and value.strip().isdecimal():
        number = _MAX_ID
    elif isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, float) and value.is_integer() and abs(value) < _MAX_EXACT:
        number = int(value)
    elif isinstance(value, float) or (
        isinstance(value, str)
        and re.fullmatch(r"[0-9]+[.,][0-9]*([eE][+]?[0-9]+)?|[0-9]+[eE][+]?[0-9]+", value.strip())
    ):
        raise RowError(
            f"{name} {_shorten(value)} was rounded, as spreadsheets and JavaScript do with numbers of this length: "
            "write face ids as text"
        )
    else:
        raise RowError(f"{name} {_shorten(value)} is not a whole number")
    if not 0 <= number < _MAX_ID:
        raise RowError(f"{name} {_shorten(number)} is beyond the 63 bits of a face id")
    return number


def _parse_digest(value: Any, name: str) -> str | None:
    if _is_absent(value):
        return None
    if not isinstance(value, str) or not _DIGEST.fullmatch(value.strip().lower()):
        raise RowError(f"{name} {_shorten(value)} is not 32 hex digits")
    return value.strip().lower()


def _parse_person(value: Any, name: str) -> str | None:
    if isinstance(value, bool | list | tuple | dict):
        raise RowError(f"{name} {_shorten(value)} is not a name")
    if isinstance(value, str) and "\x00" in value:
        raise RowError(f"{name} {_shorten(value)} holds a zero byte")
    # Written as labels are, so that a name is the same in both.
    label = format_label(value)
    if label is not None and len(label) > _MAX_NAME:
        raise RowError(f"{name} has {len(label)} characters: at most {_MAX_NAME} are taken")
    return label


def _parse_text(value: Any, name: str, most: int) -> str | None:
    if _is_absent(value):
        return None
    if not isinstance(value, str):
        raise RowError(f"{name} {_shorten(value)} is not a text")
    if len(value) > most:
        raise RowError(f"{name} has {len(value)} characters: at most {most} are taken")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(f"{name} is not UTF-8") from None
    return value


def _parse_time(value: Any) -> datetime | None:
    if _is_absent(value):
        return None
    time = value
    if isinstance(value, str):
        try:
            time = datetime.fromisoformat(value.strip())
        except ValueError:
            raise RowError(f"the time {_shorten(value)} is not ISO 8601, such as 2026-12-01T09:30:00Z") from None
    if not isinstance(time, datetime) or time != time:
        raise RowError(f"the time {_shorten(value)} is not ISO 8601, such as 2026-12-01T09:30:00Z")
    try:
        zoned = time if time.tzinfo is not None else time.replace(tzinfo=UTC)
        # Subclasses of datetime hold nanoseconds, which the table does not.
        utc = zoned.astimezone(UTC)
        return datetime(*utc.timetuple()[:6], utc.microsecond, tzinfo=UTC)
    except (OverflowError, ValueError):
        raise RowError(f"the time {_shorten(value)} is out of range") from None


def _parse_box(value: Any, name: str) -> list[float] | None:
    if _is_absent(value):
        return None
    box = value
    if isinstance(value, str):
        try:
            box = json.loads(value[:1000])
        except (ValueError, RecursionError):
            raise RowError(f"{name} {_shorten(value)} is not four numbers") from None
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(map(_is_number, box)):
        raise RowError(f"{name} {_shorten(value)} is not four numbers: x1, y1, x2, y2")
    left, top, right, bottom = (float(number) for number in box)
    if not (left < right and top < bottom):
        raise RowError(f"{name} {_shorten(value)} has no area: x1, y1, x2, y2")
    return [left, top, right, bottom]


def _is_number(value: Any) -> bool:
    is_numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return is_numeric and abs(value) < 1e9


def _shorten(value: Any) -> str:
    """Quote a value in a message: not more of it than a line holds, and no control characters."""
    text = repr(value if not isinstance(value, int) or abs(value) < 1 << 200 else "a number of many digits")
    return text if len(text) <= 80 else f"{text[:77]}…"
