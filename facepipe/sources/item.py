"""The work item: where one image is and what is known of it before a byte is read."""

import os
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


def file_uri(path: str | bytes) -> str:
    """The uri of a file: its absolute path or URL; a `file://` URL with %-escapes where the path is not UTF-8."""
    if is_remote(path):
        return os.fsdecode(path)
    absolute = os.path.abspath(os.fsencode(path))
    try:
        return absolute.decode("utf-8")
    except UnicodeDecodeError:
        return "file://" + quote(absolute)


def member_uri(container: str, member: str) -> str:
    """The uri of an image inside a container file."""
    try:
        member.encode("utf-8")
    except UnicodeEncodeError:
        member = quote(os.fsencode(member))
    return f"{container}#{member}"


def broken(path: str | bytes, reason: str) -> WorkItem:
    """An item that stands for something that could not be listed, so that it becomes a row and is not lost."""
    return WorkItem(file_uri(path), os.fsencode(path), listing_error=reason)
