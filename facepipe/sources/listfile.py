"""List files: an image and its label a line, in the layouts that face corpora are handed around in."""

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import IO

from facepipe.errors import SourceError
from facepipe.sources.identity import IdentityRule, rule
from facepipe.sources.item import WorkItem, broken
from facepipe.sources.kinds import IMAGE_EXTENSIONS, extension
from facepipe.sources.parquet import IDENTITY_COLUMNS, URI_COLUMNS, named_image

HEADER_URIS = (*URI_COLUMNS, "filename", "image", "image_id", "img")
_SNIFF_LINES = 50


@dataclass(frozen=True)
class Layout:
    """How a list file's lines are to be read: delimiter (None: any white space), columns, lines to skip."""

    delimiter: str | None
    image: int
    label: int | None
    skip: int = 0


class ListSource:
    """Images named by a list file: `path label` (CASIA-WebFace), `identity_CelebA.txt`, an MS-Celeb-1M clean list
    (`m.0107_f/5-FaceId-0.jpg 0`), plain paths, or CSV/TSV with a header. Paths are relative to `root`,
    by default the list's own folder.
    """

    def __init__(self, path: str, identity: IdentityRule = "auto", name: str | None = None, root: str | None = None):
        self.path = path
        self.root = root if root is not None else os.path.dirname(os.path.abspath(path))
        self.name = name or os.path.splitext(os.path.basename(path))[0]
        self.ignored = 0
        self._identify = rule(identity)

    def __iter__(self) -> Iterator[WorkItem]:
        self.ignored = 0
        with self._open() as file:
            layout = detect_layout(list(islice(file, _SNIFF_LINES)), self.path)
        with self._open() as file:
            for number, fields in _records(file, layout):
                if not fields or not any(fields):
                    continue
                yield self._item(number, fields, layout)

    def _open(self) -> IO[str]:
        try:
            return open(self.path, encoding="utf-8-sig", errors="surrogateescape", newline="")
        except OSError as error:
            raise SourceError(f"cannot read the list {self.path!r}: {error.strerror}") from error

    def _item(self, number: int, fields: list[str], layout: Layout) -> WorkItem:
        if len(fields) <= max(layout.image, layout.label or 0) or not fields[layout.image]:
            return broken(f"{self.path}#line{number}", "the line names no image")
        name = fields[layout.image].replace("\\", "/")
        label = None if layout.label is None else fields[layout.label]
        identity = self._identify(name, label)
        return named_image(name, self.root, identity)


def detect_layout(lines: list[str], path: str) -> Layout:
    """The layout of a list from its first lines."""
    lines = [line.rstrip("\r\n") for line in lines if line.strip()]
    if not lines:
        raise SourceError(f"the list {path!r} is empty")
    for delimiter in ("\t", ",", ";", None):
        header = [field.strip().strip('"').lower() for field in lines[0].split(delimiter)]
        image = next((header.index(c) for c in HEADER_URIS if c in header), None)
        if image is not None:
            label = next((header.index(c) for c in IDENTITY_COLUMNS if c in header), None)
            return Layout(delimiter, image, label, skip=1)
    skip = (
        2 if lines[0].strip().isdigit() and len(lines) > 2 else 0
    )  # CelebA's older lists open with a count and a header
    for delimiter in ("\t", ","):
        if {len(line.split(delimiter)) for line in lines[skip:]} == {2}:
            return Layout(delimiter, 0, 1, skip)
    return Layout("\n", 0, None, skip) if _paths_alone(lines[skip:]) else Layout(None, 0, 1, skip)


def _paths_alone(lines: list[str]) -> bool:
    """Whether most lines end in an image's extension, that is, carry a path alone (which may hold spaces)."""
    return sum(extension(line.strip()) in IMAGE_EXTENSIONS for line in lines) * 2 > len(lines)


def _records(file: IO[str], layout: Layout) -> Iterator[tuple[int, list[str]]]:
    if layout.delimiter in (",", "\t", ";"):
        rows: Iterator[list[str]] = csv.reader(file, delimiter=layout.delimiter)
        numbered = enumerate(([field.strip() for field in row] for row in rows), 1)
    elif layout.delimiter == "\n":
        numbered = enumerate(([line.strip()] for line in file), 1)
    else:
        # The label is the last word; what stands before it is the path, spaces and all.
        numbered = enumerate((line.strip().rsplit(None, 1) for line in file), 1)
    yield from islice(numbered, layout.skip, None)
