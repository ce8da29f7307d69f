"""The bytes of images, read in the order in which they are written."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa

from facepipe.arrow import view_buffers
from facepipe.datasets.collection import LabelledImages, LeftOut
from facepipe.imaging.header import HeaderError, read_header
from facepipe.schema import OK, WORK_ITEM
from facepipe.sources.item import WorkItem
from facepipe.stages.read import Read

_IMAGES_AT_A_TIME = 64
_EXTENSIONS = {"jpeg": "jpg", "tiff": "tif"}


@dataclass(frozen=True)
class ImageContent:
    """An image of a dataset.

    Attributes:
        uri: Name at its source.
        data: Encoded image.
        person: Number of its person.
        name: Label of its person.
        image_id: Hash of the data, as in a gallery.
    """

    uri: str
    data: bytes
    person: int
    name: str
    image_id: str


class ImageKind(NamedTuple):
    """What an encoded image is.

    Attributes:
        size: Width and height in pixels.
        extension: Extension of its format.
    """

    size: tuple[int, int]
    extension: str


def describe_image(data: bytes) -> ImageKind:
    """Describe an encoded image. What is none is described as such: it is written as it is."""
    try:
        header = read_header(data)
    except HeaderError:
        return ImageKind((0, 0), "jpg")
    return ImageKind((header.width, header.height), _EXTENSIONS.get(header.format, header.format))


def read_images(
    images: LabelledImages, left_out: LeftOut, is_erased: Callable[[str, str], bool] = lambda uri, image_id: False
) -> Iterator[ImageContent]:
    """Read images in their order. Persons of whom no image is left give their numbers to those that follow.

    Args:
        images: the images.
        left_out: counts what cannot be read, and what was erased.
        is_erased: says of a uri and an image id whether the image was erased.
    """
    read = Read()
    last_person = -1
    number = -1
    for block in _cut(images):
        items = [item for item, _ in block]
        rows_to_read = [{**item._asdict(), "previous": None} for item in items]
        result = read(pa.Table.from_pylist(rows_to_read, WORK_ITEM))
        rows = zip(
            block,
            view_buffers(result["bytes"]),
            result["status"].to_pylist(),
            result["error"].to_pylist(),
            result["image_id"].to_pylist(),
            strict=True,
        )
        for (item, person), data, status, error, image_id in rows:
            if status != OK or data is None:
                left_out.add(error or status, item.uri)
                continue
            if is_erased(item.uri, image_id):
                left_out.add("erased", None)
                continue
            if person != last_person:
                number += 1
                last_person = person
            yield ImageContent(item.uri, bytes(data), number, images.names[person], image_id)


def _cut(images: LabelledImages) -> Iterator[list[tuple[WorkItem, int]]]:
    block: list[tuple[WorkItem, int]] = []
    for pair in images:
        block.append(pair)
        if len(block) == _IMAGES_AT_A_TIME:
            yield block
            block = []
    if block:
        yield block
