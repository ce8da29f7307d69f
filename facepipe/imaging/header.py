"""What an image file says of itself in its first bytes: format, stored size and EXIF orientation.

Read before any pixel is decoded, so that memory is only spent on images of an acceptable size. The format is told by
content, never by name. Layouts: JPEG (ITU T.81 B.2), EXIF 2.3 (4.6), PNG (RFC 2083), GIF89a, BMP, WebP (RFC 9649),
TIFF 6.0 (section 2), ISO BMFF `ispe` (AVIF), JPEG 2000 `ihdr`, Netpbm.
"""

import re
import struct
from collections.abc import Callable
from typing import NamedTuple


class Header(NamedTuple):
    """Stored width and height in pixels, before the EXIF orientation (1-8) is applied."""

    format: str
    width: int
    height: int
    orientation: int = 1

    @property
    def oriented(self) -> tuple[int, int]:
        """(width, height) as seen."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


class HeaderError(ValueError):
    """No image of a known format, or a header that ends early."""


def probe(data: bytes) -> Header:
    """The header of an encoded image. Raises HeaderError with a short reason."""
    if not data:
        raise HeaderError("empty file")
    for matches, parse in _FORMATS:
        if matches(data):
            try:
                header = parse(data)
            except (struct.error, IndexError) as error:
                raise HeaderError("header ends early") from error
            if header.width <= 0 or header.height <= 0:
                raise HeaderError(f"{header.format} of size {header.width}x{header.height}")
            return header
    raise HeaderError(f"no known image format (starts with {data[:8].hex(' ')})")


_SOF = frozenset({0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF})
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD9)})


def _jpeg(data: bytes) -> Header:
    at, orientation = 2, None
    while at < len(data):
        if data[at] != 0xFF:
            at = data.find(b"\xff", at)  # decoders skip garbage between segments too
            if at < 0:
                break
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker in _STANDALONE or marker == 0x00:
            at += 2
        elif marker in _SOF:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return Header("jpeg", width, height, orientation or 1)
        elif marker in (0xD9, 0xDA):
            break
        else:
            size = int.from_bytes(data[at + 2 : at + 4], "big")
            if orientation is None and marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
                orientation = _exif_orientation(data[at + 10 : at + 2 + size])
            at += 2 + max(size, 2)
    raise HeaderError("jpeg without a frame header")


def _png(data: bytes) -> Header:
    width, height = struct.unpack_from(">II", data, 16)
    at, orientation = 8, 1
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"eXIf":
            orientation = _exif_orientation(data[at + 8 : at + 8 + size])
        if kind in (b"eXIf", b"IEND"):
            break
        at += 12 + size
    return Header("png", width, height, orientation)


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
    while at + 8 <= len(data):
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
    sizes = [struct.unpack_from(">II", data, box.end()) for box in _ISPE.finditer(data)]
    if not sizes:
        raise HeaderError("avif without a size")
    return Header("avif", *max(sizes, key=lambda size: size[0] * size[1]))


def _jp2(data: bytes) -> Header:
    at = data.find(b"ihdr")
    if at < 0:
        raise HeaderError("jpeg 2000 without a size")
    height, width = struct.unpack_from(">II", data, at + 4)
    return Header("jp2", width, height)


_PNM = re.compile(rb"P[1-6](?:\s|#[^\n]*\n)+(\d{1,9})(?:\s|#[^\n]*\n)+(\d{1,9})\s")


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
