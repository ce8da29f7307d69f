"""Encoded bytes to RGB pixels: oriented, eight bits a channel, at full size or at 1/2, 1/4 or 1/8 of it."""

import os
from typing import Any

import numpy as np

# A second lock behind the header check; OpenCV reads it once, when it is imported.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(1 << 28))
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")

import cv2

from facepipe.imaging.header import Header, strip_animation
from facepipe.types import UInt8Image

_REDUCED = {
    1: cv2.IMREAD_COLOR_RGB,
    2: 16 | cv2.IMREAD_COLOR_RGB,
    4: 32 | cv2.IMREAD_COLOR_RGB,
    8: 64 | cv2.IMREAD_COLOR_RGB,
}
# IMREAD_REDUCED_COLOR_2 is 16 plus "colour, BGR"; beside IMREAD_COLOR_RGB only the 16 may be set.

_TURNS: dict[int, Any] = {3: cv2.ROTATE_180, 6: cv2.ROTATE_90_CLOCKWISE, 8: cv2.ROTATE_90_COUNTERCLOCKWISE}


class DecodeError(ValueError):
    """The decoder could not make pixels of the bytes."""


def decode(data: bytes, header: Header, reduce: int = 1) -> UInt8Image:
    """(h, w, 3) uint8 RGB, EXIF orientation applied; `reduce` in 1, 2, 4, 8 divides both sides, rounding up.

    For JPEG a reduced image comes from the DCT directly (libjpeg's scaled IDCT); other formats are shrunk by area.
    Alpha is dropped, grey and CMYK become RGB, 16 bits become 8, an animation gives its first frame.
    """
    try:
        if header.format == "png" and data.find(b"acTL", 0, data.find(b"IDAT")) > 0:
            data = strip_animation(data)
        flags = _REDUCED[reduce if header.format == "jpeg" else 1] | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except (cv2.error, MemoryError) as error:
        raise DecodeError(f"{header.format}: {str(error).splitlines()[0][:120]}") from error
    if pixels is None:
        raise DecodeError(f"{header.format} is truncated or corrupt")
    seen = header.oriented_size if header.format == "tiff" else (header.width, header.height)
    if (reduce == 1 or header.format != "jpeg") and pixels.shape[1::-1] != seen:
        raise DecodeError(f"{header.format}: the header says {seen}, the image is {pixels.shape[1::-1]}")
    if reduce > 1 and header.format != "jpeg":
        size = (-(-pixels.shape[1] // reduce), -(-pixels.shape[0] // reduce))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    oriented = header.format == "tiff"  # OpenCV's TIFF reader turns the image whatever the flags say
    return np.asarray(pixels, np.uint8) if oriented else orient(np.asarray(pixels, np.uint8), header.orientation)


def orient(pixels: UInt8Image, orientation: int) -> UInt8Image:
    """Apply an EXIF orientation (1-8) to stored pixels."""
    if orientation in _TURNS:
        return np.asarray(cv2.rotate(pixels, _TURNS[orientation]), np.uint8)
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
