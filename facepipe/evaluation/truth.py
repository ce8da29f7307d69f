"""Who the faces of a gallery are, by its own labels or by a truth file: one row a face, as arrays."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from facepipe import storage
from facepipe.errors import EvaluationError, StorageError
from facepipe.gallery import Gallery
from facepipe.hashing import hash64
from facepipe.sorted_lookup import is_in_sorted, look_up_sorted
from facepipe.types import Float32, Int64, UInt64

Names = dict[str, int]
_ROWS = 65536
_NOBODY = -1
LEFT_OUT = -2
_TRUTH_TYPES = {"identity": pa.string(), "uri": pa.string(), "face_id": pa.int64()}


@dataclass(frozen=True)
class Labels:
    """n labelled faces: ids (n,) ascending; codes (n,) into `names`, or LEFT_OUT for further faces of their photos."""

    ids: Int64
    codes: Int64
    names: Names

    def of(self, ids: Int64) -> Int64:
        """Codes (m,) of faces (m,); -1 of those without a label, LEFT_OUT of those that it does not belong to."""
        return look_up_sorted(self.ids, self.codes, ids)


def gallery_labels(gallery: Gallery) -> Labels:
    """The gallery's own `identity`. The label of a photo with several faces belongs to the largest."""
    names: Names = {}
    return _of_photos(gallery, names, lambda batch, _: encode(batch["identity"], names))


def file_labels(gallery: Gallery, path: str) -> Labels:
    """A truth file, CSV or Parquet: `identity`, which may be empty, and `face_id` or `uri`.

    A label by uri belongs to the largest face of the photo. Raises EvaluationError for a file that cannot be used.
    """
    names: Names = {}
    table = _read_truth(path)
    codes = encode(table["identity"].fill_null(""), names)
    if "face_id" in table.column_names:
        return Labels(*_unique(table["face_id"].to_numpy(), codes, table["face_id"], path), names)
    uris, codes = _unique(_hashes(table["uri"]), codes, table["uri"], path)
    return _of_photos(gallery, names, lambda _, hashes: look_up_sorted(uris, codes, hashes))


def encode(column: Any, names: Names) -> Int64:
    """Codes (n,) of a string column, -1 of null; names that are new get the next code."""
    if isinstance(column, pa.ChunkedArray):
        return np.concatenate([np.empty(0, np.int64), *(encode(chunk, names) for chunk in column.chunks)])
    found = column.dictionary_encode()
    codes = np.array([names.setdefault(name, len(names)) for name in found.dictionary.to_pylist()] + [_NOBODY])
    return np.asarray(codes[found.indices.fill_null(len(codes) - 1).to_numpy(zero_copy_only=False)], np.int64)


def read_table(path: str, columns: dict[str, pa.DataType], what: str, remedy: str) -> pa.Table:
    """Columns of a Parquet file in the types given, without rows that lack a face_id; no face may stand there twice."""
    with _reading(path, what, remedy), storage.open_seekable(path) as handle, pq.ParquetFile(handle) as file:
        missing = [name for name in columns if name not in file.schema_arrow.names]
        if missing:
            raise EvaluationError(
                f"{path!r} is no {what}: it has no column {', '.join(missing)}; "
                f"its columns are {', '.join(file.schema_arrow.names)}"
            )
        table = _cast(file.read(list(columns)), columns)
    return table.filter(table["face_id"].is_valid())


def check_made_from(gallery: Gallery, ids: Int64, path: str, what: str) -> None:
    """Raise EvaluationError for a table that names a face twice, or none that the gallery holds."""
    if not len(ids):
        raise EvaluationError(f"the {what} {path!r} holds no face: there is nothing to judge")
    known = np.unique(ids)
    if len(known) < len(ids):
        raise EvaluationError(f"the {what} {path!r} has {len(ids) - len(known)} rows too many: a face_id stands twice")
    for batch in gallery.batches(["face_id"], "face_id is not null", rows=_ROWS):
        held = batch["face_id"].to_numpy()
        if is_in_sorted(known, held).any():
            return
    raise EvaluationError(
        f"the {what} {path!r} was made from other faces: none of its {len(ids)} face_ids is in {gallery.path!r}; "
        "make it again from this gallery"
    )


def _read_truth(path: str) -> pa.Table:
    with _reading(path, "truth file", "give a CSV or Parquet file"), storage.open_seekable(path) as handle:
        table = _truth_columns(handle)
        key = "face_id" if "face_id" in table.column_names else "uri"
        if not {"identity", key} <= set(table.column_names):
            raise EvaluationError(
                f"the truth file {path!r} needs the columns identity and face_id or uri; "
                f"its columns are {', '.join(table.column_names)}"
            )
        table = _cast(table, {name: _TRUTH_TYPES[name] for name in (key, "identity")})
    if table[key].null_count:
        raise EvaluationError(f"the truth file {path!r} has {table[key].null_count} rows without a {key}: fill them in")
    return table


def _truth_columns(handle: BinaryIO) -> pa.Table:
    magic = handle.read(4)
    handle.seek(0)
    if magic == b"PAR1":
        return pq.read_table(handle)
    # Names such as NA or null are names.
    options = csv.ConvertOptions(column_types=_TRUTH_TYPES, strings_can_be_null=False)
    return csv.read_csv(handle, convert_options=options)


@contextmanager
def _reading(path: str, what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        raise EvaluationError(f"no {what}: {error}; {remedy}") from error
    except (pa.ArrowException, OSError) as error:
        raise EvaluationError(f"cannot read the {what} {path!r}: {str(error).splitlines()[0]}; {remedy}") from error


def _cast(table: pa.Table, columns: dict[str, pa.DataType]) -> pa.Table:
    return pa.table({name: table[name].cast(kind) for name, kind in columns.items()})


def _unique(keys: npt.NDArray[Any], codes: Int64, shown: Any, path: str) -> tuple[npt.NDArray[Any], Int64]:
    """Keys ascending and their codes; a key may stand twice with one code, but not with two."""
    order = np.argsort(keys, kind="stable")
    keys, codes = keys[order], codes[order]
    again = np.flatnonzero(keys[1:] == keys[:-1]) + 1
    torn = again[codes[again] != codes[again - 1]]
    if torn.size:
        raise EvaluationError(
            f"the truth file {path!r} gives {shown[int(order[torn[0]])].as_py()!r} two identities; "
            f"{torn.size} such rows: keep one of each"
        )
    return np.delete(keys, again), np.delete(codes, again)


def _of_photos(gallery: Gallery, names: Names, label: Callable[[pa.RecordBatch, UInt64], Int64]) -> Labels:
    """The faces of every photo that has a label; all but the largest (of equal ones the smallest id) are LEFT_OUT."""
    parts: list[tuple[npt.NDArray[Any], ...]] = []
    for batch in gallery.batches(["face_id", "uri", "identity", "box"], ds.field("face_id").is_valid(), rows=_ROWS):
        hashes = _hashes(batch["uri"])
        codes = label(batch, hashes)
        kept = codes != _NOBODY
        columns = (batch["face_id"].to_numpy(), codes, hashes, _areas(batch["box"]))
        parts.append(tuple(column[kept] for column in columns))
    if not parts:
        return Labels(np.empty(0, np.int64), np.empty(0, np.int64), names)
    ids, codes, hashes, areas = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((ids, -areas, hashes))
    first = np.ones(len(order), np.bool_)
    first[1:] = hashes[order[1:]] != hashes[order[:-1]]
    codes[order[~first]] = LEFT_OUT
    order = np.argsort(ids)
    return Labels(ids[order], codes[order], names)


def _areas(boxes: pa.ListArray) -> Float32:
    """Areas (n,) of boxes x1, y1, x2, y2 in pixels; 0 where there is none."""
    areas = np.zeros(len(boxes), np.float32)
    corners = boxes.flatten().to_numpy(zero_copy_only=False).reshape(-1, 4)
    areas[boxes.is_valid().to_numpy(zero_copy_only=False)] = np.prod(corners[:, 2:] - corners[:, :2], axis=1)
    return areas


def _hashes(uris: Any) -> UInt64:
    return np.array([hash64(uri) for uri in uris.to_pylist()], np.uint64)
