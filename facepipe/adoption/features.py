"""Feature files of the face-clustering literature: raw float32 numbers (.bin), and a label per line (.meta).

Such a file has no header: the length of a vector is given, or follows from the number of labels.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa

from facepipe import storage
from facepipe.errors import ConfigError, SourceError
from facepipe.schema import MAX_DIM, MIN_DIM
from facepipe.sources.labels import format_label
from facepipe.types import Float32

_NUMBER_BYTES = 4
# Longest line of a file of labels; a longer one is no label.
_MAX_LABEL_BYTES = 4096


@dataclass(frozen=True)
class FeatureShape:
    """What a file of features holds.

    Attributes:
        rows: Vectors.
        dim: Numbers per vector.
    """

    rows: int
    dim: int


def is_feature_file(path: str) -> bool:
    """Tell by its name whether a file is raw numbers."""
    return path.endswith(".bin")


def measure_features(path: str, labels: str | None, dim: int | None) -> FeatureShape:
    """Find out how many vectors a file holds, and how long they are.

    Args:
        path: the file of features.
        labels: file of a label per line, if there is one.
        dim: numbers per vector, if it is known.

    Raises:
        ConfigError: nothing tells the length, the sizes do not fit, or the file is a pickle.
        SourceError: a file cannot be read.
    """
    size = storage.get_entry(path).size
    _refuse_pickle(path, size)
    count = None if labels is None else count_labels(labels)
    if dim is None and count is None:
        raise ConfigError(
            f"{path} is raw numbers, and nothing says how many make a vector: give --dim 256, or --labels with the "
            "file of a label per line"
        )
    if not size:
        raise SourceError(f"{path} is empty")
    if dim is None:
        dim = _divide(size, count or 0)
        if dim is None:
            raise ConfigError(
                f"{path} has {size} bytes, which does not make a vector of {MIN_DIM} to {MAX_DIM} float32 for each of "
                f"the {count} labels of {labels}: the file is cut short, or the labels are another file's. --dim says "
                "how long a vector is"
            )
    row_bytes = _NUMBER_BYTES * dim
    if size % row_bytes:
        raise SourceError(
            f"{path} is cut short, or its vectors do not have {dim} numbers: its {size} bytes are "
            f"{size / row_bytes:.2f} vectors"
        )
    rows = size // row_bytes
    if count is not None and count != rows:
        raise ConfigError(f"{labels} has {count} labels, and {path} has {rows} vectors of {dim} numbers")
    return FeatureShape(rows, dim)


def _divide(size: int, count: int) -> int | None:
    """Divide the size of a file among labels; None if no vectors of a possible length come out."""
    if not count or size % (_NUMBER_BYTES * count):
        return None
    dim = size // (_NUMBER_BYTES * count)
    return dim if MIN_DIM <= dim <= MAX_DIM else None


def _refuse_pickle(path: str, size: int) -> None:
    """Refuse the verification sets of insightface, which end in .bin as well. Nothing is unpickled."""
    with storage.open_seekable(path) as file:
        start = file.read(2)
        file.seek(max(0, size - 1))
        end = file.read(1)
    if len(start) == 2 and start[0] == 0x80 and start[1] <= 5 and end == b".":
        raise ConfigError(
            f"{path} is a pickle, such as a verification set of images: `facepipe embed {path} GALLERY` reads those. "
            "Features are raw float32 numbers"
        )


def read_features(path: str, shape: FeatureShape, rows: int) -> Iterator[Float32]:
    """Yield the vectors of a file, up to `rows` at a time, (n, dim)."""
    with storage.open_seekable(path) as file:
        for first in range(0, shape.rows, rows):
            count = min(rows, shape.rows - first)
            data = file.read(count * shape.dim * _NUMBER_BYTES)
            if len(data) < count * shape.dim * _NUMBER_BYTES:
                raise SourceError(f"{path} is cut short: it was longer when it was opened")
            yield np.frombuffer(data, "<f4").reshape(count, shape.dim).astype(np.float32, copy=False)


def count_labels(path: str) -> int:
    """Count the labels of a file, one per line. Raises SourceError for a file that is not such a list."""
    return sum(1 for _ in _read_lines(path))


def read_labels(path: str, rows: int) -> Iterator[pa.Array]:
    """Yield the labels of a file, up to `rows` at a time; null for an empty line."""
    lines = _read_lines(path)
    while labels := list(islice(lines, rows)):
        yield pa.array(labels, pa.string())


def _read_lines(path: str) -> Iterator[str | None]:
    """Yield the label of each line."""
    number = 0
    with storage.open_seekable(path) as file:
        while True:
            line = file.readline(_MAX_LABEL_BYTES + 1)
            if not line:
                return
            number += 1
            if len(line) > _MAX_LABEL_BYTES:
                raise SourceError(
                    f"{path} line {number} has more than {_MAX_LABEL_BYTES} bytes: it is not a list of a label per line"
                )
            try:
                yield format_label(line.decode().strip())
            except UnicodeDecodeError as error:
                raise SourceError(
                    f"{path} line {number} is not UTF-8 text: expected a file of a label per line"
                ) from error


def describe_labels(path: str | None) -> str | None:
    """Name a file of labels, for a summary."""
    return None if path is None else os.path.basename(path)
