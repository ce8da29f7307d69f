"""Decode image files to RGB pixels of eight bits per channel, at full size or at 1/2, 1/4 or 1/8 of it."""

import os
from typing import Any

import numpy as np

# OpenCV reads both variables once, when it is imported. The pixel limit backs up the check of the header.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(1 << 28))
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")

import cv2

from facepipe.imaging.header import Header, strip_animation
from facepipe.types import UInt8Image

# IMREAD_REDUCED_COLOR_2 is 16 plus "colour, BGR". Beside IMREAD_COLOR_RGB only the 16 may be set.
_FLAGS = {
    1: cv2.IMREAD_COLOR_RGB,
    2: 16 | cv2.IMREAD_COLOR_RGB,
    4: 32 | cv2.IMREAD_COLOR_RGB,
    8: 64 | cv2.IMREAD_COLOR_RGB,
}

# EXIF orientations that are pure rotations; `orient` flips for the others.
_ROTATIONS: dict[int, Any] = {3: cv2.ROTATE_180, 6: cv2.ROTATE_90_CLOCKWISE, 8: cv2.ROTATE_90_COUNTERCLOCKWISE}


class DecodeError(ValueError):
    """The decoder cannot read pixels from the bytes."""


def decode(data: bytes, header: Header, reduce: int = 1) -> UInt8Image:
    """Decode an image and apply its EXIF orientation.

    A reduced JPEG comes from the DCT directly (libjpeg's scaled IDCT); other formats are shrunk by area. Alpha is
    dropped, grey and CMYK become RGB, 16 bits become 8, and an animation gives its first frame.

    Args:
        data: The file's bytes.
        header: Its header, from `read_header`.
        reduce: 1, 2, 4 or 8: divides both sides, rounding up.

    Returns:
        (h, w, 3) RGB.

    Raises:
        DecodeError: The bytes are damaged, or the image has another size than the header says.
    """
    pixels = _decode_stored(data, header, reduce)
    # OpenCV's TIFF reader turns the image whatever the flags say.
    is_oriented = header.format == "tiff"
    # JPEG alone is reduced while it is decoded; its size is then not the header's.
    is_reduced_by_decoder = reduce > 1 and header.format == "jpeg"
    expected_size = header.oriented_size if is_oriented else (header.width, header.height)
    if not is_reduced_by_decoder and pixels.shape[1::-1] != expected_size:
        raise DecodeError(f"{header.format}: the header says {expected_size}, the image is {pixels.shape[1::-1]}")
    if reduce > 1 and not is_reduced_by_decoder:
        # Round both sides up, as libjpeg does.
        size = (-(-pixels.shape[1] // reduce), -(-pixels.shape[0] // reduce))
        pixels = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
    return pixels if is_oriented else orient(pixels, header.orientation)


def _decode_stored(data: bytes, header: Header, reduce: int) -> UInt8Image:
    """Decode the pixels as they are stored; only JPEG is reduced here."""
    try:
        # `acTL` before the pixels marks an animation; only its still image is decoded.
        if header.format == "png" and data.find(b"acTL", 0, data.find(b"IDAT")) > 0:
            data = strip_animation(data)
        flags = _FLAGS[reduce if header.format == "jpeg" else 1] | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except (cv2.error, MemoryError) as error:
        raise DecodeError(f"{header.format}: {str(error).splitlines()[0][:120]}") from error
    if pixels is None:
        raise DecodeError(f"{header.format} is truncated or corrupt")
    return np.asarray(pixels, np.uint8)


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
