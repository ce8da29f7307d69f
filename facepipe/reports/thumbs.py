"""Pictures of faces, reduced to a size that a page can hold."""

import cv2
import numpy as np

from facepipe.imaging.header import HeaderError, read_header

WIDTH = 72
# Quality of the encoding, and the most pixels that are decoded.
_QUALITY = 70
_MAX_PIXELS = 1 << 20


def shrink(jpeg: bytes) -> bytes | None:
    """Encode a picture again as a JPEG of at most WIDTH pixels.

    Every picture is encoded again, so that only pixels get from a gallery into a page.

    Returns:
        The JPEG, or None if the bytes are not a small JPEG.
    """
    return recode(jpeg, WIDTH)


def recode(jpeg: bytes, max_width: int = 1024) -> bytes | None:
    """Encode a picture again as a JPEG of at most some width in pixels.

    Returns:
        The JPEG, or None if the bytes are not a small JPEG.
    """
    # Refuse large pictures by their header, before memory is taken for their pixels.
    if not _is_small_jpeg(jpeg):
        return None
    try:
        image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        return None
    if image is None:
        return None
    height, width = image.shape[:2]
    # Larger pictures are reduced; smaller ones keep their size.
    if width > max_width:
        size = (max_width, max(1, round(max_width * height / width)))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])[1])


def _is_small_jpeg(data: bytes) -> bool:
    if not data.startswith(b"\xff\xd8\xff"):
        return False
    try:
        header = read_header(data)
    except HeaderError:
        return False
    return 0 < header.width * header.height <= _MAX_PIXELS
