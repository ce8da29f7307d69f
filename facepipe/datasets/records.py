"""Write RecordIO as insightface's training programs read it: `train.rec`, `train.idx`, `train.lst` and `property`."""

import os
from collections.abc import Iterable
from typing import IO

from facepipe.datasets.content import ImageContent, describe_image
from facepipe.sources.containers.record_io import pack_header, pack_record


def write_records(images: Iterable[ImageContent], folder: str, name: str) -> None:
    """Write images, those of a person side by side.

    Record 0 says where the persons' records begin, and each of these which images are the person's, as face2rec2.py of
    insightface writes them. The list has a line of key, number of the person and uri per image.

    Args:
        images: images, sorted by person, whose numbers rise from 0 without a gap.
        folder: folder to write into.
        name: name of the files, without extension.
    """
    stem = os.path.join(folder, name)
    with (
        open(f"{stem}.rec", "wb") as records,
        open(f"{stem}.idx", "w", encoding="ascii") as index,
        open(f"{stem}.lst", "w", encoding="utf-8") as lines,
    ):
        writer = _RecordWriter(records, index)
        begins: list[int] = []
        size = (112, 112)
        count = 0
        for count, image in enumerate(images, 1):
            if image.person == len(begins):
                begins.append(count)
            if count == 1:
                size = describe_image(image.data).size
            writer.add(count, pack_header(count, [float(image.person)]) + image.data)
            uri = image.uri.replace("\t", "%09").replace("\n", "%0A").replace("\r", "%0D")
            lines.write(f"{count}\t{image.person}\t{uri}\n")
        end = count + 1
        writer.add(0, pack_header(0, [float(end), float(end + len(begins))], several=True))
        # The range of a person ends where that of the next one begins.
        bounds = [*begins, end]
        for person, begin in enumerate(begins):
            number = end + person
            writer.add(number, pack_header(number, [float(begin), float(bounds[person + 1])], several=True))
    with open(os.path.join(folder, "property"), "w", encoding="ascii") as file:
        file.write(f"{len(begins)},{size[1]},{size[0]}\n")


class _RecordWriter:
    """Writes records, and a line of key and place for each."""

    def __init__(self, records: IO[bytes], index: IO[str]):
        self._records = records
        self._index = index
        self._at = 0

    def add(self, key: int, content: bytes) -> None:
        """Write a record."""
        record = pack_record(content)
        self._records.write(record)
        self._index.write(f"{key}\t{self._at}\n")
        self._at += len(record)
