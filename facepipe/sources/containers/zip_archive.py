"""Zip archives: members are found by the central directory at the end, and read later by their place."""

import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

from facepipe.errors import StorageError
from facepipe.sources.archive_reader import ArchiveReader
from facepipe.sources.extensions import IMAGE_EXTENSIONS, get_extension, is_hidden
from facepipe.sources.item import WorkItem, make_broken_item, make_file_uri, make_member_uri
from facepipe.sources.selection import NESTED_ARCHIVE, OTHER, is_archive
from facepipe.storage import TooLargeError, get_open_fingerprint, is_special_file, open_seekable

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_LOCAL_MAGIC = b"PK\x03\x04"
_STORED = 0
_DEFLATED = 8
_ENCRYPTED = 0x1
_HAS_DESCRIPTOR = 0x8  # the sizes stand behind the data
_DESCRIPTOR_MAGIC = b"PK\x07\x08"
_MAX_NAME = 4096
_MAX_EXTRA = 65_535
# What zipfile raises for damaged archives.
_UNREADABLE = (
    zipfile.BadZipFile,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    MemoryError,
)


class ZipReader(ArchiveReader):
    """Lists the images of zip archives. Names are only names: nothing is written, and no link is followed."""

    def list_items(self, path: str, relative: str = "") -> Iterator[WorkItem]:
        """Yield the items of one archive; what cannot be read becomes an item that says so.

        Args:
            path: local path or URL of the archive.
            relative: its path below the source's root, for patterns.
        """
        try:
            if is_special_file(path):
                raise StorageError("not a regular file")
            with open_seekable(path) as file:
                fingerprint = get_open_fingerprint(file)
                with zipfile.ZipFile(file) as archive:
                    yield from self._list_members(archive, path, relative, fingerprint)
        except StorageError as error:
            yield make_broken_item(path, str(error))
        except _UNREADABLE as error:
            yield make_broken_item(path, f"zip cannot be read: {str(error)[:200] or type(error).__name__}")

    def _list_members(self, archive: zipfile.ZipFile, path: str, relative: str, fingerprint: str) -> Iterator[WorkItem]:
        container = make_file_uri(path)
        encoded = os.fsencode(path)
        members = sorted(archive.infolist(), key=lambda member: member.header_offset)
        ends = [member.header_offset for member in members[1:]] + [archive.start_dir]
        names: set[str] = set()
        for member, end in zip(members, ends, strict=True):
            if not self._takes(member, relative):
                continue
            name = member.filename
            if name in names or len(name) > _MAX_NAME:
                name = f"{name[:_MAX_NAME]}@{member.header_offset}"
            names.add(name)
            uri = make_member_uri(container, name)
            # Up to the next member: how long the member's own header is stands in itself.
            longest = _LOCAL_HEADER.size + 2 * _MAX_EXTRA + member.compress_size + 24
            length = min(end - member.header_offset, longest)
            reason = _find_fault(member, length)
            if reason is not None:
                yield WorkItem(uri, encoded, listing_error=reason)
                continue
            yield WorkItem(
                uri=uri,
                path=encoded,
                offset=member.header_offset,
                length=length,
                fingerprint=f"{fingerprint}@{member.header_offset}",
                identity=self._identify(member.filename, None),
            )

    def _takes(self, member: zipfile.ZipInfo, relative: str) -> bool:
        """Say whether a member is listed, and count it if not."""
        name = member.filename
        if member.is_dir():
            return False
        extension = get_extension(name)
        if extension not in IMAGE_EXTENSIONS or is_hidden(name):
            is_nested = is_archive(name)
            self._passed_over.add(NESTED_ARCHIVE if is_nested else OTHER, name if is_nested else "")
            return False
        rejection = self._selection.reject_folders(name)
        if rejection is None and not self._selection.takes_all_files:
            rejection = self._selection.reject_file(name, relative)
        if rejection is not None:
            self._passed_over.add(rejection)
        return rejection is None


def _find_fault(member: zipfile.ZipInfo, length: int) -> str | None:
    """Find why a member cannot be read, from what the central directory says of it; None if it can."""
    if member.flag_bits & _ENCRYPTED:
        return "encrypted with a password"
    if member.compress_type not in (_STORED, _DEFLATED):
        return f"compressed by method {member.compress_type}: only stored and deflated members are read"
    if member.header_offset < 0 or length < _LOCAL_HEADER.size + member.compress_size:
        return "its place overlaps another member's"
    return None


def unpack_zip_member(data: bytes, max_bytes: int) -> bytes:
    """Get a file out of the bytes of a member, which begin with its own header.

    Args:
        data: header, data, and perhaps what follows.
        max_bytes: largest file.

    Raises:
        TooLargeError: it is larger. No more than that is unpacked.
        StorageError: it is damaged.
    """
    if len(data) < _LOCAL_HEADER.size or not data.startswith(_LOCAL_MAGIC):
        raise StorageError("no member of a zip begins there")
    fields = _LOCAL_HEADER.unpack_from(data)
    flags = fields[2]
    method = fields[3]
    checksum = fields[6]
    size = fields[7]
    begin = _LOCAL_HEADER.size + fields[9] + fields[10]
    body = data[begin:]
    has_descriptor = bool(flags & _HAS_DESCRIPTOR)
    if method == _STORED:
        content = _strip_descriptor(body) if has_descriptor else body[:size]
        if not has_descriptor and len(content) < size:
            raise StorageError(f"truncated: {len(content)} of {size} bytes")
        if len(content) > max_bytes:
            raise TooLargeError(f"{len(content)} bytes, the limit is {max_bytes}")
    elif method == _DEFLATED:
        content = _inflate(body, max_bytes)
    else:
        raise StorageError(f"compressed by method {method}")
    if not has_descriptor and zlib.crc32(content) != checksum:
        raise StorageError("damaged: its checksum is wrong")
    return content


def _inflate(body: bytes, max_bytes: int) -> bytes:
    inflater: Any = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = bytes(inflater.decompress(body, max_bytes + 1))
    except zlib.error as error:
        raise StorageError(f"damaged: {error}") from error
    if len(content) > max_bytes:
        raise TooLargeError(f"more than {max_bytes} bytes unpacked, which is the limit")
    if not inflater.eof:
        raise StorageError("truncated: its compressed data do not end")
    return content


def _strip_descriptor(body: bytes) -> bytes:
    """Strip the descriptor behind the data of a stored member: the last that names the length before it."""
    for match in reversed(list(re.finditer(re.escape(_DESCRIPTOR_MAGIC), body[-64:]))):
        at = max(0, len(body) - 64) + match.start()
        size = int.from_bytes(body[at + 8 : at + 12], "little")
        if size == at & 0xFFFFFFFF:
            return body[:at]
    return body
