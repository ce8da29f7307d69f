"""List files: an image and its label a line, in the layouts that face corpora are handed around in."""

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import IO, Literal

from facepipe.errors import SourceError
from facepipe.sources.extensions import IMAGE_EXTENSIONS, get_extension
from facepipe.sources.identity import IdentityRule, make_identity_rule
from facepipe.sources.item import WorkItem, make_broken_item
from facepipe.sources.parquet import IDENTITY_COLUMNS, URI_COLUMNS, make_named_item
from facepipe.storage import describe_error

HEADER_URIS = (*URI_COLUMNS, "filename", "image", "image_id", "img")
_SNIFF_LINES = 50
_MAX_LINE = 1 << 16


@dataclass(frozen=True)
class ListLayout:
    """How a list file's lines are to be read.

    delimiter: a character; " " any white space; None: white space before the last word; a newline: no fields at all
    image, label: columns; skip: lines before the first image, blank ones not counted
    """

    delimiter: str | None
    image: int
    label: int | None
    skip: int = 0


class ListSource:
    """Images named by a list file: `path label` (CASIA-WebFace), `identity_CelebA.txt`, an MS-Celeb-1M clean list
    (`m.0107_f/5-FaceId-0.jpg 0`), plain paths, or CSV/TSV with a header. Paths are relative to `root`,
    by default the list's own folder, and must not lead out of it. Where `root` is given, absolute paths, URLs and the
    targets of symbolic links must lie inside it as well.
    """

    def __init__(self, path: str, identity: IdentityRule = "auto", name: str | None = None, root: str | None = None):
        self.path = path
        self._confined = root is not None
        self.root = root if root is not None else os.path.dirname(os.path.abspath(path))
        self.name = name or os.path.splitext(os.path.basename(path))[0]
        self.ignored = 0
        self._identify = make_identity_rule(identity)

    def __iter__(self) -> Iterator[WorkItem]:
        self.ignored = 0
        with self._open() as file:
            layout = detect_layout(list(islice(_lines(file), _SNIFF_LINES)), self.path)
        with self._open() as file:
            try:
                for number, fields in _records(file, layout):
                    yield self._item(number, fields, layout)
            except csv.Error as error:
                yield make_broken_item(self.path, f"list cannot be read to its end: {error}")

    def _open(self) -> IO[str]:
        try:
            return open(self.path, encoding="utf-8-sig", errors="surrogateescape", newline="")
        except OSError as error:
            raise SourceError(f"cannot read the list {self.path!r}: {describe_error(error)}") from error

    def _item(self, number: int, fields: list[str], layout: ListLayout) -> WorkItem:
        if len(fields) <= max(layout.image, layout.label or 0) or not fields[layout.image]:
            return make_broken_item(self.path, "the line names no image", f"line{number}")
        name = fields[layout.image].replace("\\", "/")
        label = None if layout.label is None else fields[layout.label]
        identity = self._identify(name, label)
        return make_named_item(name, self.root, identity, self._confined)


def detect_layout(lines: list[str], path: str) -> ListLayout:
    """The layout of a list from its first lines."""
    lines = [line.rstrip("\r\n") for line in lines if line.strip()]
    if not lines:
        raise SourceError(f"the list {path!r} is empty")
    # CelebA's lists open with the number of images, and some with a header behind it.
    count = 1 if lines[0].strip().isdigit() and len(lines) > 1 else 0
    lines = lines[count:]
    for delimiter in ("\t", ",", ";", " "):
        header = [field.strip().lower() for field in _split(lines[0], delimiter)]
        image = next((header.index(c) for c in HEADER_URIS if c in header), None)
        if image is not None and not any(_is_image(field) for field in header):
            label = next((header.index(c) for c in IDENTITY_COLUMNS if c in header), None)
            return ListLayout(delimiter, image, label, count + 1)
    if _paths_alone(lines):
        return ListLayout("\n", 0, None, count)
    if count and not any(_is_image(field) for field in _split(lines[0], " ")) and len(lines) > 1:
        count, lines = count + 1, lines[1:]
    for delimiter in ("\t", ","):
        rows = [_split(line, delimiter) for line in lines]
        if {len(row) for row in rows} == {2} and sum(_is_image(row[0]) for row in rows) * 2 > len(rows):
            return ListLayout(delimiter, 0, 1, count)
    return ListLayout(None, 0, 1, count)


def _split(line: str, delimiter: str) -> list[str]:
    """The fields of one line."""
    if delimiter == " ":
        return line.split()
    try:
        return next(csv.reader([line], delimiter=delimiter, quoting=_quoting(delimiter)), [])
    except csv.Error:
        return []


def _quoting(delimiter: str) -> Literal[0, 3]:
    """Tab-separated lists quote nothing: a quotation mark there is part of a name."""
    return csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL


def _is_image(field: str) -> bool:
    return get_extension(field.strip()) in IMAGE_EXTENSIONS


def _paths_alone(lines: list[str]) -> bool:
    """Whether most lines end in an image's extension, that is, carry a path alone (which may hold spaces)."""
    return sum(get_extension(line.strip()) in IMAGE_EXTENSIONS for line in lines) * 2 > len(lines)


def _lines(file: IO[str]) -> Iterator[str]:
    """The file's lines. One that is too long to name an image is cut, so that it cannot fill the memory."""
    while line := file.readline(_MAX_LINE):
        yield line
        while line and len(line) == _MAX_LINE and not line.endswith(("\n", "\r")):
            line = file.readline(_MAX_LINE)


def _records(stream: IO[str], layout: ListLayout) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of the lines that hold anything, behind the ones to skip."""
    file = _lines(stream)
    rows: Iterator[list[str]]
    match layout.delimiter:
        case None:  # the label is the last word; what stands before it is the path, spaces and all
            rows = (line.strip().rsplit(None, 1) for line in file)
        case "\n":
            rows = ([line.strip()] for line in file)
        case " ":
            rows = (line.split() for line in file)
        case delimiter:
            rows = csv.reader(file, delimiter=delimiter, quoting=_quoting(delimiter))
    numbered = ((n, [field.strip() for field in row]) for n, row in enumerate(rows, 1))
    yield from islice(((n, row) for n, row in numbered if any(row)), layout.skip, None)
