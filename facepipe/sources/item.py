"""The work item: where one image is, and what is known of it before a byte is read."""

import os
import re
from collections.abc import Collection, Iterator
from typing import NamedTuple, Protocol
from urllib.parse import quote

from facepipe.sources.extensions import CONTAINER_PATTERN, is_foreign_url
from facepipe.sources.number_ranges import NumberRanges
from facepipe.storage import is_remote

# A path that looks like a container's member: archive.tar#name.
_MEMBER_LIKE = re.compile(rf"\.(?:{CONTAINER_PATTERN})#".encode(), re.IGNORECASE)


class WorkItem(NamedTuple):
    """One image to be embedded. The fields are the columns of `schema.WORK_ITEM` except `previous`.

    Attributes:
        uri: Name of the image in the gallery.
        path: Where its bytes are: a local path or a URL.
        offset: First byte, or first row in a Parquet file; None for the whole file.
        length: Bytes; None with an offset for one Parquet row.
        fingerprint: Changes if the file may have changed.
        identity: Label of the image.
        listing_error: Why the lister already knows that this cannot be read.
    """

    uri: str
    path: bytes
    offset: int | None = None
    length: int | None = None
    fingerprint: str | None = None
    identity: str | None = None
    listing_error: str | None = None


class FolderLabel(str):
    """The name of an image's folder, in place of a label. `LabelledSource` decides whether that is a person."""

    __slots__ = ()


class NestedFolderLabel(FolderLabel):
    """The name of an image's folder that lies in other folders.

    Attributes:
        parents: Path of the folder above it, below the source's root.
    """

    __slots__ = ("parents",)
    parents: str

    def __new__(cls, name: str, parents: str) -> "NestedFolderLabel":
        """Make a label."""
        label = super().__new__(cls, name)
        label.parents = parents
        return label

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return NestedFolderLabel, (str(self), self.parents)


class SeveralLabels(str):
    """The label of one of an image's faces, if its other faces have other labels or none."""

    __slots__ = ()


class Listing(Protocol):
    """What lists images. Iteration streams: memory does not grow with the number of items.

    Attributes:
        name: Name of the source.
    """

    name: str

    @property
    def ignored(self) -> int:
        """Number of files passed over so far because they are not images."""

    @property
    def has_labels(self) -> bool | None:
        """Whether there is a column of labels; None if labels come from elsewhere, or it is not known yet."""

    @property
    def other_folders(self) -> Collection[str]:
        """Folders right below the root, with images that patterns leave out; two at most."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on the listing for the user; complete at its end."""

    def __iter__(self) -> Iterator[WorkItem]: ...


class Source(Protocol):
    """A listing of which it is decided what a label is.

    Attributes:
        name: Name of the source.
    """

    name: str

    @property
    def ignored(self) -> int:
        """Number of files passed over so far because they are not images."""

    @property
    def gives_labels(self) -> bool:
        """Whether an image without a label has none by the source's word, as far as the listing has come."""

    @property
    def label_numbers(self) -> NumberRanges | None:
        """The labels so far that are numbers; None if the user has said how to tell them from others."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on the listing for the user; complete at its end."""

    def __iter__(self) -> Iterator[WorkItem]: ...


class WrappedSource:
    """A source that is another one, but for what a subclass changes.

    Attributes:
        name: Name of the source.
    """

    def __init__(self, source: Source):
        self._source = source
        self.name = source.name

    @property
    def ignored(self) -> int:
        """Number of files passed over so far because they are not images."""
        return self._source.ignored

    @property
    def gives_labels(self) -> bool:
        """Whether an image without a label has none by the source's word, as far as the listing has come."""
        return self._source.gives_labels

    @property
    def label_numbers(self) -> NumberRanges | None:
        """The labels so far that are numbers."""
        return self._source.label_numbers

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on the listing for the user; complete at its end."""
        return self._source.notes

    def __iter__(self) -> Iterator[WorkItem]:
        return iter(self._source)


class WatchedSource(WrappedSource):
    """A source that counts, while it is listed, the places that could not be listed.

    Attributes:
        broken_count: Number of such places so far.
        broken_place: The first of them, with the reason.
    """

    def __init__(self, source: Source):
        super().__init__(source)
        self.broken_count = 0
        self.broken_place = ""

    def __iter__(self) -> Iterator[WorkItem]:
        self.broken_count = 0
        self.broken_place = ""
        for item in self._source:
            if item.listing_error is not None:
                self.broken_count += 1
                self.broken_place = self.broken_place or f"{item.uri} ({item.listing_error})"
            yield item


def make_file_uri(path: str | bytes) -> str:
    """Make the uri of a file: its absolute path, or its URL; it is the same in every working directory.

    It is a `file://` URL with %-escapes if the path is not UTF-8, or would read like the uri of a container's member.
    """
    # Find the absolute path; URLs of object stores stay as they are.
    if isinstance(path, bytes) and _is_absolute(path):
        # The common case when folders are listed: for a million paths the rest would take seconds.
        absolute = path
    elif is_remote(path) or is_foreign_url(os.fsdecode(path)):
        return escape_name(os.fsdecode(path))
    else:
        absolute = os.path.abspath(os.fsencode(path))
    if b"#" in absolute and _MEMBER_LIKE.search(absolute):
        return "file://" + quote(absolute)
    try:
        return absolute.decode("utf-8")
    except UnicodeDecodeError:
        return "file://" + quote(absolute)


def _is_absolute(path: bytes) -> bool:
    """Tell whether a path is absolute and certainly in normal form."""
    return path.startswith(b"/") and not (path.endswith(b"/") or b"//" in path or b"/." in path)


def make_member_uri(container: str, member: str) -> str:
    """Make the uri of an image inside a container file. The member's name stays a name: `..` in it leads nowhere."""
    return f"{container}#{escape_name(member)}"


def escape_name(name: str) -> str:
    """Return a name, with %-escapes if it is not UTF-8."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return quote(os.fsencode(name))
    return name


def make_broken_item(path: str | bytes, reason: str, part: str = "") -> WorkItem:
    """Make an item for something that could not be listed, so that it becomes a row and is not lost.

    Args:
        path: the file or folder.
        reason: why it cannot be read.
        part: the line or row of the file that the item is about.
    """
    uri = f"{make_file_uri(path)}#{part}" if part else make_file_uri(path)
    return WorkItem(uri, os.fsencode(path), listing_error=reason)
