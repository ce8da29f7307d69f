"""The work item: where one image is and what is known of it before a byte is read."""

import os
import re
from collections.abc import Iterator
from typing import NamedTuple, Protocol
from urllib.parse import quote

from facepipe.storage import is_remote


class WorkItem(NamedTuple):
    """One image to be embedded; field for field the columns of `schema.WORK_ITEM` but `previous`."""

    uri: str
    path: bytes
    offset: int | None = None
    length: int | None = None
    fingerprint: str | None = None
    identity: str | None = None
    listing_error: str | None = None


class Source(Protocol):
    """Anything that lists images. Iteration streams: memory does not grow with the number of items."""

    name: str

    @property
    def ignored(self) -> int:
        """Files passed over so far because they are no images."""

    def __iter__(self) -> Iterator[WorkItem]: ...


_LIKE_A_MEMBER = re.compile(rb"\.(?:tar|parquet|pq)#", re.IGNORECASE)


def make_file_uri(path: str | bytes) -> str:
    """The uri of a file: its absolute path or URL; a `file://` URL with %-escapes where the path is not UTF-8, or where
    it would read like the uri of a container's member.
    """
    if isinstance(path, bytes) and _absolute(path):
        absolute = path  # as folders are listed: said of a million paths, the rest costs seconds
    elif is_remote(path):
        return escape_name(os.fsdecode(path))
    else:
        absolute = os.path.abspath(os.fsencode(path))
    if b"#" in absolute and _LIKE_A_MEMBER.search(absolute):
        return "file://" + quote(absolute)
    try:
        return absolute.decode("utf-8")
    except UnicodeDecodeError:
        return "file://" + quote(absolute)


def _absolute(path: bytes) -> bool:
    """Whether it is an absolute path already, with nothing in it to be normalised."""
    return path.startswith(b"/") and not (path.endswith(b"/") or b"//" in path or b"/." in path)


def make_member_uri(container: str, member: str) -> str:
    """The uri of an image inside a container file. The member's name stays a name: `..` in it leads nowhere."""
    return f"{container}#{escape_name(member)}"


def escape_name(name: str) -> str:
    """The name, with %-escapes where it is not UTF-8."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return quote(os.fsencode(name))
    return name


class WatchedSource:
    """A source that counts, while it is listed, the places that could not be listed."""

    def __init__(self, source: Source):
        self._source, self.name = source, source.name
        self.broken_count = 0

    @property
    def ignored(self) -> int:
        return self._source.ignored

    def __iter__(self) -> Iterator[WorkItem]:
        self.broken_count = 0
        for item in self._source:
            self.broken_count += item.listing_error is not None
            yield item


def make_broken_item(path: str | bytes, reason: str, part: str = "") -> WorkItem:
    """An item that stands for something that could not be listed, so that it becomes a row and is not lost.

    part: the line or row of the file at `path` that it is about
    """
    uri = f"{make_file_uri(path)}#{part}" if part else make_file_uri(path)
    return WorkItem(uri, os.fsencode(path), listing_error=reason)
