"""Deletion vectors: which rows of a file are deleted, kept in the table's log instead of writing the file anew.

A night replaces and relabels images all over a table. To write their files anew would write nearly all of its bytes. So
the log says which rows of a file do not count any more. This is a feature of Delta Lake, which other readers know. The
vectors stand in the log itself, as a bitmap in the format of Roaring, in Z85.

Deleted rows are on disk until their file is written anew. `facepipe.gallery.maintenance.purge` sees to that.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from facepipe.errors import GalleryError
from facepipe.types import Bool, Int64

FEATURE = "deletionVectors"
"""Name of the feature in the table's protocol."""
PROPERTY = "delta.enableDeletionVectors"
"""Name of the table property that lets writers use it."""

_INLINE = "i"
_ARRAY_MAGIC = 1681511377
_NO_RUNS_COOKIE = 12346
# A container of more values is a bitmap.
_MAX_ARRAY = 4096
_CONTAINER_BITS = 16
_BITMAP_BYTES = (1 << _CONTAINER_BITS) // 8
_BASE = 85
_DIGITS = np.frombuffer(
    b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#", np.uint8
)
_POWERS = np.array([_BASE**n for n in (4, 3, 2, 1, 0)], np.int64)

Descriptor = dict[str, Any]
"""A deletion vector as the log has it: the field `deletionVector` of an action."""


@dataclass(frozen=True)
class RowChoice:
    """Which rows of a file are read.

    Attributes:
        rows: Numbers of rows in the file, rising, (n,).
        is_kept: Whether these rows are read, or all others.
    """

    rows: Int64
    is_kept: bool = False

    def mask(self, first: int, count: int) -> Bool:
        """Mask the rows to read among `count` rows from row `first` on, (count,)."""
        low, high = np.searchsorted(self.rows, [first, first + count])
        mask = np.full(count, not self.is_kept)
        mask[self.rows[low:high] - first] = self.is_kept
        return mask

    def filter_batches(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Leave the other rows out of all batches of a file, in the order of the file."""
        first = 0
        for batch in batches:
            mask = self.mask(first, batch.num_rows)
            first += batch.num_rows
            yield batch if mask.all() else batch.filter(pa.array(mask))


def encode_rows(rows: Int64) -> Descriptor:
    """Encode the numbers of deleted rows.

    Args:
        rows: rising numbers below 2^32, (n,).
    """
    bitmap = struct.pack("<IQI", _ARRAY_MAGIC, 1, 0) + _encode_bitmap(rows)
    padded = bitmap + bytes(-len(bitmap) % 4)
    return {
        "storageType": _INLINE,
        "pathOrInlineDv": _encode_z85(padded),
        "sizeInBytes": len(bitmap),
        "cardinality": len(rows),
    }


def decode_rows(descriptor: Descriptor) -> Int64:
    """Decode the numbers of deleted rows: rising, (n,).

    Raises:
        GalleryError: the vector is not one that this package writes.
    """
    if descriptor["storageType"] != _INLINE:
        raise GalleryError(
            "another program has deleted rows of the table, and names them in files that facepipe does not read: have "
            "it write the table's files anew, such as by REORG TABLE ... APPLY (PURGE)"
        )
    try:
        rows = _decode_array(_decode_z85(descriptor["pathOrInlineDv"])[: descriptor["sizeInBytes"]])
    except (ValueError, IndexError, struct.error) as error:
        raise GalleryError("a deletion vector in the table's log is damaged") from error
    if len(rows) != descriptor["cardinality"]:
        raise GalleryError("a deletion vector in the table's log is damaged: it has another number of rows")
    return rows


def _encode_bitmap(rows: Int64) -> bytes:
    keys, starts = np.unique(rows >> _CONTAINER_BITS, return_index=True)
    containers = np.split((rows & 0xFFFF).astype("<u2"), starts)[1:]
    header = struct.pack("<II", _NO_RUNS_COOKIE, len(keys))
    for key, values in zip(keys.tolist(), containers, strict=True):
        header += struct.pack("<HH", key, len(values) - 1)
    # Each container is found by its offset from the beginning of the bitmap.
    bodies = [_encode_container(values) for values in containers]
    offset = len(header) + 4 * len(bodies)
    offsets = b""
    for body in bodies:
        offsets += struct.pack("<I", offset)
        offset += len(body)
    return header + offsets + b"".join(bodies)


def _encode_container(values: Any) -> bytes:
    if len(values) <= _MAX_ARRAY:
        return bytes(values.tobytes())
    bits = np.zeros(1 << _CONTAINER_BITS, np.uint8)
    bits[values] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def _decode_array(data: bytes) -> Int64:
    magic, bitmaps = struct.unpack_from("<IQ", data)
    if magic != _ARRAY_MAGIC or bitmaps > 1:
        raise ValueError("not a bitmap of row numbers")
    if not bitmaps:
        return np.empty(0, np.int64)
    (high,) = struct.unpack_from("<I", data, 12)
    return (high << 32) + _decode_bitmap(data[16:])


def _decode_bitmap(data: bytes) -> Int64:
    cookie, count = struct.unpack_from("<II", data)
    if cookie != _NO_RUNS_COOKIE:
        raise ValueError("not a bitmap without runs")
    at = 8 + 8 * count
    parts = [np.empty(0, np.int64)]
    for n in range(count):
        key, last = struct.unpack_from("<HH", data, 8 + 4 * n)
        if last + 1 <= _MAX_ARRAY:
            values = np.frombuffer(data, "<u2", last + 1, at).astype(np.int64)
            at += 2 * (last + 1)
        else:
            bits = np.frombuffer(data, np.uint8, _BITMAP_BYTES, at)
            values = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
            at += _BITMAP_BYTES
        parts.append((key << _CONTAINER_BITS) + values)
    return np.concatenate(parts)


def _encode_z85(data: bytes) -> str:
    """Encode bytes, four at a time, as five characters that need no escape in JSON."""
    numbers = np.frombuffer(data, ">u4").astype(np.int64)
    digits = numbers[:, None] // _POWERS % _BASE
    return _DIGITS[digits].tobytes().decode("ascii")


def _decode_z85(text: str) -> bytes:
    values = np.full(256, -1, np.int64)
    values[_DIGITS] = np.arange(_BASE)
    digits = values[np.frombuffer(text.encode("ascii"), np.uint8)].reshape(-1, 5)
    if (digits < 0).any():
        raise ValueError("not Z85")
    return (digits @ _POWERS).astype(">u4").tobytes()
