"""Read what an image file says about itself in its first bytes: format, stored size and EXIF orientation.

The header is read before any pixel is decoded, so that memory is only spent on images of an acceptable size. The format
is detected from the content, never from the name. Layouts: JPEG (ITU T.81 B.2), EXIF 2.3 (4.6), PNG (RFC 2083), GIF89a,
BMP, WebP (RFC 9649), TIFF 6.0 (section 2) and BigTIFF, ISO BMFF (AVIF, HEIC), JPEG XL (ISO 18181), JPEG 2000 `ihdr`,
Netpbm.

What turns a picture differs by container: EXIF in JPEG, PNG, WebP and TIFF, the item's own properties in AVIF, whose
EXIF is ignored. Decoders of HEIC and JPEG XL turn by themselves, so that their headers have the size as it is seen.
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from facepipe.imaging.isobmff import list_brands, read_picture
from facepipe.imaging.signatures import name_unsupported


class Header(NamedTuple):
    """What an image file says about itself.

    Attributes:
        format: Lower-case name of the format.
        width: Stored width in pixels, before the orientation is applied.
        height: Stored height in pixels.
        orientation: EXIF orientation, 1 to 8, or what does the same in this container.
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
    """The bytes are not an image of a format that is read, or the header is damaged."""


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
    name = name_unsupported(data)
    if name:
        raise HeaderError(f"unsupported: {name}")
    raise HeaderError(f"no known image format (starts with {data[:8].hex(' ')})")


# JPEG

# Start-of-frame markers, which hold the size: C0 to CF without C4, C8 and CC, which mean something else.
_SOF = frozenset({0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF})
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
# Skips garbage, fill bytes, coded data (where 00 follows FF) and markers without a segment.
_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd8]")
# Far more than cameras and editors write. A file of empty segments would keep Python busy for minutes otherwise.
_MAX_SEGMENTS = 1 << 16
# Bytes of a PNG's raw profile, as text: EXIF is at most 64 KB.
_MAX_PROFILE = 1 << 18


def find_segments(data: bytes, start: int = 2) -> Iterator[tuple[int, int]]:
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
    frame = None
    for marker, offset in find_segments(data):
        if marker in _SOF and frame is None:
            frame = offset
        # Pixels begin at DA; a frame header after them would be too late.
        if marker == 0xDA:
            break
        # Take the first EXIF segment, which may come after the frame header: decoders ignore later ones.
        if orientation is None and marker == 0xE1 and data[offset + 4 : offset + 10] == b"Exif\0\0":
            size = int.from_bytes(data[offset + 2 : offset + 4], "big")
            orientation = _read_exif_orientation(data[offset + 10 : offset + 2 + size])
    if frame is None:
        raise HeaderError("jpeg without a frame header")
    # Frame header: marker (2), size (2), precision (1), then height and width.
    height, width = struct.unpack_from(">HH", data, frame + 5)
    return Header("jpeg", width, height, orientation or 1, _count_scans(data, frame))


def _count_scans(data: bytes, frame_offset: int) -> int:
    """Count the passes over the image, from its frame header on.

    Returns 1 without reading the rest of the file if decoders make only one pass: the image is not progressive and its
    first scan holds all components.
    """
    scans = 0
    for marker, offset in find_segments(data, frame_offset):
        # A scan starts at DA.
        if marker == 0xDA:
            scans += 1
            is_progressive = data[frame_offset + 1] in _PROGRESSIVE
            # Compare the components of the scan with those of the frame: all in one scan means one pass.
            if scans == 1 and not is_progressive and data[offset + 4] >= data[frame_offset + 9]:
                return 1
    return max(scans, 1)


# PNG

_TEXTS = (b"zTXt", b"tEXt", b"iTXt")


def _parse_png(data: bytes) -> Header:
    width, height = struct.unpack_from(">II", data, 16)
    # EXIF may come after the pixels, so read all chunks.
    orientation = None
    profile_orientation = None
    for kind, start, end in find_chunks(data):
        content = data[start + 8 : end - 4]
        if kind == b"eXIf" and orientation is None:
            orientation = _read_exif_orientation(content.removeprefix(b"Exif\0\0"))
        elif (
            kind in (b"zTXt", b"tEXt", b"iTXt") and content.startswith(b"Raw profile type ") and not profile_orientation
        ):
            profile_orientation = _read_raw_profile_orientation(kind, content)
    return Header("png", width, height, orientation or profile_orientation or 1)


def find_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, start, end) of each chunk of a PNG up to its last. The end of a truncated one is past the data."""
    start = 8
    for _ in range(_MAX_SEGMENTS):
        if start + 8 > len(data):
            return
        size, kind = struct.unpack_from(">I4s", data, start)
        # A chunk is size (4), kind (4), content and checksum (4).
        end = start + 12 + size
        yield kind, start, end
        if kind == b"IEND" or end > len(data):
            return
        start = end
    raise HeaderError(f"png of more than {_MAX_SEGMENTS} chunks")


def _read_raw_profile_orientation(kind: bytes, content: bytes) -> int | None:
    """Read the orientation in a text that ImageMagick writes: EXIF as hexadecimal digits, after a name and a length."""
    name, _, text = content.partition(b"\0")
    if name not in (b"Raw profile type exif", b"Raw profile type APP1"):
        return None
    try:
        if kind == b"iTXt":  # whether it is compressed, how, then a language and a translated name
            is_compressed = text[:1] == b"\1"
            text = text[2:].split(b"\0", 2)[2]
        else:
            is_compressed = kind == b"zTXt"
            text = text[1:] if is_compressed else text
        if is_compressed:
            text = zlib.decompressobj().decompress(text, _MAX_PROFILE)
        # "\nexif\n      72\n4578..."
        digits = b"".join(text.strip().split(b"\n")[2:])
        exif = bytes.fromhex(digits.decode("ascii"))
    except (ValueError, IndexError, zlib.error):
        return None
    return _read_exif_orientation(exif.removeprefix(b"Exif\0\0"))


def strip_animation(data: bytes) -> bytes:
    """Reduce an animated PNG to its still image.

    If the animation is damaged, OpenCV may return memory that it never wrote to.
    """
    chunks = [data[start:end] for kind, start, end in find_chunks(data) if kind not in (b"acTL", b"fcTL", b"fdAT")]
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
ORIENTATION_TAG = 274


def _parse_tiff(data: bytes) -> Header:
    tags = {tag: value for tag, value, _ in reversed(list(find_tags(data)))}  # decoders take the first of two entries
    orientation = _clamp_orientation(tags.get(ORIENTATION_TAG, 1))
    return Header("tiff", tags.get(_WIDTH_TAG, 0), tags.get(_HEIGHT_TAG, 0), orientation)


def find_tags(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield tag, short or long value, and offset of the value, of each entry in a TIFF structure's first directory."""
    # II is little-endian, MM is big-endian. BigTIFF has version 43, and longer counts and offsets.
    order = "<" if data[:2] == b"II" else ">"
    if struct.unpack_from(order + "H", data, 2)[0] == 43:
        start = struct.unpack_from(order + "Q", data, 8)[0]
        count = struct.unpack_from(order + "Q", data, start)[0]
        first = start + 8
        length = 20
    else:
        start = struct.unpack_from(order + "I", data, 4)[0]
        count = struct.unpack_from(order + "H", data, start)[0]
        first = start + 2
        length = 12
    # An entry is tag (2), kind (2), count (4 or 8) and value (4 or 8). A short value (kind 3) fills the first two.
    last = min(first + length * min(count, _MAX_SEGMENTS), len(data) - length + 1)
    for offset in range(first, last, length):
        tag, kind = struct.unpack_from(order + "HH", data, offset)
        at = offset + length // 2 + 2 if length == 12 else offset + 12
        yield tag, struct.unpack_from(order + ("H" if kind == 3 else "I"), data, at)[0], at


def _read_exif_orientation(data: bytes) -> int:
    if data[:2] not in (b"II", b"MM"):
        return 1
    try:
        values = (value for tag, value, _ in find_tags(data) if tag == ORIENTATION_TAG)
        return _clamp_orientation(next(values, 1))
    except struct.error:
        return 1


def _clamp_orientation(orientation: int) -> int:
    return orientation if 1 <= orientation <= 8 else 1


# AVIF, HEIC

_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")
_HEIF_BRANDS = (b"mif1", b"msf1")
_AVIF_BRANDS = (b"avif", b"avis")
_HEIC_CODECS = (b"hvc1", b"hev1")


def _is_avif(data: bytes) -> bool:
    brands = list_brands(data)
    return any(brand in _AVIF_BRANDS for brand in brands) and brands[0] not in _HEIC_BRANDS


def _is_heic(data: bytes) -> bool:
    brands = list_brands(data)
    return any(brand in _HEIC_BRANDS for brand in brands) or _has_heic_item(data, brands)


def _has_heic_item(data: bytes, brands: list[bytes]) -> bool:
    """Tell whether a file that only says to be HEIF holds a picture of HEIC's codec."""
    if not any(brand in _HEIF_BRANDS for brand in brands):
        return False
    try:
        picture = read_picture(data)
    except (struct.error, IndexError):
        return False
    return picture is not None and picture.codec in _HEIC_CODECS


def _parse_avif(data: bytes) -> Header:
    picture = read_picture(data)
    if picture is None:
        raise HeaderError("avif without a size")
    return Header("avif", picture.width, picture.height, picture.orientation)


def _parse_heic(data: bytes) -> Header:
    picture = read_picture(data)
    if picture is None:
        raise HeaderError("heic without a size")
    # libheif crops and turns the pixels, so the header has the size as it is seen.
    width, height = Header("heic", *picture.clean_size, picture.orientation).oriented_size
    return Header("heic", width, height)


# JPEG XL

_JXL_CONTAINER = b"\0\0\0\x0cJXL \r\n\x87\n"
# Bits of a side, by the two bits before it.
_JXL_SIDE_BITS = (9, 13, 18, 30)
# Width per height, by the three bits of a ratio; 0: the width has its own bits.
_JXL_RATIOS = ((0, 1), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


class _Bits:
    """Bits of a JPEG XL code stream, the lowest first."""

    def __init__(self, data: bytes):
        self._value = int.from_bytes(data, "little")

    def read(self, count: int) -> int:
        value = self._value & ((1 << count) - 1)
        self._value >>= count
        return value


def _parse_jxl(data: bytes) -> Header:
    stream = data
    if data.startswith(_JXL_CONTAINER):
        # The code stream is in one box, or in numbered parts of which the first holds its header.
        match = re.search(rb"jxlc\xff\x0a|jxlp....\xff\x0a", data, re.DOTALL)
        if not match:
            raise HeaderError("jpeg xl without a code stream")
        stream = data[match.end() - 2 :]
    if len(stream) < 16:
        raise HeaderError("header ends early")
    bits = _Bits(stream[2:34])
    is_small = bits.read(1)
    height = _read_jxl_side(bits, is_small)
    ratio = bits.read(3)
    numerator, denominator = _JXL_RATIOS[ratio]
    width = height * numerator // denominator if ratio else _read_jxl_side(bits, is_small)
    # Then the metadata: unless all is default, whether there are extra fields, and the orientation in them.
    orientation = 1
    if not bits.read(1) and bits.read(1):
        orientation = bits.read(3) + 1
    # libjxl turns the pixels, so the header has the size as it is seen.
    width, height = Header("jxl", width, height, orientation).oriented_size
    return Header("jxl", width, height)


def _read_jxl_side(bits: _Bits, is_small: int) -> int:
    return 8 * (bits.read(5) + 1) if is_small else bits.read(_JXL_SIDE_BITS[bits.read(2)]) + 1


# JPEG 2000


_JP2_STREAM = b"\xff\x4f\xff\x51"


def _parse_jp2(data: bytes) -> Header:
    """Read the size in the code stream, which decoders use; the one in the box `ihdr` before it may differ."""
    content = 0 if data.startswith(_JP2_STREAM) else _find_jp2_stream(data)
    # The image is the area from the offset (left, top) to the far corner of the reference grid.
    right, bottom, left, top = struct.unpack_from(">IIII", data, content + 8)
    return Header("jp2", right - left, bottom - top)


def _find_jp2_stream(data: bytes) -> int:
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
    if kind != b"jp2c" or data[content : content + 4] != _JP2_STREAM:
        raise HeaderError("jpeg 2000 without a code stream")
    return content


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
    (lambda d: d[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), _parse_tiff),
    (lambda d: d[:2] == b"BM" and len(d) >= 26, _parse_bmp),
    (_is_avif, _parse_avif),
    (_is_heic, _parse_heic),
    (lambda d: d[:2] == b"\xff\x0a" or d.startswith(_JXL_CONTAINER), _parse_jxl),
    (lambda d: d[4:8] == b"jP  " or d.startswith(_JP2_STREAM), _parse_jp2),
    (lambda d: d[:1] == b"P" and d[1:2] in (b"1", b"2", b"3", b"4", b"5", b"6") and d[2:3].isspace(), _parse_pnm),
)
