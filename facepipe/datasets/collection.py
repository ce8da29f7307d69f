"""The labelled images of a source, sorted by person. What is known of them lies in a file, and not in memory."""

import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from facepipe.sources.item import Source, WorkItem
from facepipe.sources.labels import sort_labels
from facepipe.types import Int32, Int64

_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("path", pa.binary()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("fingerprint", pa.string()),
    ]
)
_BATCH_ROWS = 8192
_EXAMPLES = 3


@dataclass
class LeftOut:
    """Images that are not in a dataset.

    Attributes:
        counts: Number of images by reason.
        examples: Some of their uris by reason.
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, uri: str | None) -> None:
        """Count an image, which is not named if its uri is None."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if uri is None:
            return
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(uri)


@dataclass(frozen=True)
class LabelledImages:
    """Images with labels, in the order of their persons' numbers and then of their source.

    Attributes:
        items: Path of the file that holds the work items, in the order of the source.
        order: Rows of that file, (n,).
        persons: Number of each image's person, (n,), rising from 0.
        names: Label of each person.
    """

    items: str
    order: Int64
    persons: Int32
    names: list[str]

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[WorkItem, int]]:
        """Yield the item and the person's number of each image."""
        with pa.memory_map(self.items) as source:
            table = pa.ipc.open_file(source).read_all()
            for at in range(0, len(self.order), _BATCH_ROWS):
                rows = table.take(pa.array(self.order[at : at + _BATCH_ROWS])).to_pylist()
                for row, person in zip(rows, self.persons[at : at + _BATCH_ROWS].tolist(), strict=True):
                    yield WorkItem(**row, identity=self.names[person]), person


def collect_images(source: Source, folder: str, left_out: LeftOut) -> LabelledImages:
    """List a source, and sort its images by person.

    Persons are numbered by their labels: in numerical order if all labels are whole numbers, else in that of text.

    Args:
        source: the source.
        folder: folder for temporary files.
        left_out: counts what has no label, or cannot be listed.
    """
    path = os.path.join(folder, "items.arrow")
    codes: dict[str, int] = {}
    labels = array("i")
    items = iter(source)
    with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        while block := list(islice(items, _BATCH_ROWS)):
            kept = [item for item in block if _is_usable(item, left_out)]
            labels.extend(codes.setdefault(str(item.identity), len(codes)) for item in kept)
            columns: dict[str, list[Any]] = {name: [getattr(item, name) for item in kept] for name in _SCHEMA.names}
            writer.write_batch(pa.record_batch(columns, _SCHEMA))
    names = sort_labels(codes)
    number = np.empty(len(names), np.int32)
    number[[codes[name] for name in names]] = np.arange(len(names))
    persons = number[np.frombuffer(labels, np.int32)] if labels else np.empty(0, np.int32)
    order = np.argsort(persons, kind="stable").astype(np.int64)
    return LabelledImages(path, order, persons[order], names)


def _is_usable(item: WorkItem, left_out: LeftOut) -> bool:
    if item.listing_error is not None:
        left_out.add(item.listing_error, item.uri)
        return False
    if item.identity is None:
        left_out.add("no label", item.uri)
        return False
    return True
