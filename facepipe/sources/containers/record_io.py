"""RecordIO, in which insightface's training sets come: `train.rec`, and `train.idx` with the place of each record.

A record is a magic number, its length and kind, its bytes, and zeros up to a multiple of four. If its bytes hold the
magic number at such a place, they are cut there into parts, and the number is left out. The bytes begin with a header
(flag, label, id, second id); a flag above zero is the number of labels that follow, in place of the one in the header.
In insightface's sets a first record without an image says how many images there are, and one further record per person
says which they are (https://mxnet.apache.org/api/architecture/note_data_loading; insightface's face2rec2.py).
"""

import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa
import pyarrow.csv

from facepipe.errors import StorageError
from facepipe.sources.identity import Identify
from facepipe.sources.item import WorkItem, make_broken_item, make_file_uri, make_member_uri
from facepipe.sources.labels import format_label
from facepipe.storage import get_open_fingerprint, is_remote, is_special_file, open_seekable

_MAGIC = 0xCED7230A
_MAGIC_BYTES = struct.pack("<I", _MAGIC)
_PREFIX = struct.Struct("<II")  # magic, and kind and length of a part
_HEADER = struct.Struct("<IfQQ")  # flag, label, id, second id
_LENGTH_BITS = 29
# Kinds of parts.
_WHOLE = 0
_FIRST = 1
_MIDDLE = 2
_LAST = 3
_MAX_LABELS = 1 << 16
_PROBE_BYTES = _PREFIX.size + _HEADER.size + 8 * 4  # what most records need to be listed
_MAX_BROKEN = 1000  # records that cannot be read one after another, until the file is given up


@dataclass(frozen=True)
class _Record:
    """A record as it lies in the file.

    Attributes:
        begin: First byte of the record.
        end: Byte behind its last part, with padding.
        content: First byte of the image; that of the record if the image lies there in several parts.
        size: Number of bytes of the one or the other.
        is_image: Whether it holds more than labels.
        number: Id in its header.
        label: First label.
        has_labels: Whether there are several, as in records without an image.
    """

    begin: int
    end: int
    content: int
    size: int
    is_image: bool
    number: int
    label: float
    has_labels: bool


class RecordReader:
    """Lists the images of RecordIO files."""

    def __init__(self, identify: Identify):
        """Make a reader.

        Args:
            identify: makes an identity from a record's name and its label.
        """
        self._identify = identify
        self._labels: dict[float, str | None] = {}

    def list_items(self, path: str) -> Iterator[WorkItem]:
        """Yield the items of one file. What cannot be read becomes an item that says so.

        An image is named by its key in the index beside the file, or by the id in its header if there is no index.

        Args:
            path: path of the `.rec` file.
        """
        if is_remote(path):
            yield make_broken_item(path, "a .rec in an object store would take a request per record: copy it to a disk")
            return
        try:
            if is_special_file(path):
                raise StorageError("not a regular file")
            with open_seekable(path) as file:
                yield from self._list_records(file, path)
        except (StorageError, OSError) as error:
            yield make_broken_item(path, str(error))

    def _list_records(self, file: BinaryIO, path: str) -> Iterator[WorkItem]:
        container = make_file_uri(path)
        encoded = os.fsencode(path)
        fingerprint = get_open_fingerprint(file)
        index = find_index(path)
        images = 0
        promised = None
        broken = 0
        broken_in_a_row = 0
        for name, place in _scan(file) if index is None else _look_up(file, index):
            if isinstance(place, str):
                broken += 1
                broken_in_a_row += 1
                if broken_in_a_row > _MAX_BROKEN:
                    raise StorageError(f"more than {_MAX_BROKEN} records cannot be read one after another: {place}")
                yield WorkItem(make_member_uri(container, name), encoded, listing_error=place)
                continue
            broken_in_a_row = 0
            if not place.is_image:
                # Record 0 says how many images there are, plus one.
                if place.number == 0 and place.has_labels:
                    promised = int(place.label) - 1
                continue
            images += 1
            yield WorkItem(
                uri=make_member_uri(container, name),
                path=encoded,
                offset=place.content,
                length=place.size,
                fingerprint=f"{fingerprint}@{place.begin}",
                identity=self._label(name, place.label),
            )
        if index is not None and broken > images:
            raise StorageError(f"{os.path.basename(index)} is the index of another file, or this one is damaged")
        if promised is not None and promised > images:
            raise StorageError(f"the file says that it holds {promised} images, and {images} are there")

    def _label(self, name: str, label: float) -> str | None:
        """Return the identity of a label. Labels repeat, so that each is written once."""
        if label not in self._labels:
            self._labels[label] = self._identify(name, format_label(label) or "")
        return self._labels[label]


def find_index(path: str) -> str | None:
    """Find the index beside a `.rec` file; None if there is none."""
    index = f"{os.path.splitext(path)[0]}.idx"
    return index if os.path.exists(index) else None


def unpack_record(data: bytes) -> bytes:
    """Get the image out of the bytes of a record. Bytes that do not begin like a record are an image already.

    Raises:
        StorageError: the record is damaged.
    """
    if not data.startswith(_MAGIC_BYTES):
        return data
    parts = []
    at = 0
    while True:
        kind, size = _read_prefix(data[at : at + _PREFIX.size], at)
        parts.append(data[at + _PREFIX.size : at + _PREFIX.size + size])
        at += _PREFIX.size + _pad(size)
        if kind in (_WHOLE, _LAST):
            break
    content = _MAGIC_BYTES.join(parts)
    if len(content) < _HEADER.size:
        raise StorageError("the record is too short")
    flag = _HEADER.unpack_from(content)[0]
    return content[_HEADER.size + 4 * flag :]


def pack_header(number: int, labels: Sequence[float], *, several: bool = False) -> bytes:
    """Pack the header of a record.

    Args:
        number: id of the record.
        labels: labels.
        several: write them behind the header, also if there is only one.
    """
    if len(labels) == 1 and not several:
        return _HEADER.pack(0, labels[0], number, 0)
    return _HEADER.pack(len(labels), 0.0, number, 0) + struct.pack(f"<{len(labels)}f", *labels)


def pack_record(content: bytes) -> bytes:
    """Pack header and image into a record. The content is cut if the magic number stands at a multiple of four."""
    parts = []
    begin = 0
    at = content.find(_MAGIC_BYTES)
    while at >= 0:
        if at % 4 == 0:
            parts.append(content[begin:at])
            begin = at + 4
            at = content.find(_MAGIC_BYTES, begin)
        else:
            at = content.find(_MAGIC_BYTES, at + 1)
    parts.append(content[begin:])
    kinds = [_WHOLE] if len(parts) == 1 else [_FIRST, *[_MIDDLE] * (len(parts) - 2), _LAST]
    return b"".join(_pack_part(part, kind) for part, kind in zip(parts, kinds, strict=True))


def _pack_part(part: bytes, kind: int) -> bytes:
    if len(part) >= 1 << _LENGTH_BITS:
        raise StorageError(f"an image of {len(part)} bytes is too large for a record")
    return _PREFIX.pack(_MAGIC, kind << _LENGTH_BITS | len(part)) + part + bytes(-len(part) % 4)


def _look_up(file: BinaryIO, index: str) -> Iterator[tuple[str, _Record | str]]:
    """Yield the name of each record of an index, and the record or why it cannot be read."""
    size = os.fstat(file.fileno()).st_size
    for batch in _read_index(index):
        for key, offset in zip(batch["key"].to_pylist(), batch["offset"].to_pylist(), strict=True):
            if key is None or offset is None:
                # A line that is cut off has a key alone.
                yield str(key), f"{os.path.basename(index)} has a line without a key or an offset"
                continue
            try:
                yield str(key), _read_record(file, offset, size)
            except StorageError as error:
                yield str(key), str(error)


def _read_index(path: str) -> Iterator[pa.RecordBatch]:
    """Read an index a batch at a time: a line of key and offset per record."""
    options = pa.csv.ConvertOptions(column_types={"key": pa.int64(), "offset": pa.int64()})
    try:
        with pa.csv.open_csv(
            path,
            pa.csv.ReadOptions(column_names=["key", "offset"]),
            pa.csv.ParseOptions(delimiter="\t"),
            options,
        ) as batches:
            yield from batches
    except pa.ArrowException as error:
        raise StorageError(
            f"{os.path.basename(path)} is not an index of records: {str(error).splitlines()[0]}"
        ) from error


def _scan(file: BinaryIO) -> Iterator[tuple[str, _Record | str]]:
    """Yield the name of each record in the order of the file, and the record."""
    size = os.fstat(file.fileno()).st_size
    at = 0
    previous = -1
    while at < size:
        record = _read_record(file, at, size)
        at = record.end
        # Ids rise in the files of the field. If they do not, the place tells records apart.
        name = str(record.number) if record.number > previous else f"{record.number}@{record.begin}"
        previous = max(previous, record.number)
        yield name, record


def _read_record(file: BinaryIO, offset: int, size: int) -> _Record:
    """Read what is to be known of the record at an offset in a file of so many bytes, but not the image.

    Raises:
        StorageError: there is none, or it is cut off.
    """
    if not 0 <= offset < size:
        raise StorageError(f"no record at byte {offset}, the file has {size}")
    head = os.pread(file.fileno(), _PROBE_BYTES, offset)
    kind, length = _read_prefix(head[: _PREFIX.size], offset)
    end = offset + _PREFIX.size + _pad(length)
    if kind == _FIRST:
        end = _find_end(file, end, size)
    elif kind != _WHOLE:
        raise StorageError(f"no record begins at byte {offset}")
    if offset + _PREFIX.size + length > size:
        raise StorageError(f"the record at byte {offset} is cut off: the file ends at byte {size}")
    if length < _HEADER.size:
        raise StorageError(f"the record at byte {offset} is too short")
    flag, label, number, _ = _HEADER.unpack_from(head, _PREFIX.size)
    skipped = _PREFIX.size + _HEADER.size + 4 * flag
    if flag > _MAX_LABELS or skipped > _PREFIX.size + length:
        raise StorageError(f"the record at byte {offset} is damaged: {flag} labels")
    if flag:
        label = struct.unpack_from("<f", head, _PREFIX.size + _HEADER.size)[0]
    content = offset + skipped
    content_size = _PREFIX.size + length - skipped
    if kind == _FIRST:
        content = offset
        content_size = end - offset
    return _Record(
        begin=offset,
        end=end,
        content=content,
        size=content_size,
        is_image=content_size > 0,
        number=number,
        label=label,
        has_labels=flag > 0,
    )


def _find_end(file: BinaryIO, at: int, size: int) -> int:
    """Find the byte behind the last part of a record whose second part begins at `at`."""
    while True:
        kind, length = _read_prefix(os.pread(file.fileno(), _PREFIX.size, at), at)
        at += _PREFIX.size + _pad(length)
        if kind == _LAST:
            if at - 3 > size:
                raise StorageError(f"the record that ends at byte {at} is cut off: the file ends at byte {size}")
            return at


def _read_prefix(prefix: bytes, offset: int) -> tuple[int, int]:
    """Read kind and length of the part that begins at an offset."""
    if len(prefix) < _PREFIX.size or not prefix.startswith(_MAGIC_BYTES):
        raise StorageError(f"no record at byte {offset}")
    word = _PREFIX.unpack(prefix)[1]
    return word >> _LENGTH_BITS, word & ((1 << _LENGTH_BITS) - 1)


def _pad(length: int) -> int:
    """Round a length up to a multiple of four."""
    return (length + 3) // 4 * 4
