"""Pictures of faces, shrunk to what a page can carry."""

import cv2
import numpy as np

from facepipe.imaging.header import HeaderError, read_header

WIDTH = 72
_QUALITY = 70
_MOST_PIXELS = 1 << 20


def shrink(jpeg: bytes) -> bytes | None:
    """The picture as a new JPEG, WIDTH pixels wide at most; None for bytes that are no small JPEG.

    It is always encoded anew, so that nothing but pixels gets from a gallery into a page.
    """
    if not _is_small_jpeg(jpeg):
        return None
    try:
        image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        return None
    if image is None:
        return None
    height, width = image.shape[:2]
    if width > WIDTH:
        image = cv2.resize(image, (WIDTH, max(1, round(WIDTH * height / width))), interpolation=cv2.INTER_AREA)
    return bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])[1])


def _is_small_jpeg(data: bytes) -> bool:
    if not data.startswith(b"\xff\xd8\xff"):
        return False
    try:
        header = read_header(data)
    except HeaderError:
        return False
    return 0 < header.width * header.height <= _MOST_PIXELS
