"""WebDataset tar shards: members are found by reading the headers and read later by byte offset, never unpacked."""

import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from facepipe.errors import StorageError
from facepipe.hashing import hash64
from facepipe.sources.extensions import IMAGE_EXTENSIONS, get_extension, is_hidden
from facepipe.sources.identity import Identify
from facepipe.sources.item import WorkItem, escape_name, make_broken_item, make_file_uri, make_member_uri
from facepipe.storage import get_open_fingerprint, is_special_file, open_seekable

_LABEL_EXTENSIONS = ("cls", "json")
_LABEL_KEYS = ("identity", "label", "class")
# Labels and headers above these sizes are damaged, or not meant for us.
_MAX_LABEL_BYTES = 1 << 20
_MAX_HEADER_BYTES = 1 << 20
_MAX_NAME = 4096
_MAX_SIZE = 1 << 62  # its sum with an offset fits a column
_ZEROS = bytes(1 << 16)
# Older releases of tarfile search for a number's end in quadratic time (CVE-2024-6232); no file name is that long.
_DIGITS = re.compile(rb"\d{256}")
# What tarfile raises for the numbers in a damaged header is not a short list, and changes between releases.
_UNREADABLE = (
    tarfile.TarError,
    EOFError,
    OSError,
    ValueError,
    ArithmeticError,
    LookupError,
    RecursionError,
    MemoryError,
)


@dataclass(frozen=True)
class _Container:
    """The tar file that is listed: its uri, its path, and its fingerprint."""

    uri: str
    path: bytes
    fingerprint: str


def list_tar_items(path: str, identify: Identify) -> Iterator[WorkItem]:
    """Yield the items of one tar; a header that cannot be read ends the shard with an item that says so.

    Labels come from `KEY.cls`, or from `identity`, `label` or `class` in `KEY.json`, beside `KEY.jpg` (WebDataset).
    A member's name that occurs twice gets `@offset` after it: both are images, and neither hides the other. Names are
    only names: nothing is written, and no link is followed, so that `../x.jpg` is an image like any other.

    Args:
        path: local path or URL of the tar.
        identify: makes an identity from a member's name and its label.
    """
    try:
        if is_special_file(path):
            raise StorageError("not a regular file")
        with open_seekable(path) as file, _open_tar(file) as tar:
            # The fingerprint of the file that is open: another one may have its name before it is read.
            container = _Container(make_file_uri(path), os.fsencode(path), get_open_fingerprint(file))
            yield from _list_members(tar, file, container, identify)
    except StorageError as error:
        yield make_broken_item(path, str(error))
    except _UNREADABLE as error:
        yield make_broken_item(path, f"tar cannot be read to its end: {_get_reason(error)}")


class _HeaderFile:
    """The file as tarfile sees it: only headers can be read, and none of a length that only a damaged one has."""

    def __init__(self, file: BinaryIO):
        self.tell = file.tell
        self.seek = file.seek
        self._file = file

    def read(self, size: int = -1) -> bytes:
        """Read a header. Raises ReadError for one that is too long, or would take tarfile too long."""
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        data = bytes(self._file.read(size))
        if size > tarfile.BLOCKSIZE and _DIGITS.search(data):
            raise tarfile.ReadError("a header of digits")
        return data


def _open_tar(file: BinaryIO) -> tarfile.TarFile:
    headers: Any = _HeaderFile(file)
    return tarfile.open(fileobj=headers, mode="r:", errors="surrogateescape")


def _get_reason(error: BaseException) -> str:
    return f"{str(error)[:200] or type(error).__name__}".encode("utf-8", "replace").decode("utf-8")


def _list_members(
    tar: tarfile.TarFile, file: BinaryIO, container: _Container, identify: Identify
) -> Iterator[WorkItem]:
    """Yield the items of all members. Images wait for the label of their key, which may come after them."""
    # Hashes of names take less memory than the names of a shard of millions.
    seen_names: set[int] = set()
    key = ""
    label: str | None = None
    waiting: list[tuple[str, WorkItem]] = []
    end = 0
    while True:
        # Read the next header. What waits is listed before the shard ends, also if it is damaged here.
        try:
            member = tar.next()
            if member is not None:
                end = _check_member(tar, member, end)
        except _UNREADABLE:
            yield from _label_items(waiting, label, identify)
            raise
        if member is None:
            yield from _label_items(waiting, label, identify)
            _check_end(tar, file)
            return
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has read
        # Members without bytes of their own become rows that say so.
        extension = get_extension(member.name)
        if member.islnk() and extension in IMAGE_EXTENSIONS:
            target = escape_name(member.linkname[:_MAX_NAME])
            yield _make_broken_member(container, member, f"a hard link to the member {target}")
        if not member.isfile():
            continue
        if extension in IMAGE_EXTENSIONS and (member.issparse() or len(member.name) > _MAX_NAME):
            reason = "a sparse member" if member.issparse() else f"a name of more than {_MAX_NAME} characters"
            yield _make_broken_member(container, member, reason)
            continue
        # A new key: the images of the last one have all the label they will get.
        stem = member.name[: len(member.name) - len(extension) - 1]
        if stem != key:
            yield from _label_items(waiting, label, identify)
            key = stem
            label = None
            waiting = []
        if extension in _LABEL_EXTENSIONS:
            label = _read_label(file, member, extension) or label
        elif extension in IMAGE_EXTENSIONS and not is_hidden(member.name):
            # Escaped before it is looked up: one name may read like the escapes of another.
            name = escape_name(member.name)
            if not _add_name(seen_names, name):
                name = f"{name}@{member.offset_data}"
            item = WorkItem(
                uri=make_member_uri(container.uri, name),
                path=container.path,
                offset=member.offset_data,
                length=member.size,
                fingerprint=f"{container.fingerprint}@{member.offset_data}",
            )
            waiting.append((member.name, item))


def _check_member(tar: tarfile.TarFile, member: tarfile.TarInfo, end: int) -> int:
    """Return where the next header is. Raises ReadError for an impossible size.

    A negative size, for one, would lead in circles.
    """
    # Members must come one after another, so each begins at the end of the last one or later.
    if not 0 <= member.size < _MAX_SIZE or tar.offset <= member.offset or member.offset < end:
        raise tarfile.ReadError(f"the member at byte {member.offset} cannot be {member.size} bytes long")
    return tar.offset


def _make_broken_member(container: _Container, member: tarfile.TarInfo, reason: str) -> WorkItem:
    """Make an item for a member that holds no bytes of its own to read."""
    uri = make_member_uri(container.uri, f"{member.name[:_MAX_NAME]}@{member.offset}")
    return WorkItem(uri, container.path, listing_error=reason)


def _check_end(tar: tarfile.TarFile, file: BinaryIO) -> None:
    """Raise ReadError unless the archive really ends here, with a block of zeros and nothing after it.

    tarfile takes a damaged header for the end of the archive.
    """
    file.seek(tar.offset)
    block = file.read(512)
    if len(block) < 512 or any(block):
        raise tarfile.ReadError(f"bad header at byte {tar.offset}")
    while rest := file.read(len(_ZEROS)):
        if rest != _ZEROS[: len(rest)]:
            raise tarfile.ReadError(f"more data behind the archive's end at byte {tar.offset}")


def _add_name(seen_names: set[int], name: str) -> bool:
    """Add a name's hash to those that were seen; tell whether it is new."""
    name_hash = hash64(name)
    is_new = name_hash not in seen_names
    seen_names.add(name_hash)
    return is_new


def _label_items(items: list[tuple[str, WorkItem]], label: str | None, identify: Identify) -> Iterator[WorkItem]:
    for name, item in items:
        yield item._replace(identity=identify(name, label))


def _read_label(file: BinaryIO, member: tarfile.TarInfo, extension: str) -> str | None:
    """Read the label in a .cls or .json member; None if there is none."""
    if member.size > _MAX_LABEL_BYTES:
        return None
    # Labels lie between headers: go back to the place from which the next header is read.
    position = file.tell()
    file.seek(member.offset_data)
    text = bytes(file.read(member.size)).decode("utf-8", "replace").strip()
    file.seek(position)
    if extension == "cls":
        return text or None
    try:
        fields: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    return next((str(fields[key]) for key in _LABEL_KEYS if fields.get(key) is not None), None)
