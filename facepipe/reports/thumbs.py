"""Pictures of faces: fetched from a gallery in one pass, and shrunk to what a page can carry."""

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds

from facepipe.gallery import Gallery
from facepipe.imaging.header import HeaderError, probe

WIDTH = 72
_QUALITY = 70
_MOST_PIXELS = 1 << 20


def thumbnails(gallery: Gallery, face_ids: npt.NDArray[np.int64]) -> dict[int, bytes]:
    """The stored JPEGs of some faces by face id, in one streamed pass; faces without one are absent.

    face_ids: (n,), in any order. Memory grows with n (about 4 kB a face), not with the gallery.
    """
    if not len(face_ids):
        return {}
    wanted = ds.field("face_id").isin(pa.array(np.unique(face_ids), pa.int64())) & ds.field("thumb").is_valid()
    found: dict[int, bytes] = {}
    for batch in gallery.batches(["face_id", "thumb"], wanted):
        found.update(zip(batch["face_id"].to_pylist(), batch["thumb"].to_pylist(), strict=True))
    return found


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
        header = probe(data)
    except HeaderError:
        return False
    return 0 < header.width * header.height <= _MOST_PIXELS
