"""Read the boxes of pictures in ISO base media files: AVIF and HEIC (ISO 14496-12, ISO 23008-12).

A picture is an item. Its properties say how large it is and how it is to be turned. Thumbnails, hidden items and tiles
are items too, so only the properties of the primary item count.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

# Far more than writers make. A file of empty boxes would keep Python busy for minutes otherwise.
_MAX_BOXES = 1 << 16

# EXIF orientation of a quarter turn (`irot`, anticlockwise) that is followed by a mirroring (`imir`; None: there is
# none, 0: top to bottom, 1: left to right). These are the eight ways to lay a rectangle.
_ORIENTATIONS = {
    (0, None): 1,
    (1, None): 8,
    (2, None): 3,
    (3, None): 6,
    (0, 0): 4,
    (1, 0): 5,
    (2, 0): 2,
    (3, 0): 7,
    (0, 1): 2,
    (1, 1): 7,
    (2, 1): 4,
    (3, 1): 5,
}

# Items that are no pictures. Decoders read them while they open a file, and refuse it if they are damaged or cut off.
_METADATA = (b"Exif", b"mime", b"uri ")


class Box(NamedTuple):
    """A box of a file.

    Attributes:
        kind: Four letters.
        start: Offset of its content.
        end: Offset behind its content, not behind the end of the file.
    """

    kind: bytes
    start: int
    end: int


class Picture(NamedTuple):
    """What a file says of its primary item.

    Attributes:
        width: Stored width in pixels.
        height: Stored height in pixels.
        orientation: EXIF orientation that does the same as the item's turns and mirrors.
        codec: Kind of the item, such as av01, hvc1 or grid.
        clean_size: Width and height of the part that is to be seen, before it is turned (`clap`).
    """

    width: int
    height: int
    orientation: int
    codec: bytes
    clean_size: tuple[int, int]


def list_brands(data: bytes) -> list[bytes]:
    """List the brands of a file's first box; an empty list if that is none of brands."""
    if data[4:8] != b"ftyp":
        return []
    # The box may claim a huge size, so only the first bytes count. Bytes 12 to 16 are a version.
    brands = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
    return [brands[start : start + 4] for start in range(0, len(brands) - 3, 4) if start != 4]


def read_picture(data: bytes) -> Picture | None:
    """Read size and orientation of the primary item.

    Returns:
        None if the file does not say them.

    Raises:
        struct.error: A box ends early.
    """
    meta = _find(data, 0, len(data), b"meta")
    if meta is None:
        return None
    inner = list(_iterate(data, meta.start + 4, meta.end))  # 4 bytes of version and flags
    boxes = {box.kind: box for box in reversed(inner)}
    if b"iprp" not in boxes:
        return None
    item = _read_primary_item(data, boxes.get(b"pitm"))
    properties = _list_properties(data, boxes[b"iprp"], item)
    size: tuple[int, int] | None = None
    clean_size: tuple[int, int] | None = None
    turn = 0
    mirror: int | None = None
    for box in properties:
        if box.kind == b"ispe" and size is None:
            size = struct.unpack_from(">II", data, box.start + 4)
        elif box.kind == b"clap":
            # Width and height as fractions.
            width, width_parts, height, height_parts = struct.unpack_from(">IIII", data, box.start)
            clean_size = (width // max(width_parts, 1), height // max(height_parts, 1))
        elif box.kind == b"irot":
            turn = data[box.start] & 3
        elif box.kind == b"imir":
            mirror = data[box.start] & 1
    if size is None:
        return None
    kinds = dict(_list_items(data, boxes.get(b"iinf")))
    codec = data[kinds[item] : kinds[item] + 4] if item in kinds else b""
    return Picture(size[0], size[1], _ORIENTATIONS[turn, mirror], codec, clean_size or size)


def hide_metadata(data: bytes) -> bytes:
    """Rename the items that are no pictures, so that decoders pass over them. The length of the file stays."""
    meta = _find(data, 0, len(data), b"meta")
    items = _find(data, meta.start + 4, meta.end, b"iinf") if meta else None
    kinds = [start for _, start in _list_items(data, items) if data[start : start + 4] in _METADATA]
    if not kinds:
        return data
    hidden = bytearray(data)
    for start in kinds:
        hidden[start : start + 4] = b"skip"
    return bytes(hidden)


def _iterate(data: bytes, start: int, end: int) -> Iterator[Box]:
    """Iterate over the boxes between two offsets."""
    for _ in range(_MAX_BOXES):
        if start + 8 > end:
            return
        size, kind = struct.unpack_from(">I4s", data, start)
        content = start + 8
        if size == 1:  # a 64-bit size follows
            size = struct.unpack_from(">Q", data, content)[0]
            content += 8
        elif size == 0:  # to the end
            size = end - start
        if size < content - start:
            return
        yield Box(kind, content, min(start + size, end))
        start += size


def _find(data: bytes, start: int, end: int, kind: bytes) -> Box | None:
    return next((box for box in _iterate(data, start, end) if box.kind == kind), None)


def _read_primary_item(data: bytes, box: Box | None) -> int:
    """Read the number of the primary item; it is the first if the file does not say."""
    if box is None:
        return 1
    version = data[box.start]
    return int(struct.unpack_from(">I" if version else ">H", data, box.start + 4)[0])


def _list_properties(data: bytes, box: Box, item: int) -> list[Box]:
    """List the properties of an item, in the order in which they are linked to it."""
    container = _find(data, box.start, box.end, b"ipco")
    links = _find(data, box.start, box.end, b"ipma")
    if container is None or links is None:
        return []
    properties = list(_iterate(data, container.start, container.end))
    for number, indices in _iterate_links(data, links):
        if number == item:
            return [properties[index - 1] for index in indices if 0 < index <= len(properties)]
    return []


def _iterate_links(data: bytes, box: Box) -> Iterator[tuple[int, list[int]]]:
    """Iterate over items and the numbers of their properties, from 1 on."""
    version = data[box.start]
    has_wide_indices = data[box.start + 3] & 1
    count = struct.unpack_from(">I", data, box.start + 4)[0]
    at = box.start + 8
    for _ in range(min(count, _MAX_BOXES)):
        number = struct.unpack_from(">H" if version < 1 else ">I", data, at)[0]
        at += 2 if version < 1 else 4
        length = data[at]
        at += 1
        # The highest bit of an index says that the property is essential.
        if has_wide_indices:
            indices = [index & 0x7FFF for index in struct.unpack_from(f">{length}H", data, at)]
        else:
            indices = [index & 0x7F for index in struct.unpack_from(f">{length}B", data, at)]
        at += length * (2 if has_wide_indices else 1)
        yield number, indices


def _list_items(data: bytes, box: Box | None) -> list[tuple[int, int]]:
    """List the numbers of all items, and the offset of the four letters that say their kind."""
    if box is None:
        return []
    # A version of 0 has a short count, others a long one.
    first = box.start + (6 if data[box.start] == 0 else 8)
    items = []
    for entry in _iterate(data, first, box.end):
        if entry.kind != b"infe" or data[entry.start] < 2:
            continue
        is_wide = data[entry.start] >= 3
        number = struct.unpack_from(">I" if is_wide else ">H", data, entry.start + 4)[0]
        # The number, two bytes of protection, then the kind.
        items.append((number, entry.start + (10 if is_wide else 8)))
    return items
