"""Write RecordIO files as MXNet and insightface do, for the tests."""

import pickle
import struct
from collections.abc import Iterable
from pathlib import Path

MAGIC = struct.pack("<I", 0xCED7230A)


def pack_part(data: bytes, kind: int) -> bytes:
    return MAGIC + struct.pack("<I", kind << 29 | len(data)) + data + bytes(-len(data) % 4)


def pack_record(data: bytes) -> bytes:
    """Cut the data where the magic number stands at a multiple of four."""
    parts = []
    begin = 0
    for at in range(0, len(data) - 3, 4):
        if data[at : at + 4] == MAGIC:
            parts.append(data[begin:at])
            begin = at + 4
    parts.append(data[begin:])
    if len(parts) == 1:
        return pack_part(data, 0)
    kinds = [1] + [2] * (len(parts) - 2) + [3]
    return b"".join(pack_part(part, kind) for part, kind in zip(parts, kinds, strict=True))


def pack_header(number: int, labels: float | Iterable[float]) -> bytes:
    if isinstance(labels, float | int):
        return struct.pack("<IfQQ", 0, labels, number, 0)
    several = list(labels)
    return struct.pack(f"<IfQQ{len(several)}f", len(several), 0, number, 0, *several)


def write_records(path: Path, images: list[tuple[bytes, int]], *, index: bool = True, first: bool = True) -> None:
    """Write images with their persons' numbers, images of a person side by side, as insightface's face2rec2.py does."""
    lines = []
    with path.open("wb") as file:

        def add(key: int, data: bytes) -> None:
            lines.append(f"{key}\t{file.tell()}\n")
            file.write(pack_record(data))

        persons: dict[int, list[int]] = {}
        for number, (image, person) in enumerate(images, 1):
            persons.setdefault(person, []).append(number)
            add(number, pack_header(number, float(person)) + image)
        end = len(images) + 1
        if first:
            add(0, pack_header(0, (end, end + len(persons))))
        for number, numbers in enumerate(persons.values(), end):
            add(number, pack_header(number, (numbers[0], numbers[-1] + 1)))
    if index:
        path.with_suffix(".idx").write_text("".join(lines))


def write_verification_set(path: Path, images: list[bytes], same: list[bool], protocol: int = 4) -> None:
    """Write a set as insightface's lfw2pack.py does; protocol 1 stands for what Python 2 wrote."""
    if protocol > 1:
        path.write_bytes(pickle.dumps((images, same), protocol))
        return
    texts = b"".join(b"T" + struct.pack("<i", len(image)) + image + b"q\x05" for image in images)
    values = b"".join(b"\x88" if value else b"\x89" for value in same)
    path.write_bytes(b"\x80\x02]q\x01(" + texts + b"e]q\x02(" + values + b"e\x86q\x03.")
