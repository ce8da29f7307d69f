"""Decode image files to RGB pixels of eight bits per channel, at full size or at 1/2, 1/4 or 1/8 of it.

The orientation is applied here, once. What a decoder would apply by itself is switched off, or set to 1 in the bytes.
"""

from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import cv2
import numpy as np

from facepipe.imaging import isobmff, repair
from facepipe.imaging.header import Header, strip_animation
from facepipe.imaging.optional_codecs import MissingCodecError, decode_by_extra
from facepipe.imaging.pillow_decoder import UnsupportedError, decode_by_pillow
from facepipe.types import UInt8Image

# IMREAD_REDUCED_COLOR_2 is 16 plus "colour, BGR". Beside IMREAD_COLOR_RGB only the 16 may be set.
_FLAGS = {
    1: cv2.IMREAD_COLOR_RGB,
    2: 16 | cv2.IMREAD_COLOR_RGB,
    4: 32 | cv2.IMREAD_COLOR_RGB,
    8: 64 | cv2.IMREAD_COLOR_RGB,
}
_BY_PILLOW = frozenset({"avif", "bmp", "gif", "tiff"})
_BY_EXTRA = frozenset({"heic", "jxl"})

# EXIF orientations that are pure rotations; `orient` flips for the others.
_ROTATIONS: dict[int, Any] = {3: cv2.ROTATE_180, 6: cv2.ROTATE_90_CLOCKWISE, 8: cv2.ROTATE_90_COUNTERCLOCKWISE}


# Change this if other files than before are read.
_VERSION = 2


@cache
def describe_decoders() -> str:
    """Describe what decodes images: our own version, and those of the libraries. A failed image remembers it."""
    parts = [f"decoder {_VERSION}", f"opencv {cv2.__version__}"]
    for package in ("pillow", "pi-heif", "pylibjxl"):
        with suppress(PackageNotFoundError):
            parts.append(f"{package} {version(package)}")
    return ", ".join(parts)


class DecodeError(ValueError):
    """The decoder cannot read pixels from the bytes."""


def decode(data: bytes, header: Header, reduce: int = 1) -> UInt8Image:
    """Decode an image and apply its orientation.

    A reduced JPEG comes from the DCT directly (libjpeg's scaled IDCT); other formats are shrunk by area. Alpha is
    dropped, grey and CMYK become RGB, 16 bits become 8, and an animation gives its first frame. A file that lacks only
    its last bytes is read; one that lacks rows is not.

    Args:
        data: The file's bytes.
        header: Its header, from `read_header`.
        reduce: 1, 2, 4 or 8: divides both sides, rounding up.

    Returns:
        (h, w, 3) RGB.

    Raises:
        DecodeError: The bytes are damaged or not supported, or the image has another size than the header says.
    """
    pixels = _decode_or_complete(data, header, reduce)
    # JPEG alone is reduced while it is decoded; its size is then not the header's.
    is_reduced_by_decoder = reduce > 1 and header.format == "jpeg"
    stored_size = (header.width, header.height)
    if not is_reduced_by_decoder and pixels.shape[1::-1] != stored_size:
        raise DecodeError(f"{header.format}: the header says {stored_size}, the image is {pixels.shape[1::-1]}")
    if reduce > 1 and not is_reduced_by_decoder:
        # Round both sides up, as libjpeg does.
        size = (-(-pixels.shape[1] // reduce), -(-pixels.shape[0] // reduce))
        pixels = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
    return orient(pixels, header.orientation)


def _decode_or_complete(data: bytes, header: Header, reduce: int) -> UInt8Image:
    """Decode the pixels as they are stored, of the completed file if the file lacks its last bytes."""
    # OpenCV fills as many gigabytes as a chunk of a PNG claims before it finds the file too short.
    is_cut = header.format == "png" and repair.is_truncated_png(data)
    if is_cut:
        error = DecodeError("png is truncated: a chunk reaches past its end")
    else:
        try:
            return _decode_stored(data, header, reduce)
        except DecodeError as reason:
            error = reason
    completed = repair.complete_file(data, header)
    if completed is None:
        raise error
    try:
        pixels = _decode_stored(completed, header, reduce)
    except DecodeError:
        raise error from None
    if header.format == "jpeg" and _lacks_rows(completed, pixels, header, reduce):
        raise error
    return pixels


def _lacks_rows(data: bytes, pixels: UInt8Image, header: Header, reduce: int) -> bool:
    """Tell whether half of the last row of a completed JPEG's units, or more, was never coded.

    libjpeg leaves out what it has no data for. A progressive JPEG then shows what earlier scans gave it; any other
    shows one colour.
    """
    unit = max(1, repair.measure_unit_height(data) // reduce)
    # The last row of units may be cut off by the height. Its upper half takes colour from the row above.
    rows = max(1, (unit - (-pixels.shape[0] % unit)) // 2)
    left = min(pixels.shape[1] // 2 + unit, pixels.shape[1] - 1)
    last_scan = repair.find_last_scan_data(data)
    if last_scan is None:
        return bool((pixels[-rows:, left:] == pixels[-1, -1]).all())
    before = _decode_stored(data[:last_scan] + data[-2:], header, reduce)
    return bool((pixels[-rows:, left:] == before[-rows:, left:]).all())


def _decode_stored(data: bytes, header: Header, reduce: int) -> UInt8Image:
    """Decode the pixels as they are stored; only JPEG is reduced here."""
    try:
        pixels = _run_decoder(data, header, reduce)
    except MissingCodecError as error:
        raise DecodeError(str(error)) from error
    except UnsupportedError as error:
        raise DecodeError(f"unsupported: {header.format} of {error}") from error
    except Exception as error:  # what decoders raise for damaged files is not defined
        lines = str(error).splitlines() or [type(error).__name__]
        raise DecodeError(f"{header.format}: {lines[0][:120]}") from error
    if pixels is None:
        raise DecodeError(f"{header.format} is truncated or corrupt")
    return np.asarray(pixels, np.uint8)


def _run_decoder(data: bytes, header: Header, reduce: int) -> UInt8Image | None:
    """Run the decoder of a format; None if OpenCV cannot read the bytes."""
    size = (header.width, header.height)
    if header.format in _BY_EXTRA:
        return decode_by_extra(data, header.format, size)
    if header.format in _BY_PILLOW:
        if header.format == "tiff":
            data = repair.undo_tiff_orientation(data)
        elif header.format == "avif":
            data = isobmff.hide_metadata(data)
        return decode_by_pillow(data, header.format, size)
    # `acTL` before the pixels marks an animation; only its still image is decoded.
    if header.format == "png" and data.find(b"acTL", 0, data.find(b"IDAT")) > 0:
        data = strip_animation(data)
    flags = _FLAGS[reduce if header.format == "jpeg" else 1] | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if pixels is None and header.format == "jp2":
        # OpenCV reads 8 bits per channel, all of one size.
        return decode_by_pillow(data, header.format, size)
    return None if pixels is None else np.asarray(pixels, np.uint8)


def orient(pixels: UInt8Image, orientation: int) -> UInt8Image:
    """Apply an EXIF orientation (1 to 8) to stored pixels."""
    if orientation in _ROTATIONS:
        return np.asarray(cv2.rotate(pixels, _ROTATIONS[orientation]), np.uint8)
    match orientation:
        case 2:
            return np.ascontiguousarray(pixels[:, ::-1])
        case 4:
            return np.ascontiguousarray(pixels[::-1])
        case 5:
            return np.ascontiguousarray(pixels.transpose(1, 0, 2))
        case 7:
            return np.ascontiguousarray(pixels[::-1, ::-1].transpose(1, 0, 2))
        case _:
            return pixels
