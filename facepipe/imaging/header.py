"""What an image file says of itself in its first bytes: format, stored size and EXIF orientation.

Read before any pixel is decoded, so that memory is only spent on images of an acceptable size. The format is told by
content, never by name. Layouts: JPEG (ITU T.81 B.2), EXIF 2.3 (4.6), PNG (RFC 2083), GIF89a, BMP, WebP (RFC 9649),
TIFF 6.0 (section 2), ISO BMFF `ispe` (AVIF), JPEG 2000 `ihdr`, Netpbm.
"""

import re
import struct
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple


class Header(NamedTuple):
    """Stored width and height in pixels, before the EXIF orientation (1-8) is applied.

    scans: how often a decoder goes over the whole picture (progressive JPEG)
    """

    format: str
    width: int
    height: int
    orientation: int = 1
    scans: int = 1

    @property
    def oriented_size(self) -> tuple[int, int]:
        """(width, height) as seen."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


class HeaderError(ValueError):
    """No image of a known format, or a header that ends early."""


def read_header(data: bytes) -> Header:
    """The header of an encoded image. Raises HeaderError with a short reason."""
    if not data:
        raise HeaderError("empty file")
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


_SOF = frozenset({0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF})
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
# Garbage, fill bytes, coded data (where FF is followed by 00) and markers without a segment are passed over.
_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd8]")
# Far more than cameras and editors write; a file of empty segments would else keep Python busy for minutes.
_MAX_SEGMENTS = 1 << 16


def _segments(data: bytes, at: int = 2) -> Iterator[tuple[int, int]]:
    """(marker, offset) of a JPEG's segments up to the image's end."""
    for _ in range(_MAX_SEGMENTS):
        found = _MARKER.search(data, at)
        if not found or data[found.start() + 1] == 0xD9:
            return
        at = found.start()
        yield data[at + 1], at
        at += 2 + max(int.from_bytes(data[at + 2 : at + 4], "big"), 2)
    raise HeaderError(f"jpeg of more than {_MAX_SEGMENTS} segments")


def _jpeg(data: bytes) -> Header:
    orientation = None
    for marker, at in _segments(data):
        if marker in _SOF:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return Header("jpeg", width, height, orientation or 1, _scans(data, at))
        if marker == 0xDA:
            break
        if orientation is None and marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            size = int.from_bytes(data[at + 2 : at + 4], "big")
            orientation = _exif_orientation(data[at + 10 : at + 2 + size])
    raise HeaderError("jpeg without a frame header")


def _scans(data: bytes, frame: int) -> int:
    """Passes over the picture from its frame header on; 1 without a look at the rest where decoders make only one."""
    scans = 0
    for marker, at in _segments(data, frame):
        if marker == 0xDA:
            scans += 1
            if scans == 1 and data[frame + 1] not in _PROGRESSIVE and data[at + 4] >= data[frame + 9]:
                return 1
    return max(scans, 1)


def _png(data: bytes) -> Header:
    width, height = struct.unpack_from(">II", data, 16)
    orientation = None
    for kind, at, end in _chunks(data):
        if kind == b"eXIf" and orientation is None:
            orientation = _exif_orientation(data[at + 8 : end - 4])
    return Header("png", width, height, orientation or 1)


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of a PNG's chunks up to its last."""
    at, kind = 8, b""
    for _ in range(_MAX_SEGMENTS):
        size, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + size
        if end > len(data):
            # OpenCV fills as many gigabytes as a chunk claims before it finds the file too short.
            raise HeaderError("png is truncated: a chunk reaches past its end")
        yield kind, at, end
        if kind == b"IEND":
            return
        at = end
    raise HeaderError(f"png of more than {_MAX_SEGMENTS} chunks")


def strip_animation(data: bytes) -> bytes:
    """A PNG's still picture alone: where an animation is damaged, OpenCV may return memory that it never wrote to."""
    kept = [data[at:end] for kind, at, end in _chunks(data) if kind not in (b"acTL", b"fcTL", b"fdAT")]
    return data[:8] + b"".join(kept)


def _gif(data: bytes) -> Header:
    return Header("gif", *struct.unpack_from("<HH", data, 6))


def _bmp(data: bytes) -> Header:
    if struct.unpack_from("<I", data, 14)[0] == 12:
        return Header("bmp", *struct.unpack_from("<HH", data, 18))
    width, height = struct.unpack_from("<ii", data, 18)
    return Header("bmp", width, abs(height))


def _webp(data: bytes) -> Header:
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return Header("webp", width & 0x3FFF, height & 0x3FFF)
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return Header("webp", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if kind != b"VP8X":
        raise HeaderError("webp without a known frame")
    width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    return Header("webp", width, height, _webp_orientation(data))


def _webp_orientation(data: bytes) -> int:
    at = 12
    for _ in range(_MAX_SEGMENTS):
        if at + 8 > len(data):
            break
        kind, size = data[at : at + 4], struct.unpack_from("<I", data, at + 4)[0]
        if kind == b"EXIF":
            return _exif_orientation(data[at + 8 : at + 8 + size].removeprefix(b"Exif\0\0"))
        at += 8 + size + (size & 1)
    return 1


def _tiff(data: bytes) -> Header:
    tags = _ifd(data)
    return Header("tiff", tags.get(256, 0), tags.get(257, 0), _valid(tags.get(274, 1)))


def _ifd(data: bytes) -> dict[int, int]:
    """Short and long values of a TIFF structure's first directory, by tag."""
    order = "<" if data[:2] == b"II" else ">"
    start = struct.unpack_from(order + "I", data, 4)[0]
    count = struct.unpack_from(order + "H", data, start)[0]
    tags: dict[int, int] = {}
    for at in range(start + 2, min(start + 2 + 12 * count, len(data) - 11), 12):
        tag, kind, _ = struct.unpack_from(order + "HHI", data, at)
        value = struct.unpack_from(order + ("H" if kind == 3 else "I"), data, at + 8)[0]
        tags.setdefault(tag, value)  # decoders take the first of two entries
    return tags


def _exif_orientation(data: bytes) -> int:
    try:
        return _valid(_ifd(data).get(274, 1)) if data[:2] in (b"II", b"MM") else 1
    except struct.error:
        return 1


def _valid(orientation: int) -> int:
    return orientation if 1 <= orientation <= 8 else 1


_ISPE = re.compile(re.escape(b"\0\0\0\x14ispe\0\0\0\0"))
_AVIF_BRANDS = (b"avif", b"avis")


def _is_avif(data: bytes) -> bool:
    brands = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
    return data[4:8] == b"ftyp" and any(brands[at : at + 4] in _AVIF_BRANDS for at in range(0, len(brands), 4))


def _avif(data: bytes) -> Header:
    # Every item has a size box, tiles and thumbnails too; the picture's is the largest.
    boxes = islice(_ISPE.finditer(data), _MAX_SEGMENTS)
    sizes = [struct.unpack_from(">II", data, box.end()) for box in boxes]
    if not sizes:
        raise HeaderError("avif without a size")
    return Header("avif", *max(sizes, key=lambda size: size[0] * size[1]))


def _jp2(data: bytes) -> Header:
    """The size in the code stream, which decoders go by; the one in the box `ihdr` before it may say anything."""
    at = 0
    for _ in range(_MAX_SEGMENTS):
        size, kind = struct.unpack_from(">I4s", data, at)
        inside = at + 8
        if size == 1:
            size, inside = struct.unpack_from(">Q", data, inside)[0], inside + 8
        if kind == b"jp2c" or size < 8:
            break
        at += size
    if kind != b"jp2c" or data[inside : inside + 4] != b"\xff\x4f\xff\x51":
        raise HeaderError("jpeg 2000 without a code stream")
    right, bottom, left, top = struct.unpack_from(">IIII", data, inside + 8)
    return Header("jp2", right - left, bottom - top)


# A comment ends at a carriage return too: what decoders read behind one must not be hidden from us.
_PNM = re.compile(rb"P[1-6](?:\s|#[^\r\n]*[\r\n])+(\d{1,9})(?:\s|#[^\r\n]*[\r\n])+(\d{1,9})\s")


def _pnm(data: bytes) -> Header:
    found = _PNM.match(data[:1024])
    if not found:
        raise HeaderError("netpbm header cannot be read")
    return Header("pnm", int(found[1]), int(found[2]))


_FORMATS: tuple[tuple[Callable[[bytes], bool], Callable[[bytes], Header]], ...] = (
    (lambda d: d[:3] == b"\xff\xd8\xff", _jpeg),
    (lambda d: d[:8] == b"\x89PNG\r\n\x1a\n", _png),
    (lambda d: d[:4] == b"RIFF" and d[8:12] == b"WEBP", _webp),
    (lambda d: d[:6] in (b"GIF87a", b"GIF89a"), _gif),
    (lambda d: d[:4] in (b"II*\0", b"MM\0*"), _tiff),
    (lambda d: d[:2] == b"BM" and len(d) >= 26, _bmp),
    (_is_avif, _avif),
    (lambda d: d[4:8] == b"jP  ", _jp2),
    (lambda d: d[:1] == b"P" and d[1:2] in (b"1", b"2", b"3", b"4", b"5", b"6") and d[2:3].isspace(), _pnm),
)
