"""Encodings as images: one for every run of rows with one name; the same uris and contents whenever it is done."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe import storage
from facepipe.arrow import to_vectors
from facepipe.hashing import compute_image_id, hash64
from facepipe.schema import EMBEDDING_DIM
from facepipe.sources.extensions import is_web_url
from facepipe.sources.item import make_file_uri
from facepipe.types import Bool, Float32, Float64, Int64

SCHEME = "adopted:"  # of the uris of rows that name no file, and of the fingerprints of all adopted rows
_LARGEST = 4096  # faces of one image; keeps memory bounded where a file gives all rows one name
_ZERO = 1e-12


@dataclass(frozen=True)
class EncodedImage:
    """Rows of one name, those that are sound. at: their places in the table that is adopted."""

    uri: str
    at: Int64
    content: str
    fingerprint: str


def regroup_by_image(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Tables of ENCODINGS cut anew so that no image's rows are in two of them (unless it has thousands)."""
    held: pa.Table | None = None
    for table in tables:
        if held is not None:
            start = _last_image(held["name"].to_pylist(), table["name"][0].as_py()) if table.num_rows else 0
            start = start if held.num_rows - start <= _LARGEST else held.num_rows
            table = pa.concat_tables([held.slice(start), table]).combine_chunks()
            if start:
                yield held.slice(0, start)
        held = table
    if held is not None:
        yield held


def _last_image(names: list[str | None], following: str | None) -> int:
    """The row at which the image begins that goes on under the following name; the end where none does."""
    start = len(names)
    while start and following and names[start - 1] == following:
        start -= 1
    return start


def measure_vectors(table: pa.Table) -> tuple[Float32, Float64]:
    """((n, 128) raw vectors, zero where there is none; (n,) their norms, NaN where a number is not finite)."""
    held = table["vector"].is_valid().to_numpy()
    raw = np.zeros((table.num_rows, EMBEDDING_DIM), np.float32)
    raw[held] = to_vectors(table["vector"].drop_null(), EMBEDDING_DIM)
    finite = np.asarray(np.isfinite(raw).all(axis=1))
    norms = np.linalg.norm(np.where(finite[:, None], raw, 0).astype(np.float64), axis=1)
    return raw, np.where(finite, norms, np.nan)


def find_refusals(table: pa.Table, raw: Float32, norms: Float64) -> dict[int, tuple[str, str]]:
    """(reason, why) of every row that cannot be adopted."""
    found: dict[int, tuple[str, str]] = {}
    for n in np.flatnonzero(~check_boxes(table["box"])):
        why = (
            "the box is not x1, y1, x2, y2 (face_recognition's top, right, bottom, left goes into a column `location`)"
        )
        found[int(n)] = ("bad_box", why)
    for n in np.flatnonzero(~(norms >= _ZERO)):
        found[int(n)] = ("not_finite", "not finite") if np.isnan(norms[n]) else ("zero_vector", "zero vector")
    lengths = table["length"].to_pylist()
    for n in np.flatnonzero(table["vector"].is_null().to_numpy()):
        length = lengths[int(n)]
        why = "no encoding" if length is None else f"{length} dimensions, not {EMBEDDING_DIM}"
        found[int(n)] = ("no_encoding" if length is None else "other_dimension", why)
    return dict(sorted(found.items()))


def check_boxes(column: pa.ChunkedArray) -> Bool:
    """(n,) whether a row has no box, or one with x1 < x2 and y1 < y2."""
    fits = column.is_null().to_numpy() | (pc.fill_null(pc.list_value_length(column), 0).to_numpy() == 4)
    given = fits & column.is_valid().to_numpy()
    boxes = to_vectors(column.filter(pa.array(given)), 4)
    fits[given] = (boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3]) & np.isfinite(boxes).all(axis=1)
    return fits


def group_images(table: pa.Table, raw: Float32, sound: Bool, source: str) -> Iterator[EncodedImage]:
    """The images of a table: sound rows next to each other with one name; a row without a name is its own."""
    at = np.flatnonzero(sound)
    if not len(at):
        return
    chosen = table.select(["file", "row", "name", "identity"]).take(pa.array(at))
    files, numbers, names, labels = (column.to_pylist() for column in chosen.columns)
    uris = [make_uri(source, *row) for row in zip(files, numbers, names, strict=True)]
    starts = [n for n in range(len(uris)) if n == 0 or uris[n] != uris[n - 1]]
    for first, end in zip(starts, [*starts[1:], len(uris)], strict=True):
        content = compute_image_id(np.ascontiguousarray(raw[at[first:end]], "<f4").tobytes())
        mark = hash64(content, *(label or "" for label in labels[first:end]))
        yield EncodedImage(uris[first], at[first:end], content, f"{SCHEME}{mark:016x}")


def make_uri(source: str, file: str, row: int, name: str | None) -> str:
    """What the gallery calls an image: absolute paths and URLs as everywhere, other names and rows within their source.

    `adopted:SOURCE/NAME`, or `adopted:SOURCE#ROW`, with the file's name before # where it is not the source's.
    """
    if not name:
        return f"{SCHEME}{source}#{row}" if file == source else f"{SCHEME}{source}/{file}#{row}"
    if name.startswith("file://"):
        name = os.fsdecode(unquote_to_bytes(os.fsencode(name.removeprefix("file://"))))
    if os.path.isabs(name):
        return make_file_uri(os.path.abspath(name))
    if is_web_url(name) or (storage.is_remote(name) and storage.has_credentials(name)):
        scheme, _, rest = name.partition("?")[0].partition("://")  # what is behind the ? may be a signature
        host, slash, key = rest.partition("/")
        return f"{scheme}://{host.rpartition('@')[2]}{slash}{key}"
    return name if storage.is_remote(name) else f"{SCHEME}{source}/{name}"
