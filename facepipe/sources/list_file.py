"""List files: an image and its label per line, in the layouts that face corpora are handed around in."""

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
from facepipe.sources.labels import LABEL_COLUMNS
from facepipe.sources.parquet import HOLDS_IMAGE, URI_COLUMNS, holds_image, make_named_item
from facepipe.storage import describe_error, to_absolute

HEADER_URIS = (*URI_COLUMNS, "filename", "image", "image_id", "img")
# Lines at the beginning of a list that decide its layout.
_SNIFF_LINES = 50
# Characters after which a line is cut.
_MAX_LINE = 1 << 16


@dataclass(frozen=True)
class ListLayout:
    """How the lines of a list file are read.

    Attributes:
        delimiter: A character. " " means any white space, None the white space before the last word, and a newline that
            a line is one field.
        image: Column of the image.
        label: Column of the label; None if there is none.
        skip: Lines before the first image, blank ones not counted.
    """

    delimiter: str | None
    image: int
    label: int | None
    skip: int = 0


class ListSource:
    """Images named by a list file.

    It reads `path label` (CASIA-WebFace), `identity_CelebA.txt`, an MS-Celeb-1M clean list
    (`m.0107_f/5-FaceId-0.jpg 0`), plain paths, and CSV or TSV with a header. Paths are relative to `root`, by default
    the list's own folder, and must not lead out of it. If `root` is given, absolute paths, URLs and the targets of
    symbolic links must lie inside it as well.

    Attributes:
        path: Path of the list.
        root: Folder that paths are relative to.
        name: Name of the source.
        ignored: Always 0: every line is an item.
    """

    def __init__(self, path: str, identity: IdentityRule = "auto", name: str | None = None, root: str | None = None):
        self.path = path
        self.root = to_absolute(root) if root is not None else os.path.dirname(os.path.abspath(path))
        self.name = name or os.path.splitext(os.path.basename(path))[0]
        self.ignored = 0
        self._is_confined = root is not None
        self._identify = make_identity_rule(identity)

    def __iter__(self) -> Iterator[WorkItem]:
        # The first pass finds the layout, the second one reads the items.
        self.ignored = 0
        with self._open() as file:
            layout = detect_layout(list(islice(_read_lines(file), _SNIFF_LINES)), self.path)
            # The same open file: a list that is replaced in between may have another layout.
            file.seek(0)
            try:
                for number, fields in _read_records(file, layout):
                    yield self._make_item(number, fields, layout)
            except csv.Error as error:
                yield make_broken_item(self.path, f"list cannot be read to its end: {error}")

    def _open(self) -> IO[str]:
        try:
            return open(self.path, encoding="utf-8-sig", errors="surrogateescape", newline="")
        except OSError as error:
            raise SourceError(f"cannot read the list {self.path!r}: {describe_error(error)}") from error

    def _make_item(self, number: int, fields: list[str], layout: ListLayout) -> WorkItem:
        # A line with too few fields becomes a row that says so.
        if len(fields) <= max(layout.image, layout.label or 0) or not fields[layout.image]:
            return make_broken_item(self.path, "the line names no image", f"line{number}")
        name = fields[layout.image].replace("\\", "/")
        if holds_image(name):
            return make_broken_item(self.path, HOLDS_IMAGE, f"line{number}")
        label = None if layout.label is None else fields[layout.label]
        identity = self._identify(name, label)
        return make_named_item(name, self.root, identity, self._is_confined)


def detect_layout(lines: list[str], path: str) -> ListLayout:
    """Detect the layout of a list from its first lines. Raises SourceError for an empty list."""
    lines = [line.rstrip("\r\n") for line in lines if line.strip()]
    if not lines:
        raise SourceError(f"the list {path!r} is empty")
    # CelebA's lists begin with the number of images, and some have a header after it.
    skip = 1 if lines[0].strip().isdigit() and len(lines) > 1 else 0
    lines = lines[skip:]
    # A header names its columns.
    for delimiter in ("\t", ",", ";", " "):
        header = [field.strip().lower() for field in _split_line(lines[0], delimiter)]
        image = next((header.index(column) for column in HEADER_URIS if column in header), None)
        if image is not None and not any(_is_image(field) for field in header):
            label = next((header.index(column) for column in LABEL_COLUMNS if column in header), None)
            return ListLayout(delimiter, image, label, skip + 1)
    # If most lines end in an image's extension, they are paths alone, which may hold spaces.
    if sum(_is_image(line) for line in lines) * 2 > len(lines):
        return ListLayout("\n", 0, None, skip)
    # After a count the next line is a header if none of its fields is an image.
    if skip and not any(_is_image(field) for field in _split_line(lines[0], " ")) and len(lines) > 1:
        skip += 1
        lines = lines[1:]
    # Two columns without a header: the image first, and its label second.
    for delimiter in ("\t", ","):
        rows = [_split_line(line, delimiter) for line in lines]
        if {len(row) for row in rows} == {2} and sum(_is_image(row[0]) for row in rows) * 2 > len(rows):
            return ListLayout(delimiter, 0, 1, skip)
    return ListLayout(None, 0, 1, skip)


def _split_line(line: str, delimiter: str) -> list[str]:
    if delimiter == " ":
        return line.split()
    try:
        return next(csv.reader([line], delimiter=delimiter, quoting=_get_quoting(delimiter)), [])
    except csv.Error:
        return []


def _get_quoting(delimiter: str) -> Literal[0, 3]:
    """Return csv's mode of quoting. Tab-separated lists quote nothing: a quotation mark there is part of a name."""
    return csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL


def _is_image(field: str) -> bool:
    return get_extension(field.strip()) in IMAGE_EXTENSIONS


def _read_lines(file: IO[str]) -> Iterator[str]:
    """Yield the file's lines. One that is too long to name an image is cut, so that it cannot fill the memory."""
    while line := file.readline(_MAX_LINE):
        yield line
        while line and len(line) == _MAX_LINE and not line.endswith(("\n", "\r")):
            line = file.readline(_MAX_LINE)


def _read_records(file: IO[str], layout: ListLayout) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, fields) of the lines that are not empty, after the ones to skip."""
    lines = _read_lines(file)
    rows: Iterator[list[str]]
    match layout.delimiter:
        case None:  # the label is the last word; everything before it is the path, spaces included
            rows = (line.strip().rsplit(None, 1) for line in lines)
        case "\n":
            rows = ([line.strip()] for line in lines)
        case " ":
            rows = (line.split() for line in lines)
        case delimiter:
            rows = csv.reader(lines, delimiter=delimiter, quoting=_get_quoting(delimiter))
    # Lines are numbered before blank ones are dropped, so that messages name the line of the file.
    numbered = ((number, [field.strip() for field in row]) for number, row in enumerate(rows, 1))
    yield from islice(((number, row) for number, row in numbered if any(row)), layout.skip, None)
