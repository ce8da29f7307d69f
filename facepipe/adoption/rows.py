"""Encodings as images: one image per run of rows with the same name, with the same uri and content every time."""

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
from facepipe.sources.extensions import is_web_url
from facepipe.sources.item import make_file_uri
from facepipe.sources.parquet import strip_url_secrets
from facepipe.types import Bool, Float32, Float64, Int64

SCHEME = "adopted:"  # of the uris of rows that name no file, and of the fingerprints of all adopted rows
_MAX_FACES = 4096  # of one image; keeps memory bounded if a file gives all rows the same name
# Vectors below this length have no direction.
_MIN_NORM = 1e-12


@dataclass(frozen=True)
class EncodedImage:
    """The sound rows of one name.

    Attributes:
        uri: Name of the image in the gallery.
        at: Positions of its rows in the table that is adopted.
        content: Image id: a hash of the vectors.
        fingerprint: Changes with the vectors or the labels.
    """

    uri: str
    at: Int64
    content: str
    fingerprint: str


def regroup_by_image(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Cut tables of ENCODINGS anew so that no image has rows in two of them (unless it has thousands)."""
    pending: pa.Table | None = None
    for table in tables:
        # Hold the last image back: the next table may go on with it.
        if pending is not None:
            start = 0
            if table.num_rows:
                start = _find_last_image(pending["name"].to_pylist(), table["name"][0].as_py())
            # An image of too many rows is cut, so that memory stays bounded.
            if pending.num_rows - start > _MAX_FACES:
                start = pending.num_rows
            table = pa.concat_tables([pending.slice(start), table]).combine_chunks()
            if start:
                yield pending.slice(0, start)
        pending = table
    if pending is not None:
        yield pending


def _find_last_image(names: list[str | None], following: str | None) -> int:
    """Find the row at which the image begins that goes on under the following name; the end if none does."""
    start = len(names)
    while start and following and names[start - 1] == following:
        start -= 1
    return start


def measure_vectors(table: pa.Table, dim: int) -> tuple[Float32, Float64]:
    """Read the vectors of encodings, of `dim` numbers each, and measure them.

    Returns:
        Raw vectors (n, dim), zero for a row without one, and their norms (n,), NaN if a number is not finite.
    """
    has_vector = table["vector"].is_valid().to_numpy()
    raw = np.zeros((table.num_rows, dim), np.float32)
    raw[has_vector] = to_vectors(table["vector"].drop_null(), dim)
    is_finite = np.asarray(np.isfinite(raw).all(axis=1))
    # In double precision the squares of large numbers do not overflow.
    norms = np.linalg.norm(np.where(is_finite[:, None], raw, 0).astype(np.float64), axis=1)
    return raw, np.where(is_finite, norms, np.nan)


def find_refusals(table: pa.Table, raw: Float32, norms: Float64) -> dict[int, tuple[str, str]]:
    """Find the rows that cannot be adopted: (reason, explanation) by position.

    If several reasons apply, the one that is found last stands.
    """
    refusals: dict[int, tuple[str, str]] = {}
    # The weakest reason comes first, since later ones replace it.
    for n in np.flatnonzero(~check_boxes(table["box"])):
        explanation = (
            "the box is not x1, y1, x2, y2 (face_recognition's top, right, bottom, left goes into a column `location`)"
        )
        refusals[int(n)] = ("bad_box", explanation)
    for n in np.flatnonzero(~(norms >= _MIN_NORM)):
        refusals[int(n)] = ("not_finite", "not finite") if np.isnan(norms[n]) else ("zero_vector", "zero vector")
    # A row without a vector has no norm to judge: its missing or wrong length is the reason.
    lengths = table["length"].to_pylist()
    for n in np.flatnonzero(table["vector"].is_null().to_numpy()):
        length = lengths[int(n)]
        if length is None:
            refusals[int(n)] = ("no_encoding", "no encoding")
        else:
            refusals[int(n)] = ("other_dimension", f"{length} dimensions, not {raw.shape[1]}")
    return dict(sorted(refusals.items()))


def check_boxes(column: pa.ChunkedArray) -> Bool:
    """Tell for each row (n,) whether it has no box, or one with x1 < x2 and y1 < y2."""
    # Boxes are judged in two steps: their length first, then the order of their corners.
    is_good = column.is_null().to_numpy() | (pc.fill_null(pc.list_value_length(column), 0).to_numpy() == 4)
    has_box = is_good & column.is_valid().to_numpy()
    boxes = to_vectors(column.filter(pa.array(has_box)), 4)
    is_ordered = (boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])
    is_good[has_box] = is_ordered & np.isfinite(boxes).all(axis=1)
    return is_good


def group_images(table: pa.Table, raw: Float32, is_sound: Bool, source: str) -> Iterator[EncodedImage]:
    """Yield the images of a table: sound rows next to each other with one name. A row without a name is its own.

    Args:
        table: encodings.
        raw: their vectors, (n, dim).
        is_sound: which rows can be adopted, (n,).
        source: name of the corpus.
    """
    # Only sound rows count as neighbours: a refused row between two faces does not split their image.
    at = np.flatnonzero(is_sound)
    if not len(at):
        return
    rows = table.select(["file", "row", "name", "identity"]).take(pa.array(at))
    files, numbers, names, labels = (column.to_pylist() for column in rows.columns)
    uris = [make_uri(source, *row) for row in zip(files, numbers, names, strict=True)]
    # A new image begins at each change of the uri.
    starts = [n for n in range(len(uris)) if n == 0 or uris[n] != uris[n - 1]]
    for first, end in zip(starts, [*starts[1:], len(uris)], strict=True):
        # The id is a hash of the vectors, since there is no photo to hash.
        content = compute_image_id(np.ascontiguousarray(raw[at[first:end]], "<f4").tobytes())
        mark = hash64(content, *(label or "" for label in labels[first:end]))
        yield EncodedImage(uris[first], at[first:end], content, f"{SCHEME}{mark:016x}")


def make_uri(source: str, file: str, row: int, name: str | None) -> str:
    """Make the uri of an image.

    Absolute paths and URLs are as everywhere. Other names and rows are within their source: `adopted:SOURCE/NAME`, or
    `adopted:SOURCE#ROW`, with the file's name before # if it is not the source's.
    """
    # A row without a name is known by its number.
    if not name:
        return f"{SCHEME}{source}#{row}" if file == source else f"{SCHEME}{source}/{file}#{row}"
    if name.startswith("file://"):
        name = os.fsdecode(unquote_to_bytes(os.fsencode(name.removeprefix("file://"))))
    if os.path.isabs(name):
        return make_file_uri(os.path.abspath(name))
    if is_web_url(name) or (storage.is_remote(name) and storage.has_credentials(name)):
        return strip_url_secrets(name)
    return name if storage.is_remote(name) else f"{SCHEME}{source}/{name}"
