"""LMDB databases of images, `data.mdb`: keys are names, values are encoded images.

The file is read by its published layout (lmdb.h and mdb.c of OpenLDAP): two meta pages, and a B+ tree of branch and
leaf pages; a large value lies in pages of its own. So each image has a place in the file, and no library and no lock is
needed. Values that are pickles are not read.
"""

import os
import struct
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from typing import BinaryIO, NamedTuple

from facepipe.errors import StorageError
from facepipe.sources.archive_reader import ArchiveReader
from facepipe.sources.extensions import is_hidden
from facepipe.sources.item import WorkItem, escape_name, make_broken_item, make_file_uri, make_member_uri
from facepipe.sources.selection import OTHER
from facepipe.storage import get_open_fingerprint, is_special_file, open_seekable

LOCK_FILE = "lock.mdb"
"""What lies beside `data.mdb`, and holds no data."""

_PAGE_HEADER = struct.Struct("<QHHHH")  # number, padding, flags, lower, upper
_META = struct.Struct("<IIQQ")  # magic, version, address, size of the map
_TREE = struct.Struct("<IHHQQQQQ")  # page size or padding, flags, depth, pages of three kinds, entries, root
_NODE = struct.Struct("<HHHH")  # low and high half of a size or a page, flags, length of the key
_MAGIC = 0xBEEFC0DE
_VERSIONS = (1, 999)
_BRANCH = 0x01
_LEAF = 0x02
_OVERFLOW = 0x04
_BIG_DATA = 0x01
_NOT_PLAIN = 0x06  # nodes that are databases or lists of values
_NO_PAGE = 0xFFFFFFFFFFFFFFFF
_MAX_DEPTH = 32
_PAGE_SIZES = frozenset(1 << n for n in range(8, 17))
_SNIFFED = 16
_MAX_LABEL = 4096
_IMAGE_STARTS = (
    b"\xff\xd8\xff",
    b"\x89PNG",
    b"RIFF",
    b"GIF8",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"\0\0\0\x0cjP  ",
    b"\xffO\xffQ",
)
_PICKLE = b"\x80"


class Value(NamedTuple):
    """A key, and where its value is.

    Attributes:
        key: The key.
        offset: First byte of the value.
        length: Number of its bytes.
    """

    key: bytes
    offset: int
    length: int


class LmdbFile:
    """The main database of an LMDB file."""

    def __init__(self, file: BinaryIO):
        """Read which pages hold the newest state.

        Args:
            file: the open `data.mdb`.

        Raises:
            StorageError: It is no LMDB file.
        """
        self._file = file
        self._size = file.seek(0, os.SEEK_END)
        first = self._read_meta(0)
        self._page_size = first[1]
        # The second page describes the state before or after that of the first.
        states = [first]
        with suppress(StorageError):  # a commit may have been cut off
            states.append(self._read_meta(self._page_size))
        _, _, self._root, self.entries = max(states)

    def _read_meta(self, offset: int) -> tuple[int, int, int, int]:
        """Read a meta page: number of its transaction, page size, root, entries."""
        start = offset + _PAGE_HEADER.size
        data = self._read(start, _META.size + 2 * _TREE.size + 16)
        magic, version, _, _ = _META.unpack_from(data)
        if magic != _MAGIC or version not in _VERSIONS:
            raise StorageError("not an LMDB file")
        page_size = _TREE.unpack_from(data, _META.size)[0]
        if page_size not in _PAGE_SIZES:
            raise StorageError(f"not an LMDB file: its pages would have {page_size} bytes")
        main = _TREE.unpack_from(data, _META.size + _TREE.size)
        transaction = struct.unpack_from("<Q", data, _META.size + 2 * _TREE.size + 8)[0]
        return transaction, page_size, main[7], main[6]

    def __iter__(self) -> Iterator[Value]:
        """Yield all values in the order of their keys. Raises StorageError for a damaged page."""
        if self._root == _NO_PAGE:
            return
        # Pages that wait, the next one last, with their depth.
        waiting = [(self._root, 0)]
        seen: set[int] = set()
        while waiting:
            number, depth = waiting.pop()
            if number in seen or depth > _MAX_DEPTH:
                raise StorageError(f"damaged: page {number} comes twice")
            seen.add(number)
            page, kind = self._read_page(number)
            nodes = self._list_nodes(page, number)
            if kind == _BRANCH:
                waiting += [(_get_child(page, at), depth + 1) for at in reversed(nodes)]
            else:
                for at in nodes:
                    value = self._locate_value(page, number, at)
                    if value is not None:
                        yield value

    def find(self, key: bytes) -> Value | None:
        """Find the value of a key; None if there is none."""
        number = self._root
        for _ in range(_MAX_DEPTH):
            if number == _NO_PAGE:
                return None
            page, kind = self._read_page(number)
            nodes = self._list_nodes(page, number)
            if not nodes:
                return None
            keys = [_get_key(page, at) for at in nodes]
            if kind == _LEAF:
                at = bisect_right(keys, key) - 1
                return self._locate_value(page, number, nodes[at]) if at >= 0 and keys[at] == key else None
            # The first key of a branch stands for all that are smaller than the second.
            number = _get_child(page, nodes[bisect_right(keys, key, 1) - 1])
        raise StorageError("damaged: its tree has no end")

    def read_start(self, value: Value, most: int) -> bytes:
        """Read the first bytes of a value."""
        return self._read(value.offset, min(value.length, most))

    def _read_page(self, number: int) -> tuple[bytes, int]:
        page = self._read(number * self._page_size, self._page_size)
        found, _, flags, _, _ = _PAGE_HEADER.unpack_from(page)
        kind = flags & (_BRANCH | _LEAF)
        if found != number or kind not in (_BRANCH, _LEAF) or flags & _OVERFLOW:
            raise StorageError(f"damaged: page {number} is no page of the tree")
        return page, kind

    def _list_nodes(self, page: bytes, number: int) -> list[int]:
        """List where the nodes of a page begin."""
        lower = _PAGE_HEADER.unpack_from(page)[3]
        count = (lower - _PAGE_HEADER.size) // 2
        if not 0 <= count <= (len(page) - _PAGE_HEADER.size) // 2:
            raise StorageError(f"damaged: page {number} has {count} entries")
        nodes = list(struct.unpack_from(f"<{count}H", page, _PAGE_HEADER.size))
        if any(at + _NODE.size > len(page) or at < _PAGE_HEADER.size for at in nodes):
            raise StorageError(f"damaged: an entry of page {number} lies outside of it")
        return nodes

    def _locate_value(self, page: bytes, number: int, at: int) -> Value | None:
        """Locate the value of a leaf's node; None if it is another database."""
        low, high, flags, key_length = _NODE.unpack_from(page, at)
        if flags & _NOT_PLAIN:
            return None
        length = low | high << 16
        begin = at + _NODE.size + key_length
        if flags & _BIG_DATA:
            if begin + 8 > len(page):
                raise StorageError(f"damaged: an entry of page {number} lies outside of it")
            offset = struct.unpack_from("<Q", page, begin)[0] * self._page_size + _PAGE_HEADER.size
        else:
            offset = number * self._page_size + begin
        if offset + length > self._size:
            raise StorageError(f"truncated: a value of page {number} ends behind the file")
        return Value(_get_key(page, at), offset, length)

    def _read(self, offset: int, length: int) -> bytes:
        if offset + length > self._size:
            raise StorageError(f"truncated: {self._size} bytes, {offset + length} are needed")
        self._file.seek(offset)
        return bytes(self._file.read(length))


def _get_key(page: bytes, at: int) -> bytes:
    length = _NODE.unpack_from(page, at)[3]
    return page[at + _NODE.size : at + _NODE.size + length]


def _get_child(page: bytes, at: int) -> int:
    low, high, top, _ = _NODE.unpack_from(page, at)
    return int(low | high << 16 | top << 32)


class LmdbReader(ArchiveReader):
    """Lists the images of LMDB files. The label of `image-7` may be the value of `label-7`."""

    def list_items(self, path: str, relative: str = "") -> Iterator[WorkItem]:
        """Yield the items of one file; what cannot be read becomes an item that says so.

        Args:
            path: local path or URL of the file.
            relative: its path below the source's root, for patterns.
        """
        try:
            if is_special_file(path):
                raise StorageError("not a regular file")
            with open_seekable(path) as file:
                fingerprint = get_open_fingerprint(file)
                yield from self._list_values(LmdbFile(file), path, relative, fingerprint)
        except (StorageError, OSError, struct.error) as error:
            yield make_broken_item(path, str(error))

    def _list_values(self, database: LmdbFile, path: str, relative: str, fingerprint: str) -> Iterator[WorkItem]:
        container = make_file_uri(path)
        encoded = os.fsencode(path)
        for value in database:
            name = escape_name(os.fsdecode(value.key))
            start = database.read_start(value, _SNIFFED)
            uri = make_member_uri(container, name)
            if start.startswith(_PICKLE) and not name.startswith("__"):
                yield WorkItem(uri, encoded, listing_error="a pickle, which could run a program: it is not read")
                continue
            if not _is_image(start) or is_hidden(name):
                self._passed_over.add(OTHER)
                continue
            rejection = self._selection.reject_folders(name)
            if rejection is None and not self._selection.takes_all_files:
                rejection = self._selection.reject_file(name, relative)
            if rejection is not None:
                self._passed_over.add(rejection)
                continue
            yield WorkItem(
                uri=uri,
                path=encoded,
                offset=value.offset,
                length=value.length,
                fingerprint=f"{fingerprint}@{value.offset}",
                identity=self._identify(name, _find_label(database, value.key)),
            )


def _is_image(start: bytes) -> bool:
    is_boxed = start[4:8] == b"ftyp"  # AVIF and HEIC
    return is_boxed or start.startswith(_IMAGE_STARTS)


def _find_label(database: LmdbFile, key: bytes) -> str | None:
    if not key.startswith(b"image-"):
        return None
    value = database.find(b"label-" + key.removeprefix(b"image-"))
    if value is None or value.length > _MAX_LABEL:
        return None
    return database.read_start(value, _MAX_LABEL).decode("utf-8", "surrogateescape")
