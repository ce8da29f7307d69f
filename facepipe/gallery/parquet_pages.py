"""Read some values of a column of bytes from a Parquet file, and only the pages that they are in.

Arrow reads whole column chunks. A chunk of thumbnails has a megabyte and more, of which a report shows a few. A chunk
is a series of pages, each with a header that says how long it is and how many rows it has. So this walks from header to
header, and reads the pages of the wanted rows. What facepipe does not write itself is left to Arrow.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from facepipe.types import Int64

_HEADER_BYTES = 128  # read at a time; statistics can make a header longer
_MAX_HEADER_BYTES = 1 << 20
_DATA_PAGE = 0
_PLAIN = 0
# Kinds of values in Thrift's compact protocol.
_STOP = 0
_BOOLEANS = (1, 2)
_BYTE = 3
_INTEGERS = (4, 5, 6)
_DOUBLE = 7
_BINARY = 8
_LISTS = (9, 10)
_STRUCT = 12


class UnsupportedPageError(Exception):
    """The column is written in a way that only Arrow reads."""


@dataclass(frozen=True)
class _PageHeader:
    """Where a page's data are: their length, and the bytes of the header before them.

    Attributes:
        length: Bytes of the header.
        size: Bytes of the compressed data.
        raw_size: Bytes of the data when they are decompressed.
        rows: Values, nulls included.
    """

    length: int
    size: int
    raw_size: int
    rows: int


def read_byte_values(file: pa.NativeFile, column: pq.ColumnChunkMetaData, rows: Int64) -> list[bytes | None]:
    """Read the values of some rows of a column chunk that is not nested.

    Args:
        file: the Parquet file.
        column: metadata of the column chunk.
        rows: rows within the row group, rising, (n,).

    Returns:
        The values, in the order of the rows.

    Raises:
        UnsupportedPageError: the chunk is not of plain bytes.
    """
    if column.physical_type != "BYTE_ARRAY" or column.has_dictionary_page:
        raise UnsupportedPageError(f"{column.path_in_schema} is not of plain bytes")
    values: list[bytes | None] = []
    offset = column.data_page_offset
    end = offset + column.total_compressed_size
    first = 0
    while len(values) < len(rows) and offset < end:
        header = _read_header(file, offset)
        wanted = rows[(rows >= first) & (rows < first + header.rows)] - first
        if len(wanted):
            data = file.read_at(header.size, offset + header.length)
            values += _decode_page(_decompress(data, column.compression, header.raw_size), header.rows, wanted)
        first += header.rows
        offset += header.length + header.size
    if len(values) < len(rows):
        raise UnsupportedPageError(f"{column.path_in_schema} has fewer rows than its file says")
    return values


def _read_header(file: pa.NativeFile, offset: int) -> _PageHeader:
    """Read a page's header, a little at a time: nothing says how long it is."""
    size = _HEADER_BYTES
    while True:
        data = file.read_at(size, offset)
        try:
            return _parse_header(data)
        except IndexError as error:
            if len(data) < size or size > _MAX_HEADER_BYTES:
                raise UnsupportedPageError("a page header is cut short") from error
        size *= 8


def _parse_header(data: bytes) -> _PageHeader:
    reader = _ThriftReader(data)
    fields = reader.read_struct()
    page = fields.get(5)
    if fields.get(1) != _DATA_PAGE or not isinstance(page, dict) or page.get(2) != _PLAIN:
        raise UnsupportedPageError("not a plain data page")
    return _PageHeader(reader.at, _get_size(fields, 3), _get_size(fields, 2), _get_size(page, 1))


def _get_size(fields: dict[int, object], number: int) -> int:
    size = fields.get(number)
    if not isinstance(size, int) or size < 0:
        raise UnsupportedPageError("a page header lacks a size")
    return size


class _ThriftReader:
    """Reads structs of Thrift's compact protocol. A read beyond the end raises IndexError."""

    def __init__(self, data: bytes):
        self._data = data
        self.at = 0

    def read_struct(self) -> dict[int, object]:
        """Read the fields of a struct by their numbers; bytes and lists are skipped."""
        fields: dict[int, object] = {}
        number = 0
        while True:
            byte = self.read_byte()
            kind = byte & 15
            if kind == _STOP:
                return fields
            delta = byte >> 4
            number = number + delta if delta else self._read_integer()
            fields[number] = self._read_value(kind)

    def _read_value(self, kind: int) -> object:
        if kind in _BOOLEANS:
            return kind == _BOOLEANS[0]
        if kind in _INTEGERS:
            return self._read_integer()
        if kind == _STRUCT:
            return self.read_struct()
        if kind == _BYTE:
            return self.read_byte()
        if kind == _DOUBLE:
            self._skip(8)
            return None
        if kind == _BINARY:
            self._skip(self.read_varint())
            return None
        if kind in _LISTS:
            self._skip_list()
            return None
        raise UnsupportedPageError(f"a page header has a value of kind {kind}")

    def _skip_list(self) -> None:
        byte = self.read_byte()
        count = byte >> 4
        if count == 15:
            count = self.read_varint()
        for _ in range(count):
            self._read_value(byte & 15)

    def read_byte(self) -> int:
        value = self._data[self.at]
        self.at += 1
        return value

    def read_varint(self) -> int:
        value = 0
        shift = 0
        while True:
            byte = self.read_byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    def _read_integer(self) -> int:
        value = self.read_varint()
        return (value >> 1) ^ -(value & 1)

    def _skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self._data):
            raise IndexError


def _decompress(data: bytes, codec: str, raw_size: int) -> memoryview:
    if codec == "UNCOMPRESSED":
        return memoryview(data)
    try:
        return memoryview(pa.Codec(codec.lower()).decompress(data, raw_size))
    except (ValueError, pa.ArrowException) as error:
        raise UnsupportedPageError(f"a page compressed with {codec}") from error


def _decode_page(data: memoryview, count: int, wanted: Int64) -> list[bytes | None]:
    """Decode some of the values of a page: which rows have one, then the length and the bytes of each."""
    (length,) = struct.unpack_from("<I", data)
    has_value = _decode_levels(data[4 : 4 + length], count)
    last = int(wanted[-1])
    values: dict[int, bytes | None] = {}
    requested = set(wanted.tolist())
    at = 4 + length
    for row in range(last + 1):
        if not has_value[row]:
            values[row] = None
            continue
        (size,) = struct.unpack_from("<I", data, at)
        if row in requested:
            values[row] = bytes(data[at + 4 : at + 4 + size])
        at += 4 + size
    return [values[row] for row in wanted.tolist()]


def _decode_levels(data: memoryview, count: int) -> np.ndarray:
    """Decode which of the rows have a value: runs of one bit, repeated or packed."""
    parts = list(_iterate_runs(bytes(data), count))
    levels = np.concatenate([np.empty(0, bool), *parts])
    if len(levels) < count:
        raise UnsupportedPageError("a page says of too few rows whether they have a value")
    return levels[:count]


def _iterate_runs(data: bytes, count: int) -> Iterator[np.ndarray]:
    reader = _ThriftReader(data)  # its numbers are written in the same way
    done = 0
    while done < count and reader.at < len(data):
        header = reader.read_varint()
        if header & 1:
            size = header >> 1
            run = np.unpackbits(np.frombuffer(data, np.uint8, size, reader.at), bitorder="little").astype(bool)
            reader.at += size
        else:
            run = np.full(header >> 1, bool(reader.read_byte()))
        done += len(run)
        yield run
