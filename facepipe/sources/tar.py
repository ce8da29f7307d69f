"""WebDataset tar shards: members are found by reading the headers and read later by byte offset, never unpacked.

Of a `.tar.gz` the offsets are those in what it unpacks to.
"""

import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from facepipe.errors import StorageError
from facepipe.hashing import hash64
from facepipe.sources.archive_reader import ArchiveReader
from facepipe.sources.containers.gzip_stream import is_packed_tar, open_packed_tar
from facepipe.sources.extensions import IMAGE_EXTENSIONS, get_extension, is_hidden
from facepipe.sources.identity import Identify
from facepipe.sources.item import WorkItem, escape_name, make_broken_item, make_file_uri, make_member_uri
from facepipe.sources.labels import LABEL_COLUMNS, format_label
from facepipe.sources.selection import NESTED_ARCHIVE, OTHER, PassedOver, Selection, is_archive
from facepipe.storage import get_open_fingerprint, is_special_file, open_seekable

# In the order in which they count.
_LABEL_EXTENSIONS = ("cls", "json")
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
    """The tar file that is listed: its uri, its path, its fingerprint, and its path below the source's root."""

    uri: str
    path: bytes
    fingerprint: str
    relative: str


class TarReader(ArchiveReader):
    """Lists the items of tar files.

    Labels come from `KEY.cls`, or from a field of `KEY.json`, beside `KEY.jpg`. As in WebDataset, the key of a member
    is its path up to the first dot of the base name, so that `a.seg.png` and `a.jpg` share the label `a.cls`. A `.cls`
    counts before a `.json`. A member's name that occurs twice gets `@offset` after it: both are images, and neither
    hides the other. Names are only names: nothing is written, and no link is followed, so that `../x.jpg` is an image
    like any other. Members that are neither are counted, tars in tars among them.
    """

    def __init__(
        self,
        identify: Identify,
        label_column: str | None = None,
        selection: Selection | None = None,
        passed_over: PassedOver | None = None,
    ):
        """Make a reader.

        Args:
            identify: makes an identity from a member's name and its label.
            label_column: field of a `.json` that holds the label; by default the first known one.
            selection: which members are listed; by default all but those in folders of systems.
            passed_over: counts the members that are not listed.
        """
        super().__init__(identify, selection, passed_over)
        self._fields = LABEL_COLUMNS if label_column is None else (label_column,)

    def list_items(self, path: str, relative: str = "") -> Iterator[WorkItem]:
        """Yield the items of one tar; a header that cannot be read ends the shard with an item that says so.

        Args:
            path: local path or URL of the tar.
            relative: its path below the source's root, for patterns.
        """
        try:
            if is_special_file(path):
                raise StorageError("not a regular file")
            # The fingerprint of the file that is open: another one may have its name before it is read.
            if is_packed_tar(path):
                opened, fingerprint = open_packed_tar(path)
            else:
                opened = open_seekable(path, is_sequential=True)
                fingerprint = get_open_fingerprint(opened)
            with opened as file, _open_tar(file) as tar:
                container = _Container(make_file_uri(path), os.fsencode(path), fingerprint, relative)
                yield from self._list_members(tar, file, container)
        except StorageError as error:
            yield make_broken_item(path, str(error))
        except _UNREADABLE as error:
            yield make_broken_item(path, f"tar cannot be read to its end: {_get_reason(error)}")

    def _list_members(self, tar: tarfile.TarFile, file: BinaryIO, container: _Container) -> Iterator[WorkItem]:
        """Yield the items of all members. Images wait for the label of their key, which may come after them."""
        # Hashes of names take less memory than the names of a shard of millions.
        seen_names: set[int] = set()
        sample = _Sample("")
        end = 0
        while True:
            # Read the next header. What waits is listed before the shard ends, also if it is damaged here.
            try:
                member = tar.next()
                if member is not None:
                    end = _check_member(tar, member, end)
            except _UNREADABLE:
                yield from self._label_images(sample)
                raise
            if member is None:
                yield from self._label_images(sample)
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
            key = split_key(member.name)
            if key != sample.key:
                yield from self._label_images(sample)
                sample = _Sample(key)
            if extension in _LABEL_EXTENSIONS:
                sample.labels[extension] = self._read_label(file, member, extension)
            elif extension not in IMAGE_EXTENSIONS or is_hidden(member.name):
                is_nested = is_archive(member.name)
                self._passed_over.add(NESTED_ARCHIVE if is_nested else OTHER, member.name if is_nested else "")
            elif rejection := self._reject_member(member.name, container):
                self._passed_over.add(rejection)
            else:
                sample.images.append((member.name, _make_item(container, member, seen_names)))

    def _reject_member(self, name: str, container: _Container) -> str | None:
        rejection = self._selection.reject_folders(name)
        if rejection is not None or self._selection.takes_all_files:
            return rejection
        return self._selection.reject_file(name, container.relative)

    def _label_images(self, sample: "_Sample") -> Iterator[WorkItem]:
        # An empty label says that there is none, so that the folder's name is not taken instead.
        label: str | None = None
        for extension in _LABEL_EXTENSIONS:
            other = sample.labels.get(extension)
            if not label and other is not None:
                label = other
        for name, item in sample.images:
            yield item._replace(identity=self._identify(name, label))

    def _read_label(self, file: BinaryIO, member: tarfile.TarInfo, extension: str) -> str | None:
        """Read the label in a .cls or .json member; empty if it says that there is none, None if it has no label."""
        if member.size > _MAX_LABEL_BYTES:
            return None
        # Labels lie between headers: go back to the place from which the next header is read.
        position = file.tell()
        file.seek(member.offset_data)
        text = bytes(file.read(member.size)).decode("utf-8-sig", "surrogateescape")
        file.seek(position)
        if extension == "cls":
            return format_label(text) or ""
        try:
            content: Any = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(content, dict):
            return None
        labels = [format_label(content[name]) or "" for name in self._fields if name in content]
        return next(filter(None, labels), "") if labels else None


@dataclass
class _Sample:
    """The members of one key: images that wait for a label, and the labels by extension."""

    key: str
    images: list[tuple[str, WorkItem]] = field(default_factory=list)
    labels: dict[str, str | None] = field(default_factory=dict)


def split_key(name: str) -> str:
    """Return the key of a member, its path up to the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _make_item(container: _Container, member: tarfile.TarInfo, seen_names: set[int]) -> WorkItem:
    # Escaped before it is looked up: one name may read like the escapes of another.
    name = escape_name(member.name)
    if not _add_name(seen_names, name):
        name = f"{name}@{member.offset_data}"
    return WorkItem(
        uri=make_member_uri(container.uri, name),
        path=container.path,
        offset=member.offset_data,
        length=member.size,
        fingerprint=f"{container.fingerprint}@{member.offset_data}",
    )


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
