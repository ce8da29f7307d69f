"""Bring files into a form that decoders read: complete what lacks only its last bytes, and take out what misleads.

A file that lacks only its last bytes shows the whole picture: the mark of its end is missing, or less than a row of
pixels. What lacks more stays an error. Viewers show such files, decoders refuse them.
"""

import re
import struct
import zlib

from facepipe.imaging.header import (
    ORIENTATION_TAG,
    Header,
    find_chunks,
    find_segments,
    find_tags,
)

_END_OF_JPEG = b"\xff\xd9"
_END_OF_PNG = b"\0\0\0\0IEND\xaeB`\x82"
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
# Channels of a PNG by its colour type.
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# First column, first row, and the steps between columns and rows, of the seven passes of an interlaced PNG.
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def complete_file(data: bytes, header: Header) -> bytes | None:
    """Complete a file that lacks only its last bytes.

    A completed JPEG may still lack rows, which only its pixels tell.

    Returns:
        The completed file; None if more is missing, nothing is missing, or the format is not known to be mendable.
    """
    try:
        if header.format == "jpeg":
            return _complete_jpeg(data)
        if header.format == "png":
            return complete_png(data)
        if header.format == "webp":
            return _complete_webp(data, header.height)
        if header.format == "bmp":
            return _complete_bmp(data, header)
        if header.format == "pnm":
            return _complete_pnm(data, header)
        if header.format == "tiff":
            return _complete_tiff(data, header)
        if header.format == "jp2" and not data.endswith(_END_OF_JPEG):
            # Tile parts say how long they are, so nothing else can be missing unnoticed.
            return data.removesuffix(b"\xff") + _END_OF_JPEG
    except (struct.error, zlib.error, IndexError, KeyError, ValueError):
        return None
    return None


# JPEG


def _complete_jpeg(data: bytes) -> bytes | None:
    """Add the mark of the end. What lacks coefficients of any frequency is not completed."""
    scans = [offset for marker, offset in find_segments(data) if marker == 0xDA]
    if not scans or _has_end(data, scans[-1]):
        return None
    if _is_progressive(data) and not _has_all_bits(data, scans):
        return None
    # A last FF is half of the mark.
    return data.removesuffix(b"\xff") + _END_OF_JPEG


def _has_end(data: bytes, scan: int) -> bool:
    # In coded data FF is followed by 00 or a restart mark, so the mark of the end cannot be part of it.
    return data.find(_END_OF_JPEG, scan) >= 0


def _is_progressive(data: bytes) -> bool:
    return any(marker in _PROGRESSIVE for marker, _ in find_segments(data))


def find_last_scan_data(data: bytes) -> int | None:
    """Find where the data of a progressive JPEG's last scan begin; None if the JPEG is not progressive.

    Without its header, decoders would smooth what the scan refines.
    """
    scans = [offset for marker, offset in find_segments(data) if marker == 0xDA]
    if len(scans) < 2 or not _is_progressive(data):
        return None
    return scans[-1] + 2 + int.from_bytes(data[scans[-1] + 2 : scans[-1] + 4], "big")


def measure_unit_height(data: bytes) -> int:
    """Measure how many rows of pixels a JPEG's units span: 8, or 16 if its chroma has half the rows."""
    for marker, offset in find_segments(data):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            count = data[offset + 9]
            return 8 * max(data[offset + 11 + 3 * n] & 15 for n in range(count))
    return 8


def _has_all_bits(data: bytes, scans: list[int]) -> bool:
    """Tell whether the scans of a progressive JPEG reach the last bit of every coefficient of all components."""
    missing: dict[int, set[int]] = {}
    for offset in scans:
        count = data[offset + 4]
        components = [data[offset + 5 + 2 * n] for n in range(count)]
        first, last, bits = data[offset + 5 + 2 * count : offset + 8 + 2 * count]
        for component in components:
            left = missing.setdefault(component, set(range(64)))
            if not bits & 15:
                left -= set(range(first, last + 1))
    return not any(missing.values())


# PNG


def complete_png(data: bytes) -> bytes | None:
    """Close a PNG that was cut off behind its pixels. Only call this after its size was checked: it inflates them."""
    chunks = list(find_chunks(data))
    last_kind, last_start, last_end = chunks[-1]
    if last_kind == b"IEND" and last_end <= len(data):
        return None
    if last_end > len(data):
        chunks.pop()
    parts = [data[start + 8 : end - 4] for kind, start, end in chunks if kind == b"IDAT"]
    if last_kind == b"IDAT" and last_end > len(data):
        # The checksum of the chunk may be cut off, or part of its data.
        parts.append(data[last_start + 8 : last_end - 4])
    size = _measure_png(data)
    inflater = zlib.decompressobj()
    try:
        pixels = inflater.decompress(b"".join(parts), size + 1)
    except zlib.error:
        return None
    # What follows the pixels would be another chunk: then the length of this one is wrong, and the file is damaged.
    if len(pixels) != size or inflater.unused_data:
        return None
    before = [data[start:end] for kind, start, end in chunks if kind not in (b"IDAT", b"IEND")]
    coded = zlib.compress(pixels, 1)
    idat = struct.pack(">I", len(coded)) + b"IDAT" + coded + struct.pack(">I", zlib.crc32(b"IDAT" + coded))
    return data[:8] + b"".join(before) + idat + _END_OF_PNG


def is_truncated_png(data: bytes) -> bool:
    """Tell whether a PNG ends before its last chunk does."""
    kind, _, end = list(find_chunks(data))[-1]
    return kind != b"IEND" or end > len(data)


def _measure_png(data: bytes) -> int:
    """Measure the bytes of a PNG's pixels before they are compressed."""
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    bits = depth * _CHANNELS.get(colour, 4)
    passes = _PASSES if interlaced else ((0, 0, 1, 1),)
    total = 0
    for left, top, across, down in passes:
        columns = max(0, -(-(width - left) // across))
        rows = max(0, -(-(height - top) // down))
        if columns:
            total += rows * (1 + (columns * bits + 7) // 8)
    return total


# WebP


def _complete_webp(data: bytes, height: int) -> bytes | None:
    """Drop what is cut off behind the picture, or fill up a picture that lacks less than a row."""
    start = 12
    chunks = []
    has_picture = False
    while start + 8 <= len(data):
        kind = data[start : start + 4]
        size = struct.unpack_from("<I", data, start + 4)[0]
        content = data[start + 8 : start + 8 + size]
        lacking = size - len(content)
        is_picture = kind in (b"VP8 ", b"VP8L", b"ANMF")
        if lacking and not (is_picture and kind != b"ANMF" and lacking * height < size):
            break
        has_picture |= is_picture
        chunks.append(data[start : start + 8] + content + bytes(lacking + (size & 1)))
        start += 8 + size + (size & 1)
    body = b"WEBP" + b"".join(chunks)
    completed = b"RIFF" + struct.pack("<I", len(body)) + body
    return None if not has_picture or completed == data else completed


# BMP, Netpbm


def _complete_bmp(data: bytes, header: Header) -> bytes | None:
    """Fill up a BMP that lacks less than a row."""
    offset = struct.unpack_from("<I", data, 10)[0]
    if struct.unpack_from("<I", data, 14)[0] == 12:
        bits = struct.unpack_from("<H", data, 24)[0]
        compression = 0
    else:
        bits, compression = struct.unpack_from("<HI", data, 28)
    if compression not in (0, 3, 6):  # run lengths have no fixed size
        return None
    row = (header.width * bits + 31) // 32 * 4
    return _fill_up(data, offset + row * header.height, row)


_GAP = rb"(?:\s|#[^\r\n]*[\r\n])+"
_PNM_BITS = re.compile(rb"P4" + _GAP + rb"\d{1,9}" + _GAP + rb"\d{1,9}\s")
_PNM_BYTES = re.compile(rb"P([56])" + _GAP + rb"\d{1,9}" + _GAP + rb"\d{1,9}" + _GAP + rb"(\d{1,5})\s")


def _complete_pnm(data: bytes, header: Header) -> bytes | None:
    """Fill up a binary Netpbm file that lacks less than a row."""
    match = _PNM_BITS.match(data[:1024])
    if match:
        row = (header.width + 7) // 8
        return _fill_up(data, match.end() + row * header.height, row)
    match = _PNM_BYTES.match(data[:1024])
    if not match:
        return None
    row = header.width * (3 if match[1] == b"6" else 1) * (2 if int(match[2]) > 255 else 1)
    return _fill_up(data, match.end() + row * header.height, row)


def _fill_up(data: bytes, size: int, row: int) -> bytes | None:
    lacking = size - len(data)
    return data + bytes(lacking) if 0 < lacking < row else None


# TIFF

_BITS_TAG = 258
_COMPRESSION_TAG = 259
_OFFSETS_TAG = 273
_CHANNELS_TAG = 277
_ROWS_TAG = 278
_COUNTS_TAG = 279


def _complete_tiff(data: bytes, header: Header) -> bytes | None:
    """Fill up a TIFF whose pixels are not compressed and lack less than a row."""
    entries = {tag: (value, offset) for tag, value, offset in find_tags(data)}
    if entries.get(_COMPRESSION_TAG, (1, 0))[0] != 1 or _OFFSETS_TAG not in entries or _COUNTS_TAG not in entries:
        return None
    end = 0
    for offset, count in zip(
        _read_values(data, entries[_OFFSETS_TAG][1]), _read_values(data, entries[_COUNTS_TAG][1]), strict=False
    ):
        end = max(end, offset + count)
    channels = entries.get(_CHANNELS_TAG, (1, 0))[0]
    bits = _read_values(data, entries[_BITS_TAG][1])[0] if _BITS_TAG in entries else 1
    return _fill_up(data, end, (header.width * channels * bits + 7) // 8)


def _read_values(data: bytes, offset: int) -> tuple[int, ...]:
    """Read the short or long values of a TIFF's entry, whose first value is at that offset (BigTIFF is not read)."""
    order = "<" if data[:2] == b"II" else ">"
    kind, count = struct.unpack_from(order + "HI", data, offset - 6)
    form, size = {3: ("H", 2), 4: ("I", 4)}[kind]
    # Up to four bytes of values stand in the entry itself.
    start = offset if count * size <= 4 else struct.unpack_from(order + "I", data, offset)[0]
    return struct.unpack_from(f"{order}{min(count, 1 << 20)}{form}", data, start)


def undo_tiff_orientation(data: bytes) -> bytes:
    """Set the orientation of a TIFF to 1: decoders apply it by themselves, and not all of them."""
    order = "<" if data[:2] == b"II" else ">"
    offsets = [offset for tag, value, offset in find_tags(data) if tag == ORIENTATION_TAG and value != 1]
    if not offsets:
        return data
    stored = bytearray(data)
    for offset in offsets:
        struct.pack_into(order + "H", stored, offset, 1)
    return bytes(stored)
