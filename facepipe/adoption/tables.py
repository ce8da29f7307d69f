"""Encodings in: raw 128-D vectors that another program computed, from Parquet, .npz or .npy, a batch at a time."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facepipe import storage
from facepipe.adoption import npy
from facepipe.arrow import read_embeddings, to_float_lists
from facepipe.errors import ConfigError, SourceError
from facepipe.gallery.contract import CONTRACT_PROPERTY
from facepipe.schema import EMBEDDING_DIM
from facepipe.sources.parquet import IDENTITY_COLUMNS, URI_COLUMNS, list_parquet_files
from facepipe.types import Float32

Names = Literal["auto", "people", "images"]

_VECTORS = ("embedding", "encoding", "vector", "embeddings", "encodings", "vectors")
_URIS = (*URI_COLUMNS, "uris", "paths", "files")
_IDENTITIES = (*IDENTITY_COLUMNS, "identities", "labels", "people")
_NAMES = ("name", "names")
_BOXES = ("box", "boxes")  # x1, y1, x2, y2
_LOCATIONS = ("location", "locations", "face_location", "face_locations")  # face_recognition's top, right, bottom, left
_TO_BOX = (3, 0, 1, 2)
_ROWS = 16384
_PICKLE = """{path} is no Parquet, .npz or .npy file. If it is a pickle: opening one runs whatever is in it, so that
facepipe opens none. Convert a file of your own yourself, here one that holds a dictionary with encodings and names:
    import pickle, numpy as np
    data = pickle.load(open({path!r}, "rb"))
    np.savez("encodings.npz", encodings=np.array(data["encodings"]), names=np.array(data["names"], str))
docs/operations.md shows other forms"""

ENCODINGS = pa.schema(
    [
        ("file", pa.string()),  # as the user knows it: the file's name, or its path below the folder
        ("row", pa.int64()),
        ("name", pa.string()),  # of the image, as given
        ("identity", pa.string()),
        ("vector", pa.list_(pa.float32())),  # 128 numbers; null where it is no vector of that many
        ("length", pa.int64()),
        ("box", pa.list_(pa.float32())),  # x1, y1, x2, y2
    ]
)


@dataclass(frozen=True)
class ColumnRoles:
    """Which column is what; None where there is none."""

    vector: str
    uri: str | None
    identity: str | None
    box: str | None

    @property
    def columns(self) -> tuple[str, ...]:
        """All that are read, each once."""
        return tuple(dict.fromkeys(name for name in (self.vector, self.uri, self.identity, self.box) if name))


@dataclass(frozen=True)
class EncodingSource:
    """Files of encodings with the same columns. contract: what a Parquet file of facepipe says its models were."""

    path: str
    files: tuple[str, ...]
    roles: ColumnRoles
    contract: str | None = None

    def batches(self) -> Iterator[pa.Table]:
        """Tables of the schema ENCODINGS, in the files' order. Raises SourceError where a file cannot be read."""
        for path in self.files:
            label, first = _label(path, self.path), 0
            for columns in _parquet(path, self.roles) if _is_parquet(path) else _numpy(path, self.roles):
                count = len(columns["length"])
                numbers = {"file": pa.array([label] * count), "row": pa.array(range(first, first + count), pa.int64())}
                yield pa.table({**numbers, **columns}).select(ENCODINGS.names).cast(ENCODINGS)
                first += count


def open_encodings(path: str, names: Names = "auto") -> EncodingSource:
    """The encodings at a path: a Parquet file or folder, an .npz or an .npy file.

    names: whom a column `name` names: people (as face_recognition's examples do), images, or, with auto, images where
    another column says who it is, else people. Raises SourceError where there is nothing, ConfigError for a file of
    another kind (pickles among them), or without 128-D vectors.
    """
    path = storage.to_absolute(path)
    if not storage.may_exist(path):
        raise SourceError(f"no such file or folder: {path!r}")
    files = list_parquet_files(path) or ([] if os.path.isdir(path) else [path])
    if not files:
        raise SourceError(f"no Parquet file in {path!r}: name a Parquet file or folder, an .npz or an .npy file")
    if _is_parquet(files[0]):
        with storage.open_seekable(files[0]) as file:
            schema = _opened(file, files[0]).schema_arrow
        said = (schema.metadata or {}).get(CONTRACT_PROPERTY.encode())
        return EncodingSource(path, tuple(files), _of_schema(schema, files[0], names), said.decode() if said else None)
    with storage.open_seekable(path) as file:
        magic = file.read(6)
    if not magic.startswith((b"PK\x03\x04", b"\x93NUMPY")):
        raise ConfigError(_PICKLE.format(path=path))
    return EncodingSource(path, (path,), _of_arrays(npy.read_headers(path), path, names))


def _is_parquet(path: str) -> bool:
    return path.endswith((".parquet", ".pq"))


def _label(path: str, root: str) -> str:
    return os.path.basename(path) if path == root else path.removeprefix(root).lstrip("/")


def _roles(columns: Sequence[str], names: Names, where: str) -> ColumnRoles:
    def first(candidates: Sequence[str]) -> str | None:
        return next((name for name in candidates if name in columns), None)

    vector, uri, identity, name = first(_VECTORS), first(_URIS), first(_IDENTITIES), first(_NAMES)
    if vector is None:
        raise ConfigError(f"{where}: no column of encodings ({', '.join(_VECTORS)}) among {', '.join(columns)}")
    if names == "images" or (names == "auto" and identity is not None):
        uri = uri or name
    else:
        identity = identity or name
    return ColumnRoles(vector, uri, identity, first((*_BOXES, *_LOCATIONS)))


def _of_schema(schema: pa.Schema, where: str, names: Names) -> ColumnRoles:
    def fits(field: pa.Field) -> bool:
        kind = field.type
        if field.name in (*_VECTORS, *_BOXES, *_LOCATIONS):
            return _is_list(kind)
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind))

    roles = _roles([field.name for field in schema if fits(field)], names, where)
    kind = schema.field(roles.vector).type
    if pa.types.is_fixed_size_list(kind) and kind.list_size != EMBEDDING_DIM:
        raise ConfigError(f"{where}: {roles.vector} has {kind.list_size} dimensions, not {EMBEDDING_DIM}")
    return roles


def _is_list(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return False
    return bool(pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))


def _of_arrays(found: dict[str, npy.NpyHeader], where: str, names: Names) -> ColumnRoles:
    roles = ColumnRoles("", None, None, None) if list(found) == [""] else _roles(list(found), names, where)
    shape, kind = found[roles.vector].shape, found[roles.vector].dtype.kind
    if len(shape) != 2 or shape[1] != EMBEDDING_DIM or kind not in "fiu":
        raise ConfigError(f"{where}: {roles.vector or 'the array'} is {shape}, not (n, {EMBEDDING_DIM}) numbers")
    for name in roles.columns or ("",):
        npy.check_array(found[name], f"{where}: {name}" if name else where)
        wanted = (shape[0], 4) if name == roles.box else shape[:1]
        if name != roles.vector and found[name].shape != wanted:
            raise ConfigError(f"{where}: {name} is {found[name].shape}, and {roles.vector} needs {wanted}")
        if name in (roles.uri, roles.identity) and found[name].dtype.kind not in "USiu":
            raise ConfigError(f"{where}: {name} holds {found[name].dtype}, not texts")
        if name == roles.box and found[name].dtype.kind not in "fiu":
            raise ConfigError(f"{where}: {name} holds {found[name].dtype}, not numbers")
    return roles


def _opened(file: Any, path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"cannot read {path!r}: {str(error).splitlines()[0]}") from error


def _parquet(path: str, roles: ColumnRoles) -> Iterator[dict[str, Any]]:
    with storage.open_seekable(path) as handle:
        file = _opened(handle, path)
        held = file.schema_arrow
        if _of_schema(held, path, "auto").vector != roles.vector or set(roles.columns) - set(held.names):
            raise ConfigError(f"{path} has other columns than the first file: {', '.join(held.names)}")
        try:
            for batch in file.iter_batches(_ROWS, columns=list(roles.columns)):
                yield _of_batch(batch, roles)
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"cannot read {path!r}: {str(error).splitlines()[0]}") from error


def _of_batch(batch: pa.RecordBatch, roles: ColumnRoles) -> dict[str, Any]:
    nothing = pa.nulls(batch.num_rows, pa.string())
    column = batch[roles.vector]
    vectors, good = read_embeddings(column)
    lengths = pc.list_value_length(column)
    return {
        "name": batch[roles.uri].cast(pa.string()) if roles.uri else nothing,
        "identity": batch[roles.identity].cast(pa.string()) if roles.identity else nothing,
        "vector": to_float_lists(vectors[good], good),
        "length": lengths.cast(pa.int64()),
        "box": _boxes(batch[roles.box], roles.box) if roles.box else pa.nulls(batch.num_rows, pa.list_(pa.float32())),
    }


def _boxes(column: pa.Array, name: str) -> pa.Array:
    """Boxes as x1, y1, x2, y2; lists of another length come through, to be refused later."""
    lists = column.cast(pa.list_(pa.float32()))
    if name not in _LOCATIONS:
        return lists
    turned = [row and [row[at] for at in _TO_BOX] if row and len(row) == 4 else row for row in lists.to_pylist()]
    return pa.array(turned, lists.type)


def _numpy(path: str, roles: ColumnRoles) -> Iterator[dict[str, Any]]:
    names = roles.columns or ("",)
    for arrays in npy.read_rows(path, names, _ROWS):
        held = dict(zip(names, arrays, strict=True))
        vectors = _floats(held[roles.vector])
        count = len(vectors)
        boxes = pa.nulls(count, pa.list_(pa.float32()))
        if roles.box:
            boxes = _boxes(to_float_lists(_floats(held[roles.box])), roles.box)
        yield {
            "name": _texts(held[roles.uri]) if roles.uri else pa.nulls(count, pa.string()),
            "identity": _texts(held[roles.identity]) if roles.identity else pa.nulls(count, pa.string()),
            "vector": to_float_lists(vectors),
            "length": pa.array(np.full(count, EMBEDDING_DIM, np.int64)),
            "box": boxes,
        }


def _floats(array: npt.NDArray[np.generic]) -> Float32:
    with np.errstate(over="ignore", invalid="ignore"):  # too large for single precision: infinite, and refused later
        return array.astype(np.float32)


def _texts(array: npt.NDArray[np.generic]) -> pa.Array:
    values = (value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in array.tolist())
    return pa.array([value.encode("utf-8", "replace").decode("utf-8") for value in values], pa.string())
