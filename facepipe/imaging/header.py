"""Read what an image file says about itself in its first bytes: format, stored size and EXIF orientation.

The header is read before any pixel is decoded, so that memory is only spent on images of an acceptable size. The format
is detected from the content, never from the name. Layouts: JPEG (ITU T.81 B.2), EXIF 2.3 (4.6), PNG (RFC 2083), GIF89a,
BMP, WebP (RFC 9649), TIFF 6.0 (section 2), ISO BMFF `ispe` (AVIF), JPEG 2000 `ihdr`, Netpbm.
"""

import re
import struct
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple


class Header(NamedTuple):
    """What an image file says about itself.

    Attributes:
        format: Lower-case name of the format.
        width: Stored width in pixels, before the EXIF orientation is applied.
        height: Stored height in pixels.
        orientation: EXIF orientation, 1 to 8.
        scans: How often a decoder passes over the whole image (progressive JPEG).
    """

    format: str
    width: int
    height: int
    orientation: int = 1
    scans: int = 1

    @property
    def oriented_size(self) -> tuple[int, int]:
        """(width, height) after the EXIF orientation is applied."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


class HeaderError(ValueError):
    """The bytes are not an image of a known format, or the header ends early."""


def read_header(data: bytes) -> Header:
    """Read the header of an image file.

    Raises:
        HeaderError: The format is unknown, or the header is damaged; the message is a short reason.
    """
    if not data:
        raise HeaderError("empty file")
    # Formats are tried in order; the first that recognises the first bytes decides.
    for matches, parse in _FORMATS:
        if matches(data):
            try:
                header = parse(data)
            except (struct.error, IndexError, OverflowError) as error:
                raise HeaderError("header ends early") from error
            if header.width <= 0 or header.height <= 0:
                raise HeaderError(f"{header.format} of size {header.width}x{header.height}")
            return header
    raise HeaderError(f"no known image format (starts with {data[:8].hex(' ')})")


# JPEG

# Start-of-frame markers, which hold the size: C0 to CF without C4, C8 and CC, which mean something else.
_SOF = frozenset({0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF})
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
# Skips garbage, fill bytes, coded data (where 00 follows FF) and markers without a segment.
_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd8]")
# Far more than cameras and editors write. A file of empty segments would keep Python busy for minutes otherwise.
_MAX_SEGMENTS = 1 << 16


def _find_segments(data: bytes, start: int = 2) -> Iterator[tuple[int, int]]:
    """Yield (marker, offset) of each segment of a JPEG, up to the end of the image."""
    for _ in range(_MAX_SEGMENTS):
        match = _MARKER.search(data, start)
        if not match or data[match.start() + 1] == 0xD9:
            return
        offset = match.start()
        yield data[offset + 1], offset
        # The size follows the marker and counts its own two bytes, so it is at least 2.
        start = offset + 2 + max(int.from_bytes(data[offset + 2 : offset + 4], "big"), 2)
    raise HeaderError(f"jpeg of more than {_MAX_SEGMENTS} segments")


def _parse_jpeg(data: bytes) -> Header:
    orientation = None
    for marker, offset in _find_segments(data):
        if marker in _SOF:
            # Frame header: marker (2), size (2), precision (1), then height and width.
            height, width = struct.unpack_from(">HH", data, offset + 5)
            return Header("jpeg", width, height, orientation or 1, _count_scans(data, offset))
        # Pixels begin at DA; a frame header after them would be too late.
        if marker == 0xDA:
            break
        # Take the first EXIF segment: decoders ignore later ones.
        if orientation is None and marker == 0xE1 and data[offset + 4 : offset + 10] == b"Exif\0\0":
            size = int.from_bytes(data[offset + 2 : offset + 4], "big")
            orientation = _read_exif_orientation(data[offset + 10 : offset + 2 + size])
    raise HeaderError("jpeg without a frame header")


def _count_scans(data: bytes, frame_offset: int) -> int:
    """Count the passes over the image, from its frame header on.

    Returns 1 without reading the rest of the file if decoders make only one pass: the image is not progressive and its
    first scan holds all components.
    """
    scans = 0
    for marker, offset in _find_segments(data, frame_offset):
        # A scan starts at DA.
        if marker == 0xDA:
            scans += 1
            is_progressive = data[frame_offset + 1] in _PROGRESSIVE
            # Compare the components of the scan with those of the frame: all in one scan means one pass.
            if scans == 1 and not is_progressive and data[offset + 4] >= data[frame_offset + 9]:
                return 1
    return max(scans, 1)


# PNG


def _parse_png(data: bytes) -> Header:
    width, height = struct.unpack_from(">II", data, 16)
    # EXIF may come after the pixels, so read all chunks; the walk also finds truncated files.
    orientation = None
    for kind, start, end in _find_chunks(data):
        if kind == b"eXIf" and orientation is None:
            orientation = _read_exif_orientation(data[start + 8 : end - 4])
    return Header("png", width, height, orientation or 1)


def _find_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, start, end) of each chunk of a PNG, up to its last."""
    start = 8
    for _ in range(_MAX_SEGMENTS):
        size, kind = struct.unpack_from(">I4s", data, start)
        # A chunk is size (4), kind (4), content and checksum (4).
        end = start + 12 + size
        if end > len(data):
            # OpenCV fills as many gigabytes as a chunk claims before it finds the file too short.
            raise HeaderError("png is truncated: a chunk reaches past its end")
        yield kind, start, end
        if kind == b"IEND":
            return
        start = end
    raise HeaderError(f"png of more than {_MAX_SEGMENTS} chunks")


def strip_animation(data: bytes) -> bytes:
    """Reduce an animated PNG to its still image.

    If the animation is damaged, OpenCV may return memory that it never wrote to.
    """
    chunks = [data[start:end] for kind, start, end in _find_chunks(data) if kind not in (b"acTL", b"fcTL", b"fdAT")]
    return data[:8] + b"".join(chunks)


# GIF, BMP


def _parse_gif(data: bytes) -> Header:
    return Header("gif", *struct.unpack_from("<HH", data, 6))


def _parse_bmp(data: bytes) -> Header:
    # The old OS/2 header of 12 bytes has unsigned shorts.
    if struct.unpack_from("<I", data, 14)[0] == 12:
        return Header("bmp", *struct.unpack_from("<HH", data, 18))
    # A negative height says that rows run from the top down.
    width, height = struct.unpack_from("<ii", data, 18)
    return Header("bmp", width, abs(height))


# WebP


def _parse_webp(data: bytes) -> Header:
    kind = data[12:16]
    # Lossy: 14 bits per side, the other two are a scaling hint.
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return Header("webp", width & 0x3FFF, height & 0x3FFF)
    # Lossless: 14 bits per side, minus one, in one word.
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return Header("webp", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if kind != b"VP8X":
        raise HeaderError("webp without a known frame")
    # Extended: 3 bytes per side, minus one.
    width, height = (int.from_bytes(data[start : start + 3], "little") + 1 for start in (24, 27))
    return Header("webp", width, height, _read_webp_orientation(data))


def _read_webp_orientation(data: bytes) -> int:
    # Chunks follow the 12 bytes of the RIFF header.
    start = 12
    for _ in range(_MAX_SEGMENTS):
        if start + 8 > len(data):
            break
        kind = data[start : start + 4]
        size = struct.unpack_from("<I", data, start + 4)[0]
        if kind == b"EXIF":
            return _read_exif_orientation(data[start + 8 : start + 8 + size].removeprefix(b"Exif\0\0"))
        start += 8 + size + (size & 1)  # chunks begin at even offsets
    return 1


# TIFF, and the EXIF data inside other formats

_WIDTH_TAG = 256
_HEIGHT_TAG = 257
_ORIENTATION_TAG = 274


def _parse_tiff(data: bytes) -> Header:
    tags = _read_tags(data)
    orientation = _clamp_orientation(tags.get(_ORIENTATION_TAG, 1))
    return Header("tiff", tags.get(_WIDTH_TAG, 0), tags.get(_HEIGHT_TAG, 0), orientation)


def _read_tags(data: bytes) -> dict[int, int]:
    """Read the short and long values of a TIFF structure's first directory, by tag."""
    # II is little-endian, MM is big-endian. The first directory starts at the offset in bytes 4 to 7.
    byte_order = "<" if data[:2] == b"II" else ">"
    start = struct.unpack_from(byte_order + "I", data, 4)[0]
    count = struct.unpack_from(byte_order + "H", data, start)[0]
    tags: dict[int, int] = {}
    # An entry is 12 bytes: tag (2), kind (2), count (4), value (4). A short value (kind 3) fills the first two.
    for offset in range(start + 2, min(start + 2 + 12 * count, len(data) - 11), 12):
        tag, kind, _ = struct.unpack_from(byte_order + "HHI", data, offset)
        value = struct.unpack_from(byte_order + ("H" if kind == 3 else "I"), data, offset + 8)[0]
        tags.setdefault(tag, value)  # decoders take the first of two entries
    return tags


def _read_exif_orientation(data: bytes) -> int:
    if data[:2] not in (b"II", b"MM"):
        return 1
    try:
        return _clamp_orientation(_read_tags(data).get(_ORIENTATION_TAG, 1))
    except struct.error:
        return 1


def _clamp_orientation(orientation: int) -> int:
    return orientation if 1 <= orientation <= 8 else 1


# AVIF

# `ispe` is always a box of 20 bytes, version and flags zero, so a plain search finds it.
_ISPE = re.compile(re.escape(b"\0\0\0\x14ispe\0\0\0\0"))
_AVIF_BRANDS = (b"avif", b"avis")


def _is_avif(data: bytes) -> bool:
    # The brands are in the first box. Its claimed size may be huge, so only the first bytes count.
    brands = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
    has_brand = any(brands[start : start + 4] in _AVIF_BRANDS for start in range(0, len(brands), 4))
    return data[4:8] == b"ftyp" and has_brand


def _parse_avif(data: bytes) -> Header:
    # Every item has a size box, tiles and thumbnails too. The largest is that of the image.
    boxes = islice(_ISPE.finditer(data), _MAX_SEGMENTS)
    sizes = [struct.unpack_from(">II", data, box.end()) for box in boxes]
    if not sizes:
        raise HeaderError("avif without a size")
    return Header("avif", *max(sizes, key=lambda size: size[0] * size[1]))


# JPEG 2000


def _parse_jp2(data: bytes) -> Header:
    """Read the size in the code stream, which decoders use; the one in the box `ihdr` before it may differ."""
    start = 0
    # Walk the boxes up to the code stream. A size below 8 is damaged, or says "to the end of the file".
    for _ in range(_MAX_SEGMENTS):
        size, kind = struct.unpack_from(">I4s", data, start)
        content = start + 8
        if size == 1:  # a 64-bit size follows
            size = struct.unpack_from(">Q", data, content)[0]
            content += 8
        if kind == b"jp2c" or size < 8:
            break
        start += size
    if kind != b"jp2c" or data[content : content + 4] != b"\xff\x4f\xff\x51":
        raise HeaderError("jpeg 2000 without a code stream")
    # The image is the area from the offset (left, top) to the far corner of the reference grid.
    right, bottom, left, top = struct.unpack_from(">IIII", data, content + 8)
    return Header("jp2", right - left, bottom - top)


# Netpbm

# A comment ends at a carriage return too: what decoders read after one must not be hidden from this parser.
_PNM = re.compile(rb"P[1-6](?:\s|#[^\r\n]*[\r\n])+(\d{1,9})(?:\s|#[^\r\n]*[\r\n])+(\d{1,9})\s")


def _parse_pnm(data: bytes) -> Header:
    match = _PNM.match(data[:1024])
    if not match:
        raise HeaderError("netpbm header cannot be read")
    return Header("pnm", int(match[1]), int(match[2]))


# How each format is recognised, and how its header is parsed.
_FORMATS: tuple[tuple[Callable[[bytes], bool], Callable[[bytes], Header]], ...] = (
    (lambda d: d[:3] == b"\xff\xd8\xff", _parse_jpeg),
    (lambda d: d[:8] == b"\x89PNG\r\n\x1a\n", _parse_png),
    (lambda d: d[:4] == b"RIFF" and d[8:12] == b"WEBP", _parse_webp),
    (lambda d: d[:6] in (b"GIF87a", b"GIF89a"), _parse_gif),
    (lambda d: d[:4] in (b"II*\0", b"MM\0*"), _parse_tiff),
    (lambda d: d[:2] == b"BM" and len(d) >= 26, _parse_bmp),
    (_is_avif, _parse_avif),
    (lambda d: d[4:8] == b"jP  ", _parse_jp2),
    (lambda d: d[:1] == b"P" and d[1:2] in (b"1", b"2", b"3", b"4", b"5", b"6") and d[2:3].isspace(), _parse_pnm),
)
