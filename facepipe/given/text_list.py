"""Read lists of boxes and landmarks line by line."""

import csv
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import IO

from facepipe.errors import SourceError
from facepipe.given.batch import NO_BOX, NO_POINTS, ListedFace, RecordBatch
from facepipe.given.columns import Columns, detect_columns
from facepipe.given.records import Kind, Records
from facepipe.sources.labels import format_label
from facepipe.sources.list_file import read_lines
from facepipe.storage import describe_error
from facepipe.text import restore_cell

_SNIFF_LINES = 50
_NO_SCORE = float("nan")
_MAX_SIDE = 1 << 31


def read_text_list(path: str, batch: RecordBatch) -> Iterator[Records]:
    """Read a list, and yield its lines in batches.

    A line that cannot be used is counted, and its image gets no face.

    Raises:
        SourceError: The file cannot be read, or its columns are not known.
    """
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            columns = detect_columns(list(islice(read_lines(file), _SNIFF_LINES)), path)
            file.seek(0)
            for number, fields in _iterate_fields(file, columns):
                _add_line(batch, number, fields, columns)
                if batch.is_full:
                    yield batch.take()
    except OSError as error:
        raise SourceError(f"cannot read the list of boxes {path!r}: {describe_error(error)}") from error
    except csv.Error as error:
        raise SourceError(f"the list of boxes {path!r} cannot be read to its end: {error}") from error
    yield batch.take()


def _iterate_fields(file: IO[str], columns: Columns) -> Iterator[tuple[int, list[str]]]:
    """Yield number and fields of the lines that are not empty."""
    lines = read_lines(file)
    rows: Iterator[list[str]] = (
        (line.split() for line in lines)
        if columns.delimiter is None
        else csv.reader(lines, delimiter=columns.delimiter)
    )
    for number, row in islice(enumerate(rows, 1), columns.skip, None):
        if any(row):
            yield number, row


def _add_line(batch: RecordBatch, number: int, fields: list[str], columns: Columns) -> None:
    name = fields[columns.name].strip() if len(fields) > columns.name else ""
    try:
        face = _read_face(batch, fields, columns)
    except (ValueError, OverflowError) as error:
        face = ListedFace(Kind.UNUSABLE, problem=str(error))
    batch.add(name, number, face)


def _read_face(batch: RecordBatch, fields: list[str], columns: Columns) -> ListedFace:
    """Read the numbers of a line. Raises ValueError for what is no number."""
    if len(fields) < columns.count:
        raise ValueError(f"{len(fields)} fields, expected {columns.count}")
    label = None
    if columns.label is not None and len(fields) > columns.label:
        label = format_label(restore_cell(fields[columns.label]))
    return ListedFace(
        box=NO_BOX if columns.box is None else _read_box(fields, columns),
        points=NO_POINTS if columns.points is None else _pick_numbers(fields, columns.points),
        score=_NO_SCORE if columns.score is None else float(fields[columns.score] or _NO_SCORE),
        label=batch.encode_label(label),
        size=(0, 0) if columns.size is None else _read_size(fields, columns.size),
    )


def _read_box(fields: list[str], columns: Columns) -> tuple[float, ...]:
    left, top, third, fourth = _pick_numbers(fields, columns.box or ())
    right = left + third if columns.is_sized else third
    bottom = top + fourth if columns.is_sized else fourth
    return (left, top, right, bottom)


def _read_size(fields: list[str], positions: Sequence[int]) -> tuple[int, int]:
    width, height = (int(fields[position]) for position in positions)
    return (width, height) if min(width, height) >= 0 and max(width, height) < _MAX_SIDE else (0, 0)


def _pick_numbers(fields: list[str], positions: Sequence[int]) -> tuple[float, ...]:
    numbers = tuple(float(fields[position]) for position in positions)
    for number in numbers:
        if not math.isfinite(number):
            raise ValueError(f"a coordinate of {number}")
    return numbers
