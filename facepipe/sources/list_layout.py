"""The layout of a list file, found from its first lines: which field names the image, and which the person."""

import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from facepipe.errors import SourceError
from facepipe.sources.extensions import IMAGE_EXTENSIONS, get_extension
from facepipe.sources.labels import find_label_column
from facepipe.sources.parquet import URI_COLUMNS

HEADER_URIS = (
    *URI_COLUMNS,
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "image",
    "image_id",
    "image_name",
    "img",
    "img_path",
)
# Rows of a list without a header that are looked at on the disk.
_CHECKED_ROWS = 5
# The path up to the last extension of an image that is followed by white space, and the rest.
_PATH_AND_REST = re.compile(rf"(.*\.(?:{'|'.join(sorted(IMAGE_EXTENSIONS))}))\s+(\S.*)", re.IGNORECASE | re.DOTALL)
_NUMBER = re.compile(r"[-+]?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?")


@dataclass(frozen=True)
class ListLayout:
    """How the lines of a list file are read.

    Attributes:
        delimiter: A character. " " means any white space, None the white space after the path, and a newline that a
            line is one field.
        image: Column of the image.
        label: Column of the label; None if there is none.
        skip: Lines before the first image, blank ones not counted.
        columns: Names of the columns, or their numbers from 1; empty if a line is only a path.
    """

    delimiter: str | None
    image: int
    label: int | None
    skip: int = 0
    columns: tuple[str, ...] = ()


def detect_layout(
    lines: Sequence[str],
    path: str,
    label_column: str | None = None,
    exists: Callable[[str], bool] = lambda name: False,
) -> ListLayout:
    """Detect the layout of a list.

    Args:
        lines: its first lines.
        path: its path, for messages.
        label_column: name of the label's column, or its number from 1; by default the first known one.
        exists: tells whether an image of this name is there.

    Raises:
        SourceError: the list is empty, or has no such column.
    """
    lines = [line.rstrip("\r\n") for line in lines if line.strip()]
    if not lines:
        raise SourceError(f"the list {path!r} is empty")
    # CelebA's lists begin with the number of images, and some have a header after it.
    skip = 1 if lines[0].strip().isdigit() and len(lines) > 1 else 0
    lines = lines[skip:]
    layout = _detect_header(lines, skip)
    if layout is None and skip and not any(map(is_image, split_line(lines[0], " "))) and len(lines) > 1:
        # After a count the next line is a header if none of its fields is an image.
        skip += 1
        lines = lines[1:]
    layout = layout or _detect_columns(lines, skip, exists)
    if label_column is None:
        return layout
    return _choose_label(layout, label_column, path)


def _choose_label(layout: ListLayout, label_column: str, path: str) -> ListLayout:
    """Take the label from the column that the user named."""
    names = [name.lower() for name in layout.columns]
    if label_column.lower() in names:
        label = names.index(label_column.lower())
    elif label_column.isdecimal() and 1 <= int(label_column) <= len(names):
        label = int(label_column) - 1
    else:
        columns = f"its columns are {', '.join(layout.columns)}" if names else "its lines are only paths"
        raise SourceError(f"the list {path!r} has no column {label_column!r}: {columns}")
    return ListLayout(layout.delimiter, layout.image, label, layout.skip, layout.columns)


def _detect_header(lines: list[str], skip: int) -> ListLayout | None:
    """Detect a header, and the columns that it names; None if the first line is none."""
    for delimiter in ("\t", ",", ";", " "):
        header = [field.strip() for field in split_line(lines[0], delimiter)]
        if any(map(is_image, header)):
            continue
        image = find_column(header, HEADER_URIS)
        if image is None and delimiter != " " and all(map(_may_be_column, header)):
            # The name of the image's column is not known, but the column of images is.
            image = _find_image_column(lines[1:], delimiter, len(header))
        if image is not None:
            label_name = find_label_column([name for n, name in enumerate(header) if n != image])
            label = None if label_name is None else header.index(label_name)
            return ListLayout(delimiter, image, label, skip + 1, tuple(header))
    return None


def _may_be_column(field: str) -> bool:
    """Tell whether a field can be the name of a column, and not a path or a number."""
    return bool(field) and not _NUMBER.fullmatch(field) and not set(field) & set("/\\.")


def _detect_columns(lines: list[str], skip: int, exists: Callable[[str], bool]) -> ListLayout:
    """Detect the columns of a list without a header."""
    # No path holds a tab. Commas and spaces may be parts of a path.
    columns = _detect_separated(lines, "\t", skip)
    if columns is not None:
        return columns
    columns = _detect_spaced(lines, skip, exists)
    if columns is not None:
        return columns
    # If most lines end in an image's extension, they are paths alone, which may hold spaces and commas.
    if sum(map(is_image, lines)) * 2 > len(lines):
        return _detect_label_first(lines, skip, exists) or ListLayout("\n", 0, None, skip)
    columns = _detect_separated(lines, ",", skip) or _detect_separated(lines, ";", skip)
    if columns is not None:
        return columns
    # A path and its label. Several numbers after the path are no label, but attributes or a box.
    rests = [match[2].split() for match in map(_PATH_AND_REST.fullmatch, map(str.strip, lines)) if match]
    is_numbers = [len(rest) > 1 and all(map(_NUMBER.fullmatch, rest)) for rest in rests]
    if sum(is_numbers) * 2 > len(lines):
        return ListLayout(" ", 0, None, skip, tuple(str(n + 1) for n in range(1 + max(map(len, rests)))))
    return ListLayout(None, 0, 1, skip, ("1", "2"))


def _detect_separated(lines: list[str], delimiter: str, skip: int) -> ListLayout | None:
    """Detect columns with a separator; None if the lines differ in their number, or none holds images."""
    rows = [split_line(line, delimiter) for line in lines]
    count = len(rows[0])
    image = _find_image_column(lines, delimiter, count) if count > 1 else None
    if image is None or {len(row) for row in rows} != {count}:
        return None
    columns = tuple(str(n + 1) for n in range(count))
    return ListLayout(delimiter, image, _find_label_position(rows, image), skip, columns)


def _detect_spaced(lines: list[str], skip: int, exists: Callable[[str], bool]) -> ListLayout | None:
    """Detect three or more columns with spaces between, by the files that are there: spaces may be parts of a path."""
    layout = _detect_separated(lines, " ", skip)
    if layout is None or layout.image == 0 or layout.label is None or len(layout.columns) < 3:
        return None
    is_there = all(exists(split_line(line, " ")[layout.image]) for line in lines[:_CHECKED_ROWS])
    return layout if is_there else None


def _find_label_position(rows: list[list[str]], image: int) -> int | None:
    """Find the label's column in a list without a header; None if it cannot be told."""
    count = len(rows[0])
    if count == 2:
        return 1 - image
    first = {row[0].strip() for row in rows}
    # insightface: whether it is aligned, path, label, and perhaps a box and landmarks.
    if image == 1 and first <= {"0", "1"}:
        return 2
    # MXNet: index, label, path.
    if image == count - 1 == 2 and all(map(str.isdecimal, first)):
        return 1
    return None


def _detect_label_first(lines: list[str], skip: int, exists: Callable[[str], bool]) -> ListLayout | None:
    """Detect a label before the path, by the files that are there; None if the whole lines are, or neither."""
    rows = lines[:_CHECKED_ROWS]
    if any(exists(line.strip()) for line in rows):
        return None
    for delimiter in (",", ";", " "):
        fields = [split_line(line, delimiter) for line in rows]
        if all(len(row) == 2 and exists(row[1].strip()) for row in fields):
            return ListLayout(delimiter, 1, 0, skip, ("1", "2"))
    return None


def find_column(names: Sequence[str], candidates: Sequence[str]) -> int | None:
    """Find the first candidate among the names of columns, in upper or lower case."""
    lower = [name.lower() for name in names]
    return next((lower.index(name) for name in candidates if name in lower), None)


def _find_image_column(lines: Sequence[str], delimiter: str, count: int) -> int | None:
    """Find the one column of so many in which most fields are images; None if there is none, or several."""
    rows = [row for row in (split_line(line, delimiter) for line in lines) if len(row) == count]
    if count < 2 or not rows or len(rows) * 2 <= len(lines):
        return None
    columns = [n for n in range(count) if sum(is_image(row[n]) for row in rows) * 2 > len(rows)]
    return columns[0] if len(columns) == 1 else None


def split_line(line: str, delimiter: str) -> list[str]:
    """Split a line into fields; none if it cannot be read."""
    if delimiter == " ":
        return line.split()
    try:
        return next(csv.reader([line], delimiter=delimiter, quoting=get_quoting(delimiter)), [])
    except csv.Error:
        return []


def split_path(line: str) -> list[str]:
    """Split a line into a path and the rest, at the last extension of an image or else at the last white space."""
    match = _PATH_AND_REST.fullmatch(line)
    return [match[1], match[2]] if match else line.rsplit(None, 1)


def get_quoting(delimiter: str) -> Literal[0, 3]:
    """Return csv's mode of quoting. Tab-separated lists quote nothing: a quotation mark there is part of a name."""
    return csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL


def is_image(field: str) -> bool:
    """Tell whether a field has an image's extension."""
    return get_extension(field.strip()) in IMAGE_EXTENSIONS


def detect_object_layout(columns: Sequence[str], path: str, label_column: str | None) -> ListLayout:
    """Detect which keys of the objects of a file of JSON lines name the image and its label.

    Raises:
        SourceError: no key is known to name images, or there is no key for labels of the requested name.
    """
    by_name = {name.lower(): at for at, name in reversed(list(enumerate(columns)))}
    image = next((by_name[name] for name in HEADER_URIS if name in by_name), None)
    if image is None:
        raise SourceError(
            f"the list {path!r} names no images: its keys are {', '.join(columns)}, and none of them is "
            f"{', '.join(HEADER_URIS)}"
        )
    label_name = label_column or find_label_column(columns)
    label = None if label_name is None else by_name.get(label_name.lower())
    if label_column is not None and label is None:
        raise SourceError(f"the list {path!r} has no key {label_column!r}: its keys are {', '.join(columns)}")
    return ListLayout("json", image, label, columns=tuple(columns))
