"""Write a dataset: list a source, sort it by person, and write the images in a format, all or nothing."""

import csv
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Literal

import numpy as np

from facepipe.datasets.collection import LeftOut, collect_images
from facepipe.datasets.content import ImageContent, read_images
from facepipe.datasets.records import write_records
from facepipe.datasets.shards import write_hugging_face, write_webdataset
from facepipe.errors import SourceError, StorageError
from facepipe.gallery import suppressed
from facepipe.hashing import hash64
from facepipe.sources.item import Source
from facepipe.storage import describe_error, is_remote, sync_disks
from facepipe.text import protect_cell

DatasetFormat = Literal["rec", "webdataset", "huggingface"]
LABELS = "labels.csv"
_RECORDS_NAME = "train"
_UNFINISHED = ".unfinished"


@dataclass
class DatasetSummary:
    """What was written.

    Attributes:
        images: Number of images.
        persons: Number of persons.
        left_out: Number of images that are not in it, by reason.
        examples: Some of their uris, by reason.
        out: Folder.
    """

    images: int = 0
    persons: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    out: str = ""


def write_dataset(source: Source, out: str, kind: DatasetFormat, gallery: str | None = None) -> DatasetSummary:
    """Write the labelled images of a source into a new folder. Their bytes stay as they are.

    Args:
        source: the source, such as a list that `finish` wrote.
        out: the folder. It must not exist, or be empty.
        kind: the format.
        gallery: gallery whose erased images are left out.

    Raises:
        SourceError: No image has a label.
        StorageError: The folder exists, or cannot be written.
    """
    require_new_folder(out)
    left_out = LeftOut()
    summary = DatasetSummary(out=out)
    is_erased = _find_erased(gallery) if gallery else _is_never_erased
    unfinished = f"{out.rstrip('/')}.{secrets.token_hex(4)}{_UNFINISHED}"
    try:
        os.makedirs(os.path.dirname(os.path.abspath(unfinished)), exist_ok=True)
        os.mkdir(unfinished)
        with tempfile.TemporaryDirectory(prefix="facepipe-") as folder:
            images = collect_images(source, folder, left_out)
            with open(os.path.join(unfinished, LABELS), "w", newline="", encoding="utf-8") as labels:
                counted = _count(read_images(images, left_out, is_erased), labels, summary)
                _write(counted, unfinished, kind)
        if not summary.images:
            raise SourceError(f"no image to write: {_describe(left_out)}")
        sync_disks(unfinished)
        if os.path.isdir(out):
            os.rmdir(out)  # it is empty
        os.rename(unfinished, out)
    except OSError as error:
        raise StorageError(f"cannot write {out!r}: {describe_error(error)}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    summary.left_out = left_out.counts
    summary.examples = left_out.examples
    return summary


def require_new_folder(out: str) -> None:
    """Require that a folder for a dataset is on a disk, and new or empty.

    Raises:
        StorageError: It is in an object store, or holds something.
    """
    if is_remote(out):
        raise StorageError(f"{out!r} is in an object store: write the dataset to a disk and copy it there")
    if os.path.lexists(out) and not (os.path.isdir(out) and not os.listdir(out)):
        raise StorageError(f"{out!r} exists: name a new folder")


def _write(images: Iterable[ImageContent], folder: str, kind: DatasetFormat) -> None:
    match kind:
        case "rec":
            write_records(images, folder, _RECORDS_NAME)
        case "webdataset":
            write_webdataset(images, folder)
        case "huggingface":
            write_hugging_face(images, folder)


def _count(images: Iterator[ImageContent], labels: IO[str], summary: DatasetSummary) -> Iterator[ImageContent]:
    """Count images and persons, and write the name of each person's number."""
    writer = csv.writer(labels)
    writer.writerow(["number", "identity"])
    for image in images:
        if image.person == summary.persons:
            writer.writerow([image.person, protect_cell(image.name)])
            summary.persons += 1
        summary.images += 1
        yield image


def _is_never_erased(uri: str, image_id: str) -> bool:
    return False


def _find_erased(gallery: str) -> Callable[[str, str], bool]:
    """Make a function that says of a uri and an image id whether a gallery has erased the image."""
    secret = suppressed.read_secret()
    uris = suppressed.read_uris(gallery, secret)
    contents = suppressed.read_contents(gallery, secret)

    def is_erased(uri: str, image_id: str) -> bool:
        by_uri = uris.contains(np.array([hash64(uri)], np.uint64))[0]
        return bool(by_uri or contents.contains(np.array([hash64(image_id)], np.uint64))[0])

    return is_erased


def _describe(left_out: LeftOut) -> str:
    reasons = [f"{count} {reason}" for reason, count in left_out.counts.items()]
    return ", ".join(reasons[:3]) or "the source lists none"
