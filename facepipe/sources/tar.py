"""WebDataset tar shards: members are found by walking the headers and read later by byte offset, never unpacked."""

import json
import os
import re
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from facepipe.errors import StorageError
from facepipe.hashing import hash64
from facepipe.sources.extensions import IMAGE_EXTENSIONS, get_extension, is_hidden
from facepipe.sources.identity import Identify
from facepipe.sources.item import WorkItem, escape_name, make_broken_item, make_file_uri, make_member_uri
from facepipe.storage import get_entry, is_special_file, open_seekable

_LABEL_EXTENSIONS = ("cls", "json")
_LABEL_KEYS = ("identity", "label", "class")
_MAX_LABEL_BYTES = 1 << 20
_MAX_HEADER_BYTES = 1 << 20
_MAX_NAME = 4096
_MAX_SIZE = 1 << 62  # its sum with an offset fits a column
_ZEROS = bytes(1 << 16)
# What tarfile and the numbers in a damaged header make of each other is no short list, and changes between releases.
_UNREADABLE = (
    *(tarfile.TarError, EOFError, OSError, ValueError, ArithmeticError, LookupError),
    *(RecursionError, MemoryError),
)


def list_tar_items(path: str, identify: Identify) -> Iterator[WorkItem]:
    """Items of one tar; a header that cannot be read ends the shard with an item that says so.

    Labels come from `KEY.cls` or from `identity`, `label` or `class` in `KEY.json` beside `KEY.jpg` (WebDataset).
    A member's name that occurs twice gets `@offset` behind it: both are images, and neither hides the other. Names are
    only names: nothing is written, and no link is followed, so that `../x.jpg` is an image like any other.
    """
    try:
        shard = get_entry(path)
        if is_special_file(path):
            raise StorageError("not a regular file")
        with open_seekable(path) as file, _open(file) as tar:
            yield from _members(tar, file, make_file_uri(path), os.fsencode(path), shard.fingerprint, identify)
    except StorageError as error:
        yield make_broken_item(path, str(error))
    except _UNREADABLE as error:
        yield make_broken_item(path, f"tar cannot be read to its end: {_reason(error)}")


class _Headers:
    """The file as tarfile sees it: it reads nothing but headers, and none of a length that only a damaged one has."""

    def __init__(self, file: BinaryIO):
        self.tell, self.seek, self._file = file.tell, file.seek, file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        data = bytes(self._file.read(size))
        if size > tarfile.BLOCKSIZE and _DIGITS.search(data):
            raise tarfile.ReadError("a header of digits")
        return data


# Older releases of tarfile search for a number's end in quadratic time (CVE-2024-6232); no file name is that long.
_DIGITS = re.compile(rb"\d{256}")


def _open(file: BinaryIO) -> tarfile.TarFile:
    headers: Any = _Headers(file)
    return tarfile.open(fileobj=headers, mode="r:", errors="surrogateescape")


def _reason(error: BaseException) -> str:
    return f"{str(error)[:200] or type(error).__name__}".encode("utf-8", "replace").decode("utf-8")


def _members(
    tar: tarfile.TarFile,
    file: BinaryIO,
    container: str,
    path: bytes,
    fingerprint: str,
    identify: Identify,
) -> Iterator[WorkItem]:
    seen: set[int] = set()
    key, label, waiting = "", None, list[tuple[str, WorkItem]]()
    end = 0
    while True:
        try:
            member = tar.next()
            if member is not None:
                end = _checked(tar, member, end)
        except _UNREADABLE:
            yield from _labelled(waiting, label, identify)
            raise
        if member is None:
            yield from _labelled(waiting, label, identify)
            _check_end(tar, file)
            return
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has read
        if member.islnk() and get_extension(member.name) in IMAGE_EXTENSIONS:
            yield _fault(
                container, path, member, f"a hard link to the member {escape_name(member.linkname[:_MAX_NAME])}"
            )
        if not member.isfile():
            continue
        kind = get_extension(member.name)
        if kind in IMAGE_EXTENSIONS and (member.issparse() or len(member.name) > _MAX_NAME):
            long = f"a name of more than {_MAX_NAME} characters"
            yield _fault(container, path, member, "a sparse member" if member.issparse() else long)
            continue
        stem = member.name[: len(member.name) - len(kind) - 1]
        if stem != key:
            yield from _labelled(waiting, label, identify)
            key, label, waiting = stem, None, []
        if kind in _LABEL_EXTENSIONS:
            label = _read_label(file, member, kind) or label
        elif kind in IMAGE_EXTENSIONS and not is_hidden(member.name):
            name = escape_name(member.name)  # before it is looked up: one name may read like the escapes of another
            name = name if _first(seen, name) else f"{name}@{member.offset_data}"
            mark = f"{fingerprint}@{member.offset_data}"
            item = WorkItem(make_member_uri(container, name), path, member.offset_data, member.size, mark)
            waiting.append((member.name, item))


def _checked(tar: tarfile.TarFile, member: tarfile.TarInfo, end: int) -> int:
    """Where the next header is; an error where a size is nonsense, such as a negative one, which leads in circles."""
    if not 0 <= member.size < _MAX_SIZE or tar.offset <= member.offset or member.offset < end:
        raise tarfile.ReadError(f"the member at byte {member.offset} cannot be {member.size} bytes long")
    return tar.offset


def _fault(container: str, path: bytes, member: tarfile.TarInfo, reason: str) -> WorkItem:
    """An item for a member that holds no bytes of its own to read."""
    place = make_member_uri(container, f"{member.name[:_MAX_NAME]}@{member.offset}")
    return WorkItem(place, path, listing_error=reason)


def _check_end(tar: tarfile.TarFile, file: BinaryIO) -> None:
    """tarfile takes a damaged header for the end of the archive; the real end is a block of zeros and nothing after."""
    file.seek(tar.offset)
    block = file.read(512)
    if len(block) < 512 or any(block):
        raise tarfile.ReadError(f"bad header at byte {tar.offset}")
    while rest := file.read(len(_ZEROS)):
        if rest != _ZEROS[: len(rest)]:
            raise tarfile.ReadError(f"more data behind the archive's end at byte {tar.offset}")


def _first(seen: set[int], name: str) -> bool:
    mark = hash64(name)
    new = mark not in seen
    seen.add(mark)
    return new


def _labelled(items: list[tuple[str, WorkItem]], label: str | None, identify: Identify) -> Iterator[WorkItem]:
    for name, item in items:
        yield item._replace(identity=identify(name, label))


def _read_label(file: BinaryIO, member: tarfile.TarInfo, kind: str) -> str | None:
    if member.size > _MAX_LABEL_BYTES:
        return None
    here = file.tell()
    file.seek(member.offset_data)
    text = bytes(file.read(member.size)).decode("utf-8", "replace").strip()
    file.seek(here)
    if kind == "cls":
        return text or None
    try:
        fields: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    found = [fields[key] for key in _LABEL_KEYS if isinstance(fields, dict) and fields.get(key) is not None]
    return str(found[0]) if found else None
