"""List files: an image and its label per line, in the layouts that face corpora are handed around in."""

import codecs
import csv
import json
import os
import re
from collections.abc import Collection, Iterator
from itertools import islice
from typing import IO, Any

from facepipe.errors import SourceError
from facepipe.sources.extensions import get_extension
from facepipe.sources.identity import Identify, IdentityRule, make_identity_rule
from facepipe.sources.item import WorkItem, make_broken_item
from facepipe.sources.labels import format_label
from facepipe.sources.list_layout import ListLayout, detect_layout, detect_object_layout, get_quoting, split_path
from facepipe.sources.members import MemberRequests, locate_container, split_member
from facepipe.sources.parquet import HOLDS_IMAGE, holds_image, make_named_item
from facepipe.sources.selection import PassedOver, Selection
from facepipe.storage import describe_error, is_remote, to_absolute
from facepipe.text import restore_cell

# Lines at the beginning of a list that decide its layout.
_SNIFF_LINES = 50
# Characters after which a line is cut.
_MAX_LINE = 1 << 16
# Characters that no text has, but for a few by accident. Of random bytes they are 11 %.
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
_MAX_CONTROL = 0.02
_FEW_CONTROL = 5
# How texts of UTF-16 begin, as spreadsheets on Windows write them.
_WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# What no name of a file has, in any encoding: a zero, or bytes that are not UTF-8.
_NOT_IN_NAMES = re.compile(r"[\x00\udc80-\udcff]")


class ListSource:
    """Images named by a list file.

    It reads `path label` (CASIA-WebFace), `identity_CelebA.txt`, an MS-Celeb-1M clean list
    (`m.0107_f/5-FaceId-0.jpg 0`), the `.lst` of insightface and of MXNet, plain paths, and CSV or TSV with or without a
    header. If its columns are named and none is known as a label, no image gets one. Paths are relative to `root`, by
    default the list's own folder, and must not lead out of it. If `root` is given, absolute paths, URLs and the targets
    of symbolic links must lie inside it as well.

    Attributes:
        path: Path of the list.
        root: Folder that paths are relative to.
        name: Name of the source.
        has_labels: Whether the list has a column of labels; None if its lines are only paths.
        notes: Sentences on the list's columns.
    """

    def __init__(
        self,
        path: str,
        identity: IdentityRule = "auto",
        name: str | None = None,
        root: str | None = None,
        *,
        label_column: str | None = None,
        selection: Selection | None = None,
    ):
        self.path = path
        self.root = to_absolute(root) if root is not None else os.path.dirname(os.path.abspath(path))
        self.name = name or os.path.splitext(os.path.basename(path))[0]
        self.has_labels: bool | None = None
        self._rule = identity
        self._label_column = label_column
        self._is_confined = root is not None
        self._selection = selection or Selection()
        self._passed_over = PassedOver()
        self._layout_note = ""

    @property
    def ignored(self) -> int:
        """Number of lines that source.include and source.exclude leave out. Every other line is an item."""
        return self._passed_over.total

    @property
    def other_folders(self) -> Collection[str]:
        """Folders beside the listed ones; none, because a list need not name all images of a folder."""
        return ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on the columns, and on what was left out."""
        return (*filter(None, [self._layout_note]), *self._passed_over.describe())

    def __iter__(self) -> Iterator[WorkItem]:
        if get_extension(self.path) == "jsonl":
            yield from self._list_objects()
            return
        # The first lines tell the layout, by which all lines are then read.
        self._passed_over.clear()
        with self._open() as file:
            lines = list(islice(read_lines(file), _SNIFF_LINES))
            _require_text(lines, self.path)
            layout = detect_layout(lines, self.path, self._label_column, self._exists)
            identify = make_identity_rule(self._choose_rule(layout))
            # The same open file: a list that is replaced in between may have another layout.
            file.seek(0)
            requests = MemberRequests()
            try:
                for number, fields in _read_records(file, layout):
                    item = self._make_item(number, fields, layout, identify, requests)
                    if item is not None:
                        yield item
            except csv.Error as error:
                yield make_broken_item(self.path, f"list cannot be read to its end: {error}")
            # Images in containers come last, because each container is listed once.
            yield from requests.list_items()

    def _list_objects(self) -> Iterator[WorkItem]:
        """Yield the items of JSON lines, as in the `metadata.jsonl` of Hugging Face's image folders."""
        self._passed_over.clear()
        requests = MemberRequests()
        with self._open() as file:
            layout: ListLayout | None = None
            for number, line in enumerate(read_lines(file), 1):
                if not line.strip():
                    continue
                values = _parse_object(line)
                if layout is None and values is not None:
                    layout = detect_object_layout(list(values), self.path, self._label_column)
                    identify = make_identity_rule(self._choose_rule(layout))
                if layout is None or values is None:
                    yield make_broken_item(self.path, "the line is no JSON object", f"line{number}")
                    continue
                fields = [format_label(values.get(name)) or "" for name in layout.columns]
                fields[layout.image] = str(values.get(layout.columns[layout.image]) or "")
                item = self._make_item(number, fields, layout, identify, requests)
                if item is not None:
                    yield item
        yield from requests.list_items()

    def _choose_rule(self, layout: ListLayout) -> IdentityRule:
        """Choose where labels come from, and say so if it is not what the list seems to promise."""
        self._layout_note = ""
        self.has_labels = layout.label is not None if layout.columns else None
        if self._rule not in ("auto", "label") or self.has_labels:
            return "label" if self._rule == "auto" else self._rule
        problem = "its lines are only paths"
        if layout.columns:
            problem = f"none of its columns {', '.join(layout.columns)} is known to hold labels"
        if self._rule == "label":
            raise SourceError(
                f"the list {self.path!r} has no label: {problem}. Add --label-column NAME, or a column's number from 1"
            )
        # Paths alone leave it to the folders' names.
        if not layout.columns:
            return "auto"
        self._layout_note = (
            f"no image of {self.path} got a label: {problem}. Add --label-column NAME, or a column's number from 1"
        )
        return "none"

    def _exists(self, name: str) -> bool:
        path = f"{self.root or '.'}/{name}"
        return not is_remote(path) and "\0" not in path and os.path.exists(path)

    def _open(self) -> IO[str]:
        try:
            with open(self.path, "rb") as file:
                is_wide = file.read(2) in _WIDE_MARKS
            if is_wide:
                return open(self.path, encoding="utf-16", errors="replace", newline="")
            return open(self.path, encoding="utf-8-sig", errors="surrogateescape", newline="")
        except OSError as error:
            raise SourceError(f"cannot read the list {self.path!r}: {describe_error(error)}") from error

    def _make_item(
        self, number: int, fields: list[str], layout: ListLayout, identify: Identify, requests: MemberRequests
    ) -> WorkItem | None:
        """Make the item of a line; None if it is left out, or names an image in a container, which is requested."""
        # A line with too few fields becomes a row that says so.
        if len(fields) <= max(layout.image, layout.label or 0) or not fields[layout.image]:
            return make_broken_item(self.path, "the line names no image", f"line{number}")
        # Only facepipe's own lists for spreadsheets have this column.
        if "face_id" in layout.columns:
            fields = [restore_cell(field) for field in fields]
        name = _replace_separators(fields[layout.image])
        if holds_image(name):
            return make_broken_item(self.path, HOLDS_IMAGE, f"line{number}")
        if not self._selection.takes_all_files and (
            reason := self._selection.reject_file(name.removeprefix(f"{self.root}/"))
        ):
            self._passed_over.add(reason)
            return None
        label = None if layout.label is None else fields[layout.label]
        identity = identify(name, label)
        member = split_member(name)
        if member is None or self._exists_as_file(name):
            return make_named_item(name, self.root, identity, self._is_confined)
        container = make_named_item(member[0], self.root, identity, self._is_confined)
        if container.listing_error is not None:
            return container
        requests.add(container.path, member[1], identity)
        return None

    def _exists_as_file(self, name: str) -> bool:
        """Say whether a name that looks like an image in a container is a file's own."""
        path = os.fsdecode(locate_container(name)) if name.startswith("file://") else name
        return not is_remote(name) and "\0" not in path and os.path.exists(os.path.join(self.root or ".", path))


def _require_text(lines: list[str], path: str) -> None:
    """Require that the first lines of a list are text. Otherwise its bytes, such as an image's, would become names."""
    head = "".join(lines)[:_MAX_LINE]
    # Names may hold odd characters, which are not enough to refuse a list.
    has_control = len(_CONTROL.findall(head)) > max(_FEW_CONTROL, _MAX_CONTROL * len(head))
    if has_control and _NOT_IN_NAMES.search(head):
        raise SourceError(f"the list {path!r} is no text: it holds binary data")


def _replace_separators(name: str) -> str:
    """Return a name with slashes for the backslashes of a list from Windows. Beside slashes they are part of a name."""
    return name if "/" in name else name.replace("\\", "/")


def _parse_object(line: str) -> dict[str, Any] | None:
    """Parse a line of JSON; None if it is no object."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def read_lines(file: IO[str]) -> Iterator[str]:
    """Yield the file's lines. One that is too long to name an image is cut, so that it cannot fill the memory."""
    while line := file.readline(_MAX_LINE):
        yield line
        while line and len(line) == _MAX_LINE and not line.endswith(("\n", "\r")):
            line = file.readline(_MAX_LINE)


def _read_records(file: IO[str], layout: ListLayout) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, fields) of the lines that are not empty, after the ones to skip."""
    lines = read_lines(file)
    rows: Iterator[list[str]]
    match layout.delimiter:
        case None:  # a path, in which there may be spaces, and its label
            rows = (split_path(line.strip()) for line in lines)
        case "\n":
            rows = ([line.strip()] for line in lines)
        case " ":
            rows = (line.split() for line in lines)
        case delimiter:
            rows = csv.reader(lines, delimiter=delimiter, quoting=get_quoting(delimiter))
    # Lines are numbered before blank ones are dropped, so that messages name the line of the file.
    numbered = ((number, [field.strip() for field in row]) for number, row in enumerate(rows, 1))
    yield from islice(((number, row) for number, row in numbered if any(row)), layout.skip, None)
