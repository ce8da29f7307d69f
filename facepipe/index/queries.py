"""Queries for a search: the faces of a gallery, or any Parquet files with a column of vectors, cut into blocks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facepipe import storage
from facepipe.arrow import read_embeddings
from facepipe.errors import ConfigError, ContractError, SourceError
from facepipe.gallery import Contract, Gallery
from facepipe.gallery.contract import CONTRACT_PROPERTY
from facepipe.gallery.deletion_vectors import RowChoice
from facepipe.hashing import hash64
from facepipe.schema import OK
from facepipe.sources.parquet import ParquetListing, has_images, list_parquet_files
from facepipe.types import Float32, Int64

VECTOR_COLUMNS = ("embedding", "vector")
"""Names of columns that hold vectors; of several that are there the first one counts."""
_VECTORS = " or ".join(VECTOR_COLUMNS)
_NAME_COLUMNS = ("query_id", "face_id", "id", "uri")  # columns that may name a query; the first one present wins
_BATCH_ROWS = 8192
_FIRST_ROWS = 64  # that tell the length of the vectors
# A shorter vector counts as zero. A norm within the tolerance of 1 is left as it is.
_ZERO_NORM = 1e-12
_UNIT_TOLERANCE = 1e-5


@dataclass(frozen=True)
class QueryFile:
    """A Parquet file of queries, as it was when the search was planned.

    Attributes:
        path: Path or URL of the file.
        column: Column of the vectors.
        fingerprint: Changes if the file may have changed.
        groups: Rows of each row group.
    """

    path: str
    column: str
    fingerprint: str
    groups: tuple[int, ...]


@dataclass(frozen=True)
class QueryPiece:
    """A part of a Parquet file.

    Attributes:
        path: Path or URL of the file.
        group: Row group; None for the whole file.
        first: Number of the first row.
        column: Column of the vectors.
        fingerprint: Of the file when the search was planned; empty for a gallery's file, which never changes.
        deleted: Numbers of rows of a gallery's file that the gallery has no more.
    """

    path: str
    group: int | None
    first: int = 0
    column: str = "embedding"
    fingerprint: str = ""
    deleted: tuple[int, ...] = ()


@dataclass(frozen=True)
class QueryBlock:
    """The unit of a bulk search: what is searched again after a crash.

    Attributes:
        number: Of the block in its source, from 0.
        pieces: Parts of files.
    """

    number: int
    pieces: tuple[QueryPiece, ...]


@dataclass(frozen=True)
class Queries:
    """Queries in memory.

    Attributes:
        names: Names, Arrow strings.
        uris: URIs of images, Arrow strings, null if unknown.
        own: Their own face ids (n,), or -1.
        vectors: Unit vectors (n, dim), zero if the query cannot be searched.
        status: `ok`, or why the query cannot be searched, (n,).
    """

    names: pa.Array
    uris: pa.Array
    own: Int64
    vectors: Float32
    status: npt.NDArray[np.object_]

    @classmethod
    def concatenate(cls, parts: "list[Queries]") -> "Queries":
        """Concatenate the rows of several."""
        return cls(
            names=pa.concat_arrays([part.names for part in parts]),
            uris=pa.concat_arrays([part.uris for part in parts]),
            own=np.concatenate([part.own for part in parts]),
            vectors=np.concatenate([part.vectors for part in parts]),
            status=np.concatenate([part.status for part in parts]),
        )


@dataclass(frozen=True)
class QuerySource:
    """Where queries come from.

    Attributes:
        path: Path or URL.
        fingerprint: Changes if the queries may have changed.
        gallery: Whether they are the faces of a gallery.
        version: Version of the gallery's table.
        files: The files, if they are not a gallery. What comes into the folder later is not searched for.
        notes: What a user may want to know of how the files are read.
    """

    path: str
    fingerprint: str
    gallery: bool
    version: int | None = None
    files: tuple[QueryFile, ...] = ()
    notes: tuple[str, ...] = ()

    def cut_blocks(self, rows: int) -> Iterator[QueryBlock]:
        """Cut the queries into blocks of about `rows`, the same ones on every call."""
        pieces: list[QueryPiece] = []
        total = 0
        number = 0
        for piece, count in self._list_pieces():
            pieces.append(piece)
            total += count
            if total >= rows:
                yield QueryBlock(number, tuple(pieces))
                pieces = []
                total = 0
                number += 1
        if pieces:
            yield QueryBlock(number, tuple(pieces))

    def count(self) -> int:
        """Count the queries, those that cannot be searched included."""
        return sum(rows for _, rows in self._list_pieces())

    def _list_pieces(self) -> Iterator[tuple[QueryPiece, int]]:
        """Yield each piece with its number of rows."""
        if self.gallery:
            # A file of a gallery is one piece. They are sorted, so that blocks are the same on every call.
            gallery = Gallery(self.path, self.version)
            for entry in sorted(gallery.files(), key=lambda entry: entry["path"]):
                if entry["faces"]:
                    deleted = gallery.deleted_rows.get(entry["path"])
                    rows = () if deleted is None else tuple(deleted.tolist())
                    path = storage.join(gallery.faces_folder, entry["path"])
                    yield QueryPiece(path, None, deleted=rows), entry["faces"]
            return
        # Other files are cut by row group.
        for file in self.files:
            first = 0
            for group, count in enumerate(file.groups):
                yield QueryPiece(file.path, group, first, file.column, file.fingerprint), count
                first += count


def open_queries(path: str, contract: Contract) -> QuerySource | None:
    """Open the queries at a path.

    Args:
        path: a gallery, a Parquet file, or a folder or prefix of these.
        contract: models of the gallery that is searched.

    Returns:
        None if the path is neither a gallery nor Parquet files with vectors; it may then hold images.

    Raises:
        ContractError: the queries say that they were made with other models.
        ConfigError: their dimension differs, or some files have vectors and others do not.
        SourceError: nothing is there, or a file cannot be read.
    """
    path = storage.to_absolute(path)
    # A path with wildcards can only be checked by expanding it.
    if not storage.may_exist(path) and not set("*?[") & set(path):
        raise SourceError(f"no such file or folder: {path!r}")
    if Gallery.exists(path):
        gallery = Gallery(path)
        contract.require(gallery.contract, "the gallery that is searched")
        return QuerySource(path, f"gallery {gallery.version}", True, gallery.version)
    listing = list_parquet_files(path)
    files: list[QueryFile] = []
    other: str | None = None
    for name in listing.files:
        file = _open_file(name, contract)
        if file is not None:
            files.append(file)
        else:
            other = other or name
        # Either all files hold vectors, or none does.
        if files and other:
            raise ConfigError(
                f"{other!r} has no column {_VECTORS}, and {files[0].path!r} has one: leave it out of the folder, or "
                "rename its column of embeddings"
            )
    if not files:
        return None
    mark = hash64(*(f"{file.path} {file.fingerprint}" for file in files))
    return QuerySource(path, f"parquet {mark:016x}", False, files=tuple(files), notes=_describe_files(files, listing))


def _open_file(path: str, contract: Contract) -> QueryFile | None:
    """Read what the footer of a file says; None if it has no column of vectors. Raises an error that names the file."""
    fingerprint = storage.get_entry(path).fingerprint
    with _open_parquet(path) as file:
        schema = file.schema_arrow
        metadata = file.metadata
        first = _read_first_length(file, contract.dim)
    column = next((name for name in VECTOR_COLUMNS if name in schema.names), None)
    if column is None:
        if not has_images(schema):
            raise SourceError(
                f"{path!r} has no column of embeddings ({_VECTORS}), and names no images; its columns are "
                f"{', '.join(schema.names)}"
            )
        return None
    _check_schema(schema, column, contract, path)
    if first is not None:
        raise ConfigError(f"{path}: embeddings have {first} dimensions, the gallery's have {contract.dim}")
    groups = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    return QueryFile(path, column, fingerprint, groups)


def _read_first_length(file: pq.ParquetFile, dim: int) -> int | None:
    """Read the length of a file's first vector if the first rows have vectors, and none of them is usable."""
    column = next((name for name in VECTOR_COLUMNS if name in file.schema_arrow.names), None)
    if column is None or not pa.types.is_list(file.schema_arrow.field(column).type):
        return None
    batch = next(file.iter_batches(_FIRST_ROWS, columns=[column]), None)
    lengths = [] if batch is None else pc.list_value_length(batch[column]).drop_null().to_pylist()
    return lengths[0] if lengths and dim not in lengths else None


def _describe_files(files: list[QueryFile], listing: ParquetListing) -> tuple[str, ...]:
    """Say which files are read in another way than the usual one, and which are not read."""
    unusual = [file for file in files if file.column != VECTOR_COLUMNS[0]]
    notes = []
    if unusual:
        more = f" and {len(unusual) - 1} more files" if len(unusual) > 1 else ""
        notes.append(
            f"{unusual[0].path!r}{more}: no column {VECTOR_COLUMNS[0]}, so its column {unusual[0].column} is taken for "
            "the embeddings"
        )
    if listing.other:
        more = f" and {listing.other_count - 1} more files" if listing.other_count > 1 else ""
        notes.append(f"{listing.other!r}{more}: not Parquet, and not searched for")
    return tuple(notes)


def _check_schema(schema: pa.Schema, column: str, contract: Contract, path: str) -> None:
    """Check the contract that a file carries, if any, and the type of its vectors."""
    encoded = (schema.metadata or {}).get(CONTRACT_PROPERTY.encode())
    if encoded is not None:
        try:
            contract.require(Contract.from_json(encoded.decode()), "the gallery that is searched")
        except ContractError as error:
            raise ContractError(f"{path}: {error}") from error
    kind = schema.field(column).type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise ConfigError(f"{path}: the column {column} is {kind}, not a list of {contract.dim} numbers")
    if not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        raise ConfigError(f"{path}: the column {column} is a list of {kind.value_type}, not of numbers")
    if pa.types.is_fixed_size_list(kind) and kind.list_size != contract.dim:
        raise ConfigError(f"{path}: embeddings have {kind.list_size} dimensions, the gallery's have {contract.dim}")


@contextmanager
def _open_parquet(path: str) -> Iterator[pq.ParquetFile]:
    with storage.open_seekable(path) as handle:
        try:
            yield pq.ParquetFile(handle)
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"cannot read {path!r}: {str(error).splitlines()[0]}") from error


def read_block(block: QueryBlock, dim: int) -> Iterator[Queries]:
    """Read the queries of a block, some thousands at a time.

    Args:
        block: of a source.
        dim: numbers per vector of the index.

    Raises:
        SourceError: a file cannot be read, or has changed since the search was planned.
    """
    for piece in block.pieces:
        with _open_parquet(piece.path) as file:
            _require_unchanged(piece)
            groups = None if piece.group is None else [piece.group]
            names = [name for name in _NAME_COLUMNS if name in file.schema_arrow.names]
            names = [name for name in names if _is_name(file.schema_arrow.field(name).type)]
            first = piece.first
            batches = file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=[piece.column, *names])
            if piece.deleted:
                batches = RowChoice(np.array(piece.deleted, np.int64)).filter_batches(batches)
            for batch in batches:
                if piece.group is None:  # a gallery's file: rows without a face are not queries
                    batch = batch.filter(batch["face_id"].is_valid())
                if batch.num_rows:
                    yield _to_queries(batch, piece.column, first, dim)
                first += batch.num_rows


def _require_unchanged(piece: QueryPiece) -> None:
    """Require that a file is the one that was planned: another one may have other rows under the same numbers."""
    if piece.fingerprint and storage.get_entry(piece.path).fingerprint != piece.fingerprint:
        raise SourceError(
            f"{piece.path!r} has changed since the search began: run the same command again, which searches for all of "
            "its queries"
        )


def _is_name(kind: pa.DataType) -> bool:
    """Tell whether a column of a type can name queries."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind))


def _to_queries(batch: pa.RecordBatch, column: str, first: int, dim: int) -> Queries:
    """Convert a batch; `first` is the number of its first row, which names queries without a name."""
    columns = batch.schema.names
    rows = batch.num_rows
    # A query has the name in its row or else its number in the file.
    name_column = next((name for name in _NAME_COLUMNS if name in columns), None)
    numbers = pa.array([str(first + n) for n in range(rows)])
    has_face_ids = "face_id" in columns and pa.types.is_integer(batch.schema.field("face_id").type)
    own = np.full(rows, -1, np.int64)
    if has_face_ids:
        own = batch["face_id"].cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
    vectors, status = read_query_vectors(batch[column], dim)
    return Queries(
        names=pc.coalesce(batch[name_column].cast(pa.string()), numbers) if name_column else numbers,
        uris=batch["uri"].cast(pa.string()) if "uri" in columns else pa.nulls(rows, pa.string()),
        own=own,
        vectors=vectors,
        status=status,
    )


def read_query_vectors(column: Any, dim: int) -> "QueryVectors":
    """Read a column of lists of `dim` numbers, and scale the vectors to unit norm.

    A gallery's own vectors stay the same, bit by bit.
    """
    values, complete = read_embeddings(column, dim)
    # A copy, because the vectors are scaled in place.
    vectors = np.array(values, np.float32)
    status = np.full(len(vectors), OK, object)
    lengths = column.value_lengths() if hasattr(column, "value_lengths") else pc.list_value_length(column)
    # Note why a query cannot be searched: a wrong length, values that are not finite, or a zero norm.
    for n in np.flatnonzero(~complete):
        length = lengths[int(n)].as_py()
        status[n] = "no embedding" if length is None else f"{length} dimensions, not {dim}"
    finite = np.asarray(np.isfinite(vectors).all(axis=1))
    norms = np.linalg.norm(np.where(finite[:, None], vectors, 0).astype(np.float64), axis=1)
    status[complete & ~finite] = "not finite"
    status[complete & finite & (norms < _ZERO_NORM)] = "zero vector"
    usable = np.asarray(status == OK, bool)
    # Scale the usable vectors to unit norm, and clear the others.
    scaled = usable & (np.abs(norms - 1) > _UNIT_TOLERANCE)
    vectors[scaled] = vectors[scaled] / norms[scaled, None]
    vectors[~usable] = 0
    return QueryVectors(vectors, status)


class QueryVectors(NamedTuple):
    """Vectors of queries.

    Attributes:
        vectors: Unit vectors (n, dim), zero if the query cannot be searched.
        status: `ok`, or why the query cannot be searched, (n,).
    """

    vectors: Float32
    status: npt.NDArray[np.object_]
