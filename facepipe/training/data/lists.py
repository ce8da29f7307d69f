"""Lists that restrict a gallery and label its faces: clean.csv by face, clean.txt and its like by image."""

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
from facepipe.sources.list_file import ListSource
from facepipe.types import Int32

# A uri or path that names a member of a container.
MEMBER = re.compile(r"(.*?\.(?:tar|parquet|pq))#(.*)", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class ListLabels:
    """A list's labels by key (face id, or hash of the uri), ascending; codes into names."""

    keys: npt.NDArray[Any]
    codes: Int32
    names: list[str]
    by_face: bool


def read_label_list(path: str, root: str | None) -> ListLabels:
    """clean.csv by its face ids; any other list by its paths, with the names of a labels.csv beside it."""
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            header = file.readline().strip().lower().split(",")
    except OSError as error:
        raise SourceError(f"cannot read the list {path!r}: {storage.describe_error(error)}") from error
    if {"face_id", "identity"} <= set(header):
        return _read_clean_csv(path)
    numbers, keys, codes = dict[str, int](), list[int](), list[int]()
    for item in ListSource(path, "label", root=root):
        if item.identity is not None and item.listing_error is None:
            for uri in {item.uri, os.fsdecode(item.path)}:  # they differ for members of containers
                keys.append(hash64(uri))
                codes.append(numbers.setdefault(item.identity, len(numbers)))
    if not keys:
        raise SourceError(f"the list {path!r} has no line `path label`")
    key, first = np.unique(np.array(keys, np.uint64), return_index=True)
    known = _read_label_names(os.path.join(os.path.dirname(path), "labels.csv"))
    return ListLabels(key, np.array(codes, np.int32)[first], [known.get(n, n) for n in numbers], False)


def _read_clean_csv(path: str) -> ListLabels:
    try:
        kinds = csv.ConvertOptions(
            include_columns=["face_id", "identity"], column_types={"face_id": pa.int64(), "identity": pa.string()}
        )
        quoted = csv.ParseOptions(newlines_in_values=True)
        table = csv.read_csv(path, convert_options=kinds, parse_options=quoted)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"the list {path!r} cannot be read: {storage.describe_error(error)}") from error
    coded = table["identity"].combine_chunks().dictionary_encode()
    coded = coded.combine_chunks() if isinstance(coded, pa.ChunkedArray) else coded
    keys, first = np.unique(table["face_id"].to_numpy(), return_index=True)
    return ListLabels(keys, coded.indices.to_numpy().astype(np.int32)[first], coded.dictionary.to_pylist(), True)


def _read_label_names(path: str) -> dict[str, str]:
    """The names of a list's numbers, where labels.csv lies beside it."""
    if not os.path.exists(path):
        return {}
    texts = csv.ConvertOptions(column_types={"label": pa.string(), "identity": pa.string()})
    table = csv.read_csv(path, convert_options=texts, parse_options=csv.ParseOptions(newlines_in_values=True))
    return dict(zip(table["label"].to_pylist(), table["identity"].to_pylist(), strict=True))
