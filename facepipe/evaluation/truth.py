"""Read who the faces of a gallery are, from its own labels or from a truth file, as arrays."""

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
from facepipe.arrow import set_columns
from facepipe.errors import EvaluationError, StorageError
from facepipe.gallery import Gallery
from facepipe.hashing import hash64
from facepipe.sorted_lookup import is_in_sorted, look_up_sorted
from facepipe.sources.labels import format_labels
from facepipe.text import restore_cell
from facepipe.types import Float32, Int64, UInt64

Names = dict[str, int]
_ROWS = 65536
_NO_LABEL = -1
LEFT_OUT = -2  # code of a face that shares its photo with the face that the label belongs to
_TRUTH_TYPES = {"identity": pa.string(), "uri": pa.string(), "face_id": pa.int64()}


@dataclass(frozen=True)
class TruthLabels:
    """The labels of n faces.

    Attributes:
        ids: Face ids, (n,), ascending.
        codes: Code of each face's identity, (n,), or LEFT_OUT for further faces of a labelled photo.
        names: Code of each name. The empty name stands for no identity.
    """

    ids: Int64
    codes: Int64
    names: Names

    def look_up(self, ids: Int64) -> Int64:
        """Look up the codes (m,) of faces (m,): -1 without a label, LEFT_OUT if the label is another face's."""
        return look_up_sorted(self.ids, self.codes, ids)


def read_gallery_labels(gallery: Gallery) -> TruthLabels:
    """Read the gallery's own `identity`. The label of a photo with several faces belongs to the largest."""
    names: Names = {}
    return _label_photos(gallery, names, lambda batch, _: encode_names(batch["identity"], names))


def read_truth_file(gallery: Gallery, path: str) -> TruthLabels:
    """Read a truth file. A label by uri belongs to the largest face of the photo.

    Args:
        gallery: the gallery.
        path: path of a CSV or Parquet file with `identity`, which may be empty, and `face_id` or `uri`.

    Raises:
        EvaluationError: if the file cannot be used.
    """
    names: Names = {}
    table = _read_truth(path)
    codes = encode_names(table["identity"].fill_null(""), names)
    # An id names one face. A uri names a photo, and its label is that of the largest face.
    if "face_id" in table.column_names:
        ids, codes = _sort_unique(table["face_id"].to_numpy(), codes, table["face_id"], path)
        return TruthLabels(ids, codes, names)
    uris, codes = _sort_unique(_hash_uris(table["uri"]), codes, table["uri"], path)
    return _label_photos(gallery, names, lambda _, hashes: look_up_sorted(uris, codes, hashes))


def encode_names(column: Any, names: Names) -> Int64:
    """Encode a string column as codes (n,), -1 for null. New names are added to `names` with the next code."""
    if isinstance(column, pa.ChunkedArray):
        return np.concatenate([np.empty(0, np.int64), *(encode_names(chunk, names) for chunk in column.chunks)])
    encoded = column.dictionary_encode()
    codes = [names.setdefault(name, len(names)) for name in encoded.dictionary.to_pylist()]
    codes.append(_NO_LABEL)  # of null
    indices = encoded.indices.fill_null(len(codes) - 1).to_numpy(zero_copy_only=False)
    return np.asarray(np.array(codes)[indices], np.int64)


def read_face_table(
    path: str, columns: dict[str, pa.DataType], what: str, remedy: str, later: dict[str, pa.DataType] | None = None
) -> pa.Table:
    """Read columns of a Parquet file, without the rows that lack a face_id.

    Args:
        path: path of the file.
        columns: columns to read, with their types.
        what: what the file is, for error messages.
        remedy: what to do if it cannot be read, for error messages.
        later: further columns, which tables of older versions lack. They are null then.

    Raises:
        EvaluationError: if the file cannot be read or lacks a column.
    """
    with _map_errors(path, what, remedy), storage.open_seekable(path) as handle, pq.ParquetFile(handle) as file:
        missing = [name for name in columns if name not in file.schema_arrow.names]
        if missing:
            raise EvaluationError(
                f"{path!r} is not a {what}: it has no column {', '.join(missing)}; "
                f"its columns are {', '.join(file.schema_arrow.names)}"
            )
        known = {name: kind for name, kind in (later or {}).items() if name in file.schema_arrow.names}
        table = _cast(file.read([*columns, *known]), columns | known)
    for name, kind in (later or {}).items():
        if name not in known:
            table = table.append_column(name, pa.nulls(len(table), kind))
    return table.filter(table["face_id"].is_valid())


def check_same_gallery(gallery: Gallery, ids: Int64, path: str, what: str) -> None:
    """Check that a table was made from a gallery.

    Args:
        gallery: the gallery.
        ids: face ids of the table, (n,).
        path: path of the table.
        what: what the table is, for error messages.

    Raises:
        EvaluationError: if it names a face twice, or no face of the gallery.
    """
    if not len(ids):
        raise EvaluationError(f"the {what} {path!r} holds no face: there is nothing to judge")
    known = np.unique(ids)
    repeated = len(ids) - len(known)
    if repeated:
        raise EvaluationError(f"the {what} {path!r} repeats face_ids in {repeated} rows: keep one row per face")
    # One face in common is enough, because the gallery may have changed since.
    for batch in gallery.batches(["face_id"], "face_id is not null", rows=_ROWS):
        if is_in_sorted(known, batch["face_id"].to_numpy()).any():
            return
    raise EvaluationError(
        f"the {what} {path!r} was made from other faces: none of its {len(ids)} face_ids is in {gallery.path!r}; "
        "make it again from this gallery"
    )


def _read_truth(path: str) -> pa.Table:
    """Read and check the columns of a truth file."""
    with _map_errors(path, "truth file", "give a CSV or Parquet file"), storage.open_seekable(path) as handle:
        table = _read_csv_or_parquet(handle)
        key = "face_id" if "face_id" in table.column_names else "uri"
        if not {"identity", key} <= set(table.column_names):
            raise EvaluationError(
                f"the truth file {path!r} needs the columns identity and face_id or uri; "
                f"its columns are {', '.join(table.column_names)}"
            )
        # Names are written as in the gallery, so that they are the same texts.
        identities = pa.array(format_labels(table["identity"]), pa.string())
        table = _cast(table, {key: _TRUTH_TYPES[key]}).append_column("identity", identities)
    if table[key].null_count:
        raise EvaluationError(f"the truth file {path!r} has {table[key].null_count} rows without a {key}: fill them in")
    return table


def _read_csv_or_parquet(handle: BinaryIO) -> pa.Table:
    # The first bytes tell the format, whatever the file's name.
    magic = handle.read(4)
    handle.seek(0)
    if magic == b"PAR1":
        return pq.read_table(handle)
    # Names such as NA or null are names.
    options = csv.ConvertOptions(column_types=_TRUTH_TYPES, strings_can_be_null=False)
    table = csv.read_csv(handle, convert_options=options)
    # Lists that facepipe wrote for spreadsheets have a mark before what looks like a formula.
    texts = [name for name in ("identity", "uri") if name in table.column_names]
    return set_columns(
        table, {name: pa.array(map(restore_cell, table[name].to_pylist()), pa.string()) for name in texts}
    )


@contextmanager
def _map_errors(path: str, what: str, remedy: str) -> Iterator[None]:
    """Turn errors of reading a file into EvaluationError."""
    try:
        yield
    except StorageError as error:
        raise EvaluationError(f"no {what}: {error}; {remedy}") from error
    except (pa.ArrowException, OSError) as error:
        raise EvaluationError(f"cannot read the {what} {path!r}: {str(error).splitlines()[0]}; {remedy}") from error


def _cast(table: pa.Table, columns: dict[str, pa.DataType]) -> pa.Table:
    return pa.table({name: table[name].cast(kind) for name, kind in columns.items()})


def _sort_unique(keys: npt.NDArray[Any], codes: Int64, column: Any, path: str) -> tuple[npt.NDArray[Any], Int64]:
    """Sort keys (n,) with their codes (n,), each once. A key may appear twice with one code, but not with two.

    Args:
        keys: keys.
        codes: codes.
        column: what the keys stand for, for the error message.
        path: path of the truth file.

    Raises:
        EvaluationError: if a key has two codes.
    """
    # A repeated key follows its first row after sorting; their codes must be equal.
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    codes = codes[order]
    repeated = np.flatnonzero(keys[1:] == keys[:-1]) + 1
    conflicts = repeated[codes[repeated] != codes[repeated - 1]]
    if conflicts.size:
        raise EvaluationError(
            f"the truth file {path!r} gives {column[int(order[conflicts[0]])].as_py()!r} two identities; "
            f"{conflicts.size} such rows: keep one of each"
        )
    return np.delete(keys, repeated), np.delete(codes, repeated)


def _label_photos(gallery: Gallery, names: Names, label: Callable[[pa.RecordBatch, UInt64], Int64]) -> TruthLabels:
    """Label the faces of every photo that has a label.

    All faces but the largest of a photo (of equal ones the smallest id) are LEFT_OUT.

    Args:
        gallery: the gallery.
        names: codes of the names.
        label: returns the codes (n,) of a batch, given the hashes (n,) of its uris.
    """
    ids = [np.empty(0, np.int64)]
    codes = [np.empty(0, np.int64)]
    hashes = [np.empty(0, np.uint64)]
    areas = [np.empty(0, np.float32)]
    # Collect id, code, photo and area of every labelled face.
    for batch in gallery.batches(["face_id", "uri", "identity", "box"], ds.field("face_id").is_valid(), rows=_ROWS):
        batch_hashes = _hash_uris(batch["uri"])
        batch_codes = label(batch, batch_hashes)
        is_labelled = batch_codes != _NO_LABEL
        ids.append(batch["face_id"].to_numpy()[is_labelled])
        codes.append(batch_codes[is_labelled])
        hashes.append(batch_hashes[is_labelled])
        areas.append(_compute_areas(batch["box"])[is_labelled])
    id_column = np.concatenate(ids)
    code_column = np.concatenate(codes)
    hash_column = np.concatenate(hashes)
    # The first face of each photo, in this order, has the label.
    order = np.lexsort((id_column, -np.concatenate(areas), hash_column))
    is_first = np.ones(len(order), np.bool_)
    is_first[1:] = hash_column[order[1:]] != hash_column[order[:-1]]
    code_column[order[~is_first]] = LEFT_OUT
    order = np.argsort(id_column)
    return TruthLabels(id_column[order], code_column[order], names)


def _compute_areas(boxes: pa.ListArray) -> Float32:
    """Compute the areas (n,) of boxes x1, y1, x2, y2 in pixels; 0 without a box."""
    areas = np.zeros(len(boxes), np.float32)
    # Corners (m, 4) of the rows that have a box: the others take no room.
    corners = boxes.flatten().to_numpy(zero_copy_only=False).reshape(-1, 4)
    areas[boxes.is_valid().to_numpy(zero_copy_only=False)] = np.prod(corners[:, 2:] - corners[:, :2], axis=1)
    return areas


def _hash_uris(uris: Any) -> UInt64:
    return np.array([hash64(uri) for uri in uris.to_pylist()], np.uint64)
