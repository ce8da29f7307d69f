"""Encodings in: raw vectors that another program computed, from Parquet, .npz, .npy or .bin, a batch at a time."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facepipe import storage
from facepipe.adoption import npy
from facepipe.adoption.features import (
    FeatureShape,
    describe_labels,
    is_feature_file,
    measure_features,
    read_features,
    read_labels,
)
from facepipe.arrow import read_embeddings, to_float_lists
from facepipe.errors import ConfigError, SourceError
from facepipe.gallery.contract import CONTRACT_PROPERTY, FEATURES
from facepipe.schema import DEFAULT_DIM
from facepipe.sources.labels import LABEL_COLUMNS, format_label, format_labels
from facepipe.sources.parquet import URI_COLUMNS, list_parquet_files
from facepipe.text import escape_undecodable
from facepipe.types import Float32

Names = Literal["auto", "people", "images"]
"""Whom a column `name` names."""

# Names of columns by role; of several that are there the first one counts.
_VECTORS = ("embedding", "encoding", "vector", "embeddings", "encodings", "vectors")
_URIS = (*URI_COLUMNS, "uris", "paths", "files")
_IDENTITIES = (*LABEL_COLUMNS, "identities", "labels", "people")
_NAMES = ("name", "names")
_BOXES = ("box", "boxes")  # x1, y1, x2, y2
_LOCATIONS = ("location", "locations", "face_location", "face_locations")  # face_recognition's top, right, bottom, left
# Positions of x1, y1, x2, y2 in a location.
_LOCATION_TO_BOX = (3, 0, 1, 2)
# Rows per batch.
_ROWS = 16384
_PICKLE = """{path} is not a Parquet, .npz or .npy file. If it is a pickle: opening one runs whatever is in it, so
facepipe opens none. Convert a file of your own yourself, here one that holds a dictionary with encodings and names:
    import pickle, numpy as np
    data = pickle.load(open({path!r}, "rb"))
    np.savez("encodings.npz", encodings=np.array(data["encodings"]), names=np.array(data["names"], str))
docs/operations.md shows other forms"""

ENCODINGS = pa.schema(
    [
        ("file", pa.string()),  # as the user knows it: the file's name, or its path below the folder
        ("row", pa.int64()),
        ("name", pa.string()),  # of the image, as the file has it
        ("identity", pa.string()),
        ("vector", pa.list_(pa.float32())),  # null for a list of another length than the others
        ("length", pa.int64()),
        ("box", pa.list_(pa.float32())),  # x1, y1, x2, y2
    ]
)


@dataclass(frozen=True)
class ColumnRoles:
    """Which column is what.

    Attributes:
        vector: Column of the encodings; empty for the one array of an .npy.
        uri: Column that names the image; None if there is none.
        identity: Column that says who it is; None if there is none.
        box: Column of the face's box; None if there is none.
    """

    vector: str
    uri: str | None
    identity: str | None
    box: str | None

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read, each once."""
        return tuple(dict.fromkeys(name for name in (self.vector, self.uri, self.identity, self.box) if name))


@dataclass(frozen=True)
class EncodingSource:
    """Files of encodings with the same columns.

    Attributes:
        path: Path or URL of the file or folder.
        files: Paths of the files.
        roles: Which column is what.
        contract: The contract in a Parquet file that facepipe wrote, as JSON; None if there is none.
        dim: Numbers per vector: of all of them, or of most at the beginning of lists of any length.
        labels: File of a label per row, if they are in one.
        feature_rows: Vectors of a file of raw numbers.
    """

    path: str
    files: tuple[str, ...]
    roles: ColumnRoles
    contract: str | None = None
    dim: int = DEFAULT_DIM
    labels: str | None = None
    feature_rows: int = 0

    @property
    def is_features(self) -> bool:
        """Whether it is a file of raw numbers, which says nothing of its model."""
        return is_feature_file(self.files[0])

    def batches(self) -> Iterator[pa.Table]:
        """Yield tables of the schema ENCODINGS, in the files' order. Raises SourceError if a file cannot be read."""
        for path in self.files:
            label = _make_label(path, self.path)
            # Rows are counted over the batches of a file: their numbers name rows without a name.
            first = 0
            for columns in self._read_file(path):
                count = len(columns["length"])
                numbers = {"file": pa.array([label] * count), "row": pa.array(range(first, first + count), pa.int64())}
                yield pa.table({**numbers, **columns}).select(ENCODINGS.names).cast(ENCODINGS)
                first += count

    def _read_file(self, path: str) -> Iterator[dict[str, Any]]:
        if is_feature_file(path):
            return _read_features(path, FeatureShape(self.feature_rows, self.dim), self.labels)
        if _is_parquet(path):
            return _read_parquet(path, self.roles, self.dim)
        return _read_numpy(path, self.roles)


def open_encodings(
    path: str, names: Names = "auto", *, labels: str | None = None, dim: int | None = None
) -> EncodingSource:
    """Open the encodings at a path.

    Args:
        path: a Parquet file or folder, an .npz or an .npy file, or a .bin of raw float32 numbers.
        names: whom a column `name` names: people (as in face_recognition's examples) or images. With auto it is images
            if another column says who it is, else people.
        labels: file of a label per line, for a .bin.
        dim: numbers per vector; by default as many as the file has.

    Raises:
        SourceError: there is nothing, or a file is cut short.
        ConfigError: the file is of another kind (such as a pickle), or its vectors have another length.
    """
    path = storage.to_absolute(path)
    if not storage.may_exist(path):
        raise SourceError(f"no such file or folder: {path!r}")
    # A folder of images gives no files here: the kind of its first file decides.
    files = list(list_parquet_files(path).files) or ([] if os.path.isdir(path) else [path])
    if not files:
        raise SourceError(f"no Parquet file in {path!r}: name a Parquet file or folder, an .npz or an .npy file")
    if is_feature_file(files[0]):
        labels = None if labels is None else storage.to_absolute(labels)
        shape = measure_features(path, labels, dim)
        roles = ColumnRoles("", None, describe_labels(labels), None)
        return EncodingSource(path, (path,), roles, dim=shape.dim, labels=labels, feature_rows=shape.rows)
    if labels is not None:
        raise ConfigError(f"--labels is for a .bin of raw numbers; {files[0]} can hold a column or an array of labels")
    source = _open_tables(path, files, names)
    if dim is not None and dim != source.dim and not _has_free_length(source):
        raise ConfigError(
            f"{files[0]}: its vectors have {source.dim} numbers, not {dim}: name the model that made them, or "
            f"--embedder {FEATURES}NAME if it is not here"
        )
    return source if dim is None else replace(source, dim=dim)


def _has_free_length(source: EncodingSource) -> bool:
    """Tell whether each row of a source may have its own length."""
    if not _is_parquet(source.files[0]):
        return False
    with storage.open_seekable(source.files[0]) as file:
        kind = _open_parquet(file, source.files[0]).schema_arrow.field(source.roles.vector).type
    return not pa.types.is_fixed_size_list(kind)


def _open_tables(path: str, files: Sequence[str], names: Names) -> EncodingSource:
    """Open Parquet files or a file of arrays."""
    # Columns and contract are those of the first file; later files are checked when they are read.
    if _is_parquet(files[0]):
        with storage.open_seekable(files[0]) as file:
            parquet = _open_parquet(file, files[0])
            schema = parquet.schema_arrow
            roles = _find_roles_in_schema(schema, files[0], names)
            dim = _find_dim(parquet, roles.vector, files[0])
        contract = (schema.metadata or {}).get(CONTRACT_PROPERTY.encode())
        return EncodingSource(path, tuple(files), roles, contract.decode() if contract else None, dim)
    # Of other files the first bytes tell arrays from what must not be opened.
    with storage.open_seekable(path) as file:
        magic = file.read(6)
    if not magic.startswith((b"PK\x03\x04", b"\x93NUMPY")):
        raise ConfigError(_PICKLE.format(path=path))
    headers = npy.read_headers(path)
    roles = _find_roles_in_arrays(headers, path, names)
    return EncodingSource(path, (path,), roles, dim=headers[roles.vector].shape[1])


def _find_dim(file: pq.ParquetFile, column: str, path: str) -> int:
    """Find how many numbers the vectors of a column have: all of them, or most of the first rows."""
    kind = file.schema_arrow.field(column).type
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size)
    try:
        batch = next(file.iter_batches(_ROWS, columns=[column]), None)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"cannot read {path!r}: {str(error).splitlines()[0]}") from error
    lengths = Counter(pc.list_value_length(batch[column]).drop_null().to_pylist() if batch else [])
    return int(lengths.most_common(1)[0][0]) if lengths else DEFAULT_DIM


def _is_parquet(path: str) -> bool:
    return path.endswith((".parquet", ".pq"))


def _make_label(path: str, root: str) -> str:
    return os.path.basename(path) if path == root else path.removeprefix(root).lstrip("/")


# ---- which column is what


def _find_roles(columns: Sequence[str], names: Names, where: str) -> ColumnRoles:
    """Find out from the names of columns which is what. Raises ConfigError if there are no encodings."""

    def pick(candidates: Sequence[str]) -> str | None:
        return next((name for name in candidates if name in columns), None)

    vector = pick(_VECTORS)
    uri = pick(_URIS)
    identity = pick(_IDENTITIES)
    name = pick(_NAMES)
    if vector is None:
        raise ConfigError(f"{where}: no column of encodings ({', '.join(_VECTORS)}) among {', '.join(columns)}")
    # A column of names says what the image is, or who it is, depending on the other columns.
    if names == "images" or (names == "auto" and identity is not None):
        uri = uri or name
    else:
        identity = identity or name
    return ColumnRoles(vector, uri, identity, pick((*_BOXES, *_LOCATIONS)))


def _find_roles_in_schema(schema: pa.Schema, where: str, names: Names) -> ColumnRoles:
    """Find out which column of a Parquet file is what, among those of a fitting type."""

    # A column of a wrong type is no candidate, so that another one of its role may be found.
    def fits(field: pa.Field) -> bool:
        kind = field.type
        if field.name in (*_VECTORS, *_BOXES, *_LOCATIONS):
            return _is_number_list(kind)
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        # A column of whole numbers with gaps comes as floats.
        is_label = pa.types.is_floating(kind) and field.name in _IDENTITIES
        return bool(is_text or pa.types.is_integer(kind) or is_label)

    return _find_roles([field.name for field in schema if fits(field)], names, where)


def _is_number_list(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return False
    return bool(pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))


def _find_roles_in_arrays(headers: dict[str, npy.NpyHeader], where: str, names: Names) -> ColumnRoles:
    """Find out which array is what. Raises ConfigError for arrays of a wrong shape or type."""
    is_single = list(headers) == [""]  # the one array of an .npy
    roles = ColumnRoles("", None, None, None) if is_single else _find_roles(list(headers), names, where)
    # The vectors decide how many rows the other arrays must have.
    shape = headers[roles.vector].shape
    if len(shape) != 2 or headers[roles.vector].dtype.kind not in "fiu":
        raise ConfigError(f"{where}: {roles.vector or 'the array'} is {shape}, not (n, dim) numbers")
    for name in roles.columns or ("",):
        header = headers[name]
        npy.check_array(header, f"{where}: {name}" if name else where)
        needed = (shape[0], 4) if name == roles.box else shape[:1]
        if name != roles.vector and header.shape != needed:
            raise ConfigError(f"{where}: {name} is {header.shape}, and {roles.vector} needs {needed}")
        allowed = {roles.uri: "USiu", roles.identity: "USiuf"}.get(name)
        if allowed and header.dtype.kind not in allowed:
            raise ConfigError(f"{where}: {name} holds {header.dtype}, not texts")
        if name == roles.box and header.dtype.kind not in "fiu":
            raise ConfigError(f"{where}: {name} holds {header.dtype}, not numbers")
    return roles


# ---- reading


def _open_parquet(file: Any, path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"cannot read {path!r}: {str(error).splitlines()[0]}") from error


def _read_parquet(path: str, roles: ColumnRoles, dim: int) -> Iterator[dict[str, Any]]:
    """Yield the columns `name` to `box` of ENCODINGS from a Parquet file."""
    with storage.open_seekable(path) as handle:
        file = _open_parquet(handle, path)
        schema = file.schema_arrow
        # A file in which another column would be taken for the vectors must not be mixed with the first.
        has_vector = _find_roles_in_schema(schema, path, "auto").vector == roles.vector
        if not has_vector or set(roles.columns) - set(schema.names):
            raise ConfigError(f"{path} has other columns than the first file: {', '.join(schema.names)}")
        try:
            for batch in file.iter_batches(_ROWS, columns=list(roles.columns)):
                yield _convert_batch(batch, roles, dim)
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"cannot read {path!r}: {str(error).splitlines()[0]}") from error


def _convert_batch(batch: pa.RecordBatch, roles: ColumnRoles, dim: int) -> dict[str, Any]:
    absent = pa.nulls(batch.num_rows, pa.string())
    column = batch[roles.vector]
    # Vectors (n, dim), and the mask (n,) of rows that have all numbers.
    vectors, is_complete = read_embeddings(column, dim)
    boxes = pa.nulls(batch.num_rows, pa.list_(pa.float32()))
    if roles.box:
        boxes = _convert_boxes(batch[roles.box], roles.box)
    return {
        "name": batch[roles.uri].cast(pa.string()) if roles.uri else absent,
        "identity": pa.array(format_labels(batch[roles.identity]), pa.string()) if roles.identity else absent,
        "vector": to_float_lists(vectors[is_complete], is_complete),
        "length": pc.list_value_length(column).cast(pa.int64()),
        "box": boxes,
    }


def _convert_boxes(column: pa.Array, name: str) -> pa.Array:
    """Convert boxes to x1, y1, x2, y2; lists of another length pass, to be refused later."""
    lists = column.cast(pa.list_(pa.float32()))
    if name not in _LOCATIONS:
        return lists
    # Put the numbers into the order of a box; odd lengths stay for `check_boxes`.
    boxes = [
        [row[n] for n in _LOCATION_TO_BOX] if row is not None and len(row) == 4 else row for row in lists.to_pylist()
    ]
    return pa.array(boxes, lists.type)


def _read_numpy(path: str, roles: ColumnRoles) -> Iterator[dict[str, Any]]:
    """Yield the columns `name` to `box` of ENCODINGS from an .npz or .npy file."""
    names = roles.columns or ("",)
    # All arrays give the same rows at a time.
    for row_arrays in npy.read_rows(path, names, _ROWS):
        arrays = dict(zip(names, row_arrays, strict=True))
        vectors = _to_float32(arrays[roles.vector])
        count = len(vectors)
        boxes = pa.nulls(count, pa.list_(pa.float32()))
        if roles.box:
            boxes = _convert_boxes(to_float_lists(_to_float32(arrays[roles.box])), roles.box)
        yield {
            "name": _to_texts(arrays[roles.uri]) if roles.uri else pa.nulls(count, pa.string()),
            "identity": _to_labels(arrays[roles.identity]) if roles.identity else pa.nulls(count, pa.string()),
            "vector": to_float_lists(vectors),
            "length": pa.array(np.full(count, vectors.shape[1], np.int64)),
            "box": boxes,
        }


def _read_features(path: str, shape: FeatureShape, labels: str | None) -> Iterator[dict[str, Any]]:
    """Yield the columns `name` to `box` of ENCODINGS from a file of raw numbers."""
    identities = read_labels(labels, _ROWS) if labels else None
    for vectors in read_features(path, shape, _ROWS):
        count = len(vectors)
        absent = pa.nulls(count, pa.string())
        identity = absent if identities is None else next(identities, absent[:0])
        if len(identity) != count:
            raise SourceError(f"{labels} has fewer labels than when it was opened")
        yield {
            "name": absent,
            "identity": identity,
            "vector": to_float_lists(vectors),
            "length": pa.array(np.full(count, shape.dim, np.int64)),
            "box": pa.nulls(count, pa.list_(pa.float32())),
        }


def _to_float32(array: npt.NDArray[np.generic]) -> Float32:
    # A number that is too large for single precision becomes infinite, and is refused later.
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(np.float32)


def _to_texts(array: npt.NDArray[np.generic]) -> pa.Array:
    values = (os.fsdecode(value) if isinstance(value, bytes) else str(value) for value in array.tolist())
    return pa.array([escape_undecodable(value) for value in values], pa.string())


def _to_labels(array: npt.NDArray[np.generic]) -> pa.Array:
    return pa.array([format_label(value) for value in array], pa.string())
