"""Which field of a list's lines is the image, its box, its landmarks: by the header, or by the number of fields.

Known are VGGFace2's lists of boxes and of landmarks, CelebA's, those of landmarks and scores of IJB's test suites, and
CSV or TSV with a header. A list without one is `path,x1,y1,x2,y2`, and a label behind it.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from facepipe.errors import SourceError
from facepipe.sources.labels import LABEL_COLUMNS

_NAMES = (
    "path",
    "uri",
    "file_name",
    "filename",
    "file",
    "image_path",
    "image",
    "name_id",
    "image_id",
    "name",
    "img",
)
_CORNERS = (
    ("x1", "y1", "x2", "y2"),
    ("x_1", "y_1", "x_2", "y_2"),
    ("left", "top", "right", "bottom"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("x_min", "y_min", "x_max", "y_max"),
)
_SIZED = tuple(
    (*start, *size)
    for start, size in product(
        (("x", "y"), ("x1", "y1"), ("x_1", "y_1"), ("left", "top"), ("xmin", "ymin")),
        (("w", "h"), ("width", "height")),
    )
)
_POINTS = (
    tuple(f"p{point}{axis}" for point in range(1, 6) for axis in "xy"),
    tuple(f"{part}_{axis}" for part in ("lefteye", "righteye", "nose", "leftmouth", "rightmouth") for axis in "xy"),
)
_SCORES = ("score", "det_score", "confidence")
_SIZES = (("image_width", "image_height"),)
# Number of fields of lists without a header.
_BOX_FIELDS = 5
_POINT_FIELDS = 11
_BOTH_FIELDS = 15


@dataclass(frozen=True)
class Columns:
    """Positions of the fields of a line.

    Attributes:
        delimiter: What separates them; None for white space.
        skip: Lines before the first image.
        count: Fewest fields of a line.
        name: The image.
        box: Its box; None without one.
        is_sized: Whether the box is left, top, width and height instead of two corners.
        points: Its ten coordinates of landmarks; None without them.
        score: Confidence; None without one.
        label: Label; None without one.
        size: Width and height of the image; None without them.
    """

    delimiter: str | None
    skip: int
    count: int
    name: int = 0
    box: tuple[int, ...] | None = None
    is_sized: bool = False
    points: tuple[int, ...] | None = None
    score: int | None = None
    label: int | None = None
    size: tuple[int, ...] | None = None


def detect_columns(lines: Sequence[str], path: str) -> Columns:
    """Detect the columns of a list from its first lines.

    Raises:
        SourceError: It is not known what they are.
    """
    # CelebA's lists begin with the number of their lines.
    skip = 1 if len(lines) > 1 and lines[0].strip().isdecimal() else 0
    first = lines[skip] if len(lines) > skip else ""
    delimiter = next((mark for mark in (",", "\t") if mark in first), None)
    rows = [split_fields(line, delimiter) for line in lines[skip:] if line.strip()]
    if not rows:
        raise SourceError(f"the list of boxes {path!r} is empty")
    header = [field.lower() for field in rows[0]]
    columns = None
    if not any(_is_number(field) for field in header[1:]):
        if len(rows) > 1 and len(rows[1]) == len(header) + 1:
            header = ["path", *header]  # in CelebA's list of landmarks the image has no title
        columns = _match_header(header, delimiter, skip + 1)
    else:
        columns = _count_fields(rows, delimiter, skip)
    if columns is None:
        raise SourceError(
            f"the columns of the list of boxes {path!r} are not known: {rows[0][:12]}. Give it a header such as "
            "path,x1,y1,x2,y2,identity or path,x,y,w,h (pixels); landmarks are p1x,p1y to p5x,p5y"
        )
    return columns


def split_fields(line: str, delimiter: str | None) -> list[str]:
    """Split a line into its fields."""
    if delimiter is None:
        return line.split()
    return [field.strip() for field in next(csv.reader([line], delimiter=delimiter), [])]


def _match_header(header: list[str], delimiter: str | None, skip: int) -> Columns | None:
    name = next((header.index(title) for title in _NAMES if title in header), None)
    corners = _find_all(header, _CORNERS)
    sized = _find_all(header, _SIZED) if corners is None else None
    points = _find_all(header, _POINTS)
    box = corners or sized
    if name is None or (box is None and points is None):
        return None
    used = {name, *(box or ()), *(points or ())}
    score = _find_one(header, _SCORES)
    label = next((header.index(title) for title in LABEL_COLUMNS if title in header), None)
    size = _find_all(header, _SIZES)
    used.update(position for position in (score, label, *(size or ())) if position is not None)
    return Columns(delimiter, skip, max(used) + 1, name, box, sized is not None, points, score, label, size)


def _count_fields(rows: list[list[str]], delimiter: str | None, skip: int) -> Columns | None:
    """Tell the columns of a list without a header from the number of its fields."""
    count = len(rows[0])
    box = tuple(range(1, 5))
    if count in (_BOX_FIELDS, _BOX_FIELDS + 1):
        # One more field is a label, unless all of them are confidences.
        score = count - 1 if count > _BOX_FIELDS and _are_scores(rows, count - 1) else None
        label = count - 1 if count > _BOX_FIELDS and score is None else None
        return Columns(delimiter, skip, _BOX_FIELDS, box=box, score=score, label=label)
    if count in (_POINT_FIELDS, _POINT_FIELDS + 1):
        score = count - 1 if count > _POINT_FIELDS else None
        return Columns(delimiter, skip, count, points=tuple(range(1, 11)), score=score)
    if count in (_BOTH_FIELDS, _BOTH_FIELDS + 1):
        score = count - 1 if count > _BOTH_FIELDS else None
        return Columns(delimiter, skip, count, box=box, points=tuple(range(5, 15)), score=score)
    return None


def _find_all(header: list[str], choices: Sequence[Sequence[str]]) -> tuple[int, ...] | None:
    """Find the first of several groups of titles of which all are in a header."""
    for titles in choices:
        if all(title in header for title in titles):
            return tuple(header.index(title) for title in titles)
    return None


def _find_one(header: list[str], titles: Sequence[str]) -> int | None:
    return next((header.index(title) for title in titles if title in header), None)


def _are_scores(rows: list[list[str]], position: int) -> bool:
    """Tell whether a column holds confidences: numbers from 0 to 1 with a fraction."""
    fields = [row[position] for row in rows if len(row) > position]
    return all(_is_number(field) and 0 <= float(field) <= 1 for field in fields) and any("." in x for x in fields)


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True
