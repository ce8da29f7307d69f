"""AVIF files as other encoders write them: an AV1 picture of OpenCV in a container of our own."""

import struct

import cv2
import numpy as np


def box(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(data), kind) + data


def full_box(kind: bytes, data: bytes, version: int = 0) -> bytes:
    return box(kind, struct.pack(">I", version << 24) + data)


def _find(data: bytes, kind: bytes) -> bytes:
    at = data.index(kind) - 4
    return data[at : at + struct.unpack(">I", data[at : at + 4])[0]]


def tiff(orientation: int) -> bytes:
    return struct.pack("<2sHIHHHIHHI", b"II", 42, 8, 1, 274, 3, 1, orientation, 0, 0)


def avif(
    rgb: np.ndarray,
    *,
    turn: int | None = None,
    mirror: int | None = None,
    orientation: int | None = None,
    hidden_size: tuple[int, int] | None = None,
) -> bytes:
    """An AVIF whose metadata lies behind the picture.

    Args:
        rgb: the stored pixels.
        turn: `irot`, quarter turns anticlockwise.
        mirror: `imir`, 0: top to bottom, 1: left to right.
        orientation: EXIF orientation, which readers must ignore.
        hidden_size: width and height of a second, hidden item, which has no data of its own.
    """
    plain = cv2.imencode(".avif", rgb[..., ::-1], [cv2.IMWRITE_AVIF_QUALITY, 95])[1].tobytes()
    coded = _find(plain, b"mdat")[8:]
    properties = [_find(plain, kind) for kind in (b"ispe", b"pixi", b"av1C", b"colr")]
    links = [1, 2, 3 | 0x80, 4]
    for kind, value in ((b"irot", turn), (b"imir", mirror)):
        if value is not None:
            properties.append(box(kind, bytes([value])))
            links.append(len(properties) | 0x80)
    items = [(1, b"av01", coded, 0)]
    if orientation is not None:
        items.append((2, b"Exif", struct.pack(">I", 0) + tiff(orientation), 0))
    ipma = struct.pack(">HB", 1, len(links)) + bytes(links)
    count = 1
    if hidden_size is not None:
        properties.append(full_box(b"ispe", struct.pack(">II", *hidden_size)))
        items.append((3, b"av01", coded, 1))
        ipma += struct.pack(">HB", 3, 1) + bytes([len(properties)])
        count = 2
    infos = b"".join(
        struct.pack(">I4sI", 21, b"infe", 2 << 24 | hidden) + struct.pack(">HH4s", number, 0, kind) + b"\0"
        for number, kind, _, hidden in items
    )

    def build_meta(start: int) -> bytes:
        at = start
        places = b""
        for number, _, data, _ in items:
            places += struct.pack(">HHHII", number, 0, 1, at, len(data))
            at += len(data)
        inner = full_box(b"hdlr", struct.pack(">I4s12x", 0, b"pict") + b"\0")
        inner += full_box(b"pitm", struct.pack(">H", 1))
        inner += full_box(b"iloc", struct.pack(">BBH", 0x44, 0, len(items)) + places)
        inner += full_box(b"iinf", struct.pack(">H", len(items)) + infos)
        if orientation is not None:
            inner += full_box(b"iref", box(b"cdsc", struct.pack(">HHH", 2, 1, 1)))
        inner += box(b"iprp", box(b"ipco", b"".join(properties)) + full_box(b"ipma", struct.pack(">I", count) + ipma))
        return full_box(b"meta", inner)

    head = box(b"ftyp", b"avif" + struct.pack(">I", 0) + b"avifmif1miafMA1B")
    start = len(head) + len(build_meta(0)) + 8
    return head + build_meta(start) + box(b"mdat", b"".join(data for _, _, data, _ in items))
