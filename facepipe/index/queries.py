"""Queries for a search: the faces of a gallery, or any Parquet files with an `embedding` column, cut into blocks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facepipe import storage
from facepipe.arrow import read_embeddings
from facepipe.errors import ConfigError, ContractError, SourceError
from facepipe.gallery import Contract, Gallery
from facepipe.gallery.contract import PROPERTY
from facepipe.hashing import hash64
from facepipe.schema import EMBEDDING_DIM, OK
from facepipe.sources.parquet import list_parquet_files
from facepipe.types import Bool, Float32, Int64

_NAMES = ("query_id", "face_id", "id", "uri")  # columns that may name a query, first found wins
_ROWS = 8192
_ZERO = 1e-12
_UNIT = 1e-5


@dataclass(frozen=True)
class Piece:
    """A row group of a Parquet file (None: the whole file), and the number of its first row."""

    path: str
    group: int | None
    first: int = 0


@dataclass(frozen=True)
class QueryBlock:
    """The unit of a bulk search: what is searched again after a crash. Blocks of one source are numbered from 0."""

    number: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Queries:
    """n queries: names and uris as Arrow strings, own face ids (n,) or -1, unit vectors (n, 128), statuses.

    status: `ok`, or why the query cannot be searched; its vector is then zero.
    """

    names: pa.Array
    uris: pa.Array
    own: Int64
    vectors: Float32
    status: npt.NDArray[np.object_]


@dataclass(frozen=True)
class QuerySource:
    """Where queries come from. fingerprint: changes when they may have changed; gallery: they are its faces."""

    path: str
    fingerprint: str
    gallery: bool
    version: int | None = None

    def blocks(self, rows: int) -> Iterator[QueryBlock]:
        """Blocks of about `rows` queries, the same ones whenever it is asked."""
        pieces: list[Piece] = []
        total = number = 0
        for piece, count in self._pieces():
            pieces.append(piece)
            total += count
            if total >= rows:
                yield QueryBlock(number, tuple(pieces))
                pieces, total, number = [], 0, number + 1
        if pieces:
            yield QueryBlock(number, tuple(pieces))

    def count(self) -> int:
        """How many queries there are, those of no use included."""
        return sum(rows for _, rows in self._pieces())

    def _pieces(self) -> Iterator[tuple[Piece, int]]:
        if self.gallery:
            gallery = Gallery(self.path, self.version)
            for file in sorted(gallery.files(), key=lambda file: file["path"]):
                if file["faces"]:
                    yield Piece(storage.join(gallery.faces_folder, file["path"]), None), file["faces"]
            return
        for path in list_parquet_files(self.path):
            with _opened(path) as file:
                metadata = file.metadata
            first = 0
            for group in range(metadata.num_row_groups):
                count = metadata.row_group(group).num_rows
                yield Piece(path, group, first), count
                first += count


def open_queries(path: str, contract: Contract) -> QuerySource | None:
    """The source at a path; None where it is neither a gallery nor Parquet files with embeddings (but images, perhaps).

    Raises ContractError where the queries say that they were made with other models, ConfigError where their dimension
    is another, SourceError where nothing is there.
    """
    path = storage.to_absolute(path)
    if not storage.may_exist(path) and not set("*?[") & set(path):
        raise SourceError(f"no such file or folder: {path!r}")
    if Gallery.exists(path):
        gallery = Gallery(path)
        contract.require(gallery.contract, "the gallery that is searched")
        return QuerySource(path, f"gallery {gallery.version}", True, gallery.version)
    files = list_parquet_files(path)
    if not files:
        return None
    with _opened(files[0]) as file:
        schema = file.schema_arrow
    if "embedding" not in schema.names:
        return None
    _check(schema, contract, path)
    entries = [storage.get_entry(file) for file in files]
    mark = hash64(*(f"{entry.url} {entry.fingerprint}" for entry in entries))
    return QuerySource(path, f"parquet {mark:016x}", False)


def _check(schema: pa.Schema, contract: Contract, path: str) -> None:
    said = (schema.metadata or {}).get(PROPERTY.encode())
    if said is not None:
        try:
            contract.require(Contract.from_json(said.decode()), "the gallery that is searched")
        except ContractError as error:
            raise ContractError(f"{path}: {error}") from error
    kind = schema.field("embedding").type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise ConfigError(f"{path}: the column embedding is {kind}, not a list of {EMBEDDING_DIM} numbers")
    if pa.types.is_fixed_size_list(kind) and kind.list_size != EMBEDDING_DIM:
        raise ConfigError(f"{path}: embeddings have {kind.list_size} dimensions, the gallery's have {EMBEDDING_DIM}")


@contextmanager
def _opened(path: str) -> Iterator[pq.ParquetFile]:
    with storage.open_seekable(path) as handle:
        try:
            yield pq.ParquetFile(handle)
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"cannot read {path!r}: {str(error).splitlines()[0]}") from error


def read_block(block: QueryBlock) -> Iterator[Queries]:
    """The queries of a block, some thousands at a time."""
    for piece in block.pieces:
        with _opened(piece.path) as file:
            groups = None if piece.group is None else [piece.group]
            held = [name for name in ("embedding", *_NAMES) if name in file.schema_arrow.names]
            first = piece.first
            for batch in file.iter_batches(_ROWS, row_groups=groups, columns=held):
                if piece.group is None:  # a gallery's file: rows without a face are no queries
                    batch = batch.filter(batch["face_id"].is_valid())
                if batch.num_rows:
                    yield _queries(batch, first)
                first += batch.num_rows


def _queries(batch: pa.RecordBatch, first: int) -> Queries:
    names = batch.schema.names
    name = next((name for name in _NAMES if name in names), None)
    rows = batch.num_rows
    numbers = pa.array([str(first + n) for n in range(rows)])
    own = batch["face_id"] if "face_id" in names and pa.types.is_integer(batch.schema.field("face_id").type) else None
    vectors, status = usable(batch["embedding"])
    return Queries(
        names=pc.coalesce(batch[name].cast(pa.string()), numbers) if name else numbers,
        uris=batch["uri"].cast(pa.string()) if "uri" in names else pa.nulls(rows, pa.string()),
        own=np.full(rows, -1, np.int64) if own is None else own.fill_null(-1).to_numpy(zero_copy_only=False),
        vectors=vectors,
        status=status,
    )


def usable(column: Any) -> tuple[Float32, npt.NDArray[np.object_]]:
    """((n, 128) unit vectors, (n,) `ok` or why not) of a column of lists of numbers."""
    raw, listed = read_embeddings(column)
    vectors = np.array(raw, np.float32)
    status = np.full(len(vectors), OK, object)
    lengths = column.value_lengths() if hasattr(column, "value_lengths") else pc.list_value_length(column)
    for n in np.flatnonzero(~listed):
        length = lengths[int(n)].as_py()
        status[n] = "no embedding" if length is None else f"{length} dimensions, not {EMBEDDING_DIM}"
    finite: Bool = np.asarray(np.isfinite(vectors).all(axis=1))
    norms = np.linalg.norm(np.where(finite[:, None], vectors, 0).astype(np.float64), axis=1)
    status[listed & ~finite] = "not finite"
    status[listed & finite & (norms < _ZERO)] = "zero vector"
    good = np.asarray(status == OK, bool)
    scaled = good & (np.abs(norms - 1) > _UNIT)  # a gallery's own vectors stay what they are, to the bit
    vectors[scaled] = vectors[scaled] / norms[scaled, None]
    vectors[~good] = 0
    return vectors, status
