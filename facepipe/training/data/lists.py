"""Lists that restrict a gallery and label its faces: clean.csv by face; clean.txt and similar lists by image."""

import os
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as csv

from facepipe import storage
from facepipe.errors import SourceError
from facepipe.hashing import hash64
from facepipe.sources.extensions import CONTAINER_PATTERN
from facepipe.sources.list_file import ListSource
from facepipe.text import restore_cell
from facepipe.types import Int32

# A uri or path that names a member of a container.
MEMBER = re.compile(rf"(.*?\.(?:{CONTAINER_PATTERN}))#(.*)", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class ListLabels:
    """The labels of a list.

    Attributes:
        keys: face ids, or hashes of uris, ascending, (n,).
        codes: position of each label in `names`, (n,).
        names: names of the labels.
        by_face: whether keys are face ids.
    """

    keys: npt.NDArray[Any]
    codes: Int32
    names: list[str]
    by_face: bool


def read_label_list(path: str, root: str | None) -> ListLabels:
    """Read a list: clean.csv by its face ids; any other list by its paths, with the names of a labels.csv beside it.

    Args:
        path: file of the list.
        root: folder that its paths are relative to.

    Raises:
        SourceError: The list cannot be read or has no labels.
    """
    # The header tells a list of faces from a list of images.
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            header = file.readline().strip().lower().split(",")
    except OSError as error:
        raise SourceError(f"cannot read the list {path!r}: {storage.describe_error(error)}") from error
    if {"face_id", "identity"} <= set(header):
        return _read_clean_csv(path)
    # Number the labels in the order of their first line.
    numbers: dict[str, int] = {}
    keys: list[int] = []
    codes: list[int] = []
    for item in ListSource(path, "label", root=root):
        if item.identity is not None and item.listing_error is None:
            # The uri and the path differ for members of containers. Galleries may hold either.
            for uri in {item.uri, os.fsdecode(item.path)}:
                keys.append(hash64(uri))
                codes.append(numbers.setdefault(item.identity, len(numbers)))
    if not keys:
        raise SourceError(f"the list {path!r} has no line `path label`")
    # If a key occurs twice, its first line counts.
    unique_keys, first = np.unique(np.array(keys, np.uint64), return_index=True)
    names = _read_label_names(os.path.join(os.path.dirname(path), "labels.csv"))
    return ListLabels(
        keys=unique_keys,
        codes=np.array(codes, np.int32)[first],
        names=[names.get(number, number) for number in numbers],
        by_face=False,
    )


def _read_clean_csv(path: str) -> ListLabels:
    try:
        types = csv.ConvertOptions(
            include_columns=["face_id", "identity"], column_types={"face_id": pa.int64(), "identity": pa.string()}
        )
        # Quoted names may hold line breaks.
        quoted = csv.ParseOptions(newlines_in_values=True)
        table = csv.read_csv(path, convert_options=types, parse_options=quoted)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"cannot read the list {path!r}: {storage.describe_error(error)}") from error
    # Labels become codes; of a face that is listed twice the first line counts.
    coded = table["identity"].combine_chunks().dictionary_encode()
    coded = coded.combine_chunks() if isinstance(coded, pa.ChunkedArray) else coded
    keys, first = np.unique(table["face_id"].to_numpy(), return_index=True)
    codes = coded.indices.to_numpy().astype(np.int32)[first]
    return ListLabels(keys, codes, [restore_cell(name) for name in coded.dictionary.to_pylist()], by_face=True)


def _read_label_names(path: str) -> dict[str, str]:
    """Read the names of a list's numbers from labels.csv, if it exists."""
    if not os.path.exists(path):
        return {}
    types = csv.ConvertOptions(column_types={"label": pa.string(), "identity": pa.string()})
    table = csv.read_csv(path, convert_options=types, parse_options=csv.ParseOptions(newlines_in_values=True))
    names = [restore_cell(name) for name in table["identity"].to_pylist()]
    return dict(zip(table["label"].to_pylist(), names, strict=True))
