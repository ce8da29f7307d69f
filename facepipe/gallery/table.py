"""The gallery's table of faces: a Delta Lake table, read through its log and never through a glob."""

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from deltalake import DeltaTable, Schema
from deltalake.exceptions import DeltaError, TableNotFoundError

from facepipe import storage
from facepipe.errors import ContractError, GalleryError, StorageError
from facepipe.gallery.contract import CONTRACT_PROPERTY, Contract
from facepipe.schema import EMBEDDING_DIM, FACES, LATER, OK
from facepipe.storage.lease import LEASE_FILE, LEASE_GUARD
from facepipe.storage.table_access import get_delta_options, open_arrow_filesystem
from facepipe.types import Float32, Int64

if TYPE_CHECKING:
    import pandas as pd

RUNS = "runs"
_VECTORS = 65536  # rows read at a time
_FILES_AT_ONCE = 64
_FILE_FIGURES = (
    *("path", "size_bytes", "num_records", "min.uri", "max.uri", "min.source", "max.source", "min.identity"),
    *("max.identity", "min.ingested_at", "max.ingested_at", "null_count.missing_since"),
)
_KEEP_LOG = {"delta.logRetentionDuration": "interval 30 days", "delta.checkpointInterval": "100"}


class Gallery:
    """A gallery of face embeddings.

        gallery = facepipe.Gallery("G")
        ids, vectors = gallery.vectors()                    # (n,) int64, (n, 128) float32 of unit norm
        frame = gallery.to_pandas(["uri", "identity", "det_score"], where="det_score > 0.9 and identity is not null")
        for batch in gallery.batches(["uri", "embedding"]): ...

    `version` reads the gallery as it was; by default it is the newest. Raises GalleryError where there is none.
    """

    def __init__(self, path: str | os.PathLike[str], version: int | None = None):
        self.path = storage.to_absolute(os.fspath(path))
        self.faces_folder = storage.join(self.path, "faces")
        try:
            self._table = open_table(self.faces_folder, version)
        except TableNotFoundError as error:
            raise GalleryError(
                f"no gallery at {self.path!r} (no faces/ table in it): `facepipe embed SOURCE {self.path}` makes one"
            ) from error
        except Exception as error:  # deltalake raises many kinds for a log that cannot be read
            raise GalleryError(
                f"the gallery at {self.path!r} cannot be read: {storage.describe_error(error)}"
            ) from error

    @classmethod
    def exists(cls, path: str) -> bool:
        """Whether there is a gallery."""
        log = storage.join(path, "faces", "_delta_log")
        # Not deltalake's own test: it holds the interpreter, and with it the lease's heartbeat, while a store is slow.
        return any(found.url.endswith((".json", ".parquet")) for found in storage.list_files(log))

    @classmethod
    def open_or_create(cls, path: str, contract: Contract) -> "Gallery":
        """The gallery to write to, with the columns of this version. Raises ContractError where it has another one."""
        if not cls.exists(path):
            return cls.create(path, contract)
        gallery = cls(path)
        gallery.contract.require(contract, f"the gallery {path!r}")
        gallery.add_missing_columns()
        return gallery

    @classmethod
    def create(cls, path: str, contract: Contract) -> "Gallery":
        """A new, empty gallery pinned to a contract. A folder that holds something else is refused."""
        if _holds_something(path):
            raise GalleryError(f"{path!r} exists and is no gallery: choose a new folder")
        configuration = {**_KEEP_LOG, CONTRACT_PROPERTY: contract.to_json()}
        try:
            DeltaTable.create(
                storage.join(path, "faces"),
                Schema.from_arrow(FACES),
                name="faces",
                configuration=configuration,
                raise_if_key_not_exists=False,  # our own property stands beside Delta's
                storage_options=get_delta_options(path),
            )
        except (OSError, DeltaError) as error:
            # Where the answer of a store was lost the table is there all the same; the caller's lease says it is ours.
            if not cls.exists(path):
                raise GalleryError(f"cannot make a gallery at {path!r}: {storage.describe_error(error)}") from error
        return cls(path)

    def add_missing_columns(self) -> None:
        """Add the columns that the facepipe which made the table did not know; its rows hold nulls there."""
        held = {field.name for field in self._table.schema().fields}
        missing = pa.schema([field for field in FACES if field.name not in held])
        if len(missing):
            self._table.alter.add_columns(Schema.from_arrow(missing).fields)

    @property
    def version(self) -> int:
        """The table version that is read."""
        return self._table.version()

    @property
    def id(self) -> str:
        """What names the table wherever it lies: a UUID, given when it was made."""
        return str(self._table.metadata().id)

    @property
    def contract(self) -> Contract:
        """The models and settings that all embeddings here were made with."""
        text = self._table.metadata().configuration.get(CONTRACT_PROPERTY)
        if text is None:
            raise ContractError(f"the table in {self.path!r} has no facepipe contract: it was not made by facepipe")
        return Contract.from_json(text)

    def files(self) -> list[dict[str, Any]]:
        """Path, size, row count, ranges of some columns and number of faces of the table's files."""
        actions = pa.table(self._table.get_add_actions(flatten=True))
        names = (*_FILE_FIGURES, "null_count.face_id")
        rows: list[dict[str, Any]] = actions.select([n for n in names if n in actions.column_names]).to_pylist()
        for row in rows:
            row["faces"] = row["num_records"] - (row.pop("null_count.face_id", 0) or 0)
        return rows

    def dataset(self, ranges: Collection[str] | None = None) -> ds.Dataset:
        """The table as a pyarrow dataset, for whatever this class does not offer.

        ranges: columns by which a filter may tell, from the log, that a file holds nothing for it; all by default. In
        a table of many files they are what opening it costs, some 40 microseconds a column and file.
        """
        held = pa.schema(self._table.schema().to_arrow(as_large_types=False))
        # Left out while the files are listed: deltalake takes a column without statistics for one without nulls.
        wanted = set(held.names if ranges is None else ranges).difference(LATER)
        early = pa.schema([field for field in held if field.name in wanted])
        listed = self._table.to_pyarrow_dataset(filesystem=open_arrow_filesystem(self.faces_folder), schema=early)
        return listed.replace_schema(pa.unify_schemas([held, FACES]))

    def batches(
        self, columns: Sequence[str] | None = None, where: "str | ds.Expression | None" = None, rows: int = 8192
    ) -> Iterator[pa.RecordBatch]:
        """Rows as a stream of record batches; memory does not grow with the gallery."""
        names, chosen = check_columns(columns), to_filter(where)
        for some in _in_groups(self.dataset(_named_in(chosen)), chosen):
            scanner = some.scanner(
                columns=names, filter=chosen, batch_size=rows, batch_readahead=2, fragment_readahead=1
            )
            yield from self._read(scanner)

    def _read(self, scanner: ds.Scanner) -> Iterator[pa.RecordBatch]:
        batches = scanner.to_batches()
        while True:
            try:
                batch = next(batches, None)
            except (OSError, pa.ArrowException) as error:
                raise StorageError(
                    f"cannot read the table in {self.faces_folder!r}: {storage.describe_error(error)}; "
                    f"`facepipe verify {self.path}` names what is damaged"
                ) from error
            if batch is None:
                return
            if batch.num_rows:
                yield batch

    def to_arrow(self, columns: Sequence[str] | None = None, where: "str | ds.Expression | None" = None) -> pa.Table:
        """Rows as one Arrow table."""
        names = check_columns(columns)
        return pa.Table.from_batches(self.batches(names, where), pa.schema([FACES.field(n) for n in names]))

    def to_pandas(
        self, columns: Sequence[str] | None = None, where: "str | ds.Expression | None" = None
    ) -> "pd.DataFrame":
        """Rows as a pandas frame."""
        return self.to_arrow(columns, where).to_pandas()

    def vectors(self, where: "str | ds.Expression | None" = None) -> tuple[Int64, Float32]:
        """(face ids (n,), unit vectors (n, 128)) of all faces, or of those that match."""
        has_face = ds.field("face_id").is_valid()
        chosen = to_filter(where)
        # Where all are wanted the log knows how many; each vector is then copied once, and held once.
        room = sum(file["faces"] for file in self.files()) if chosen is None else _VECTORS
        ids, vectors, n = np.empty(room, np.int64), np.empty((room, EMBEDDING_DIM), np.float32), 0
        found = has_face if chosen is None else has_face & chosen
        for batch in self.batches(["face_id", "embedding"], found, rows=_VECTORS):
            end = n + batch.num_rows
            if end > len(ids):
                ids, vectors = _longer(ids, n, 2 * end), _longer(vectors, n, 2 * end)
            ids[n:end] = batch["face_id"].to_numpy()
            vectors[n:end] = batch["embedding"].flatten().to_numpy(zero_copy_only=False).reshape(-1, EMBEDDING_DIM)
            n = end
        return ids[:n], vectors[:n]

    def counts(self) -> dict[str, int]:
        """Images by status, and the number of faces."""
        images: Counter[str] = Counter()
        faces = 0
        for batch in self.batches(["status", "face_index"]):
            first = batch.filter(pc.fill_null(pc.equal(batch["face_index"], 0), True))
            images.update(first["status"].to_pylist())
            faces += batch.num_rows - batch["face_index"].null_count
        ordered = {OK: images.pop(OK, 0), **dict(sorted(images.items()))}
        return {"images": sum(ordered.values()), "faces": faces, **ordered}

    def runs(self, last: int = 5) -> list[dict[str, Any]]:
        """The newest commits' own metadata: run id, counts, seconds per stage."""
        found = [json.loads(entry["facepipe"]) for entry in self._table.history(20 * last) if "facepipe" in entry]
        by_run: dict[str, dict[str, Any]] = {}
        for entry in reversed(found):
            by_run[entry["run"]] = entry
        return list(by_run.values())[-last:]


def open_table(folder: str, version: int | None = None) -> DeltaTable:
    """A Delta table in a folder or an object store."""
    return DeltaTable(folder, version=version, storage_options=get_delta_options(folder))


_OURS = {LEASE_FILE, LEASE_GUARD, RUNS}


def _holds_something(path: str) -> bool:
    """Whether a place for a new gallery is taken. What a first run leaves before it makes the table does not count."""
    if storage.is_remote(path):
        base = path.rstrip("/") + "/"
        return any(_foreign(found.url.removeprefix(base)) for found in storage.list_prefix(base))
    if not os.path.exists(path):
        os.makedirs(path, exist_ok=True)
        return False
    if not os.path.isdir(path) or set(os.listdir(path)) - _OURS - {"faces"}:
        return True
    return any(_foreign(os.path.relpath(found.url, path)) for found in storage.list_files(path))


def _foreign(name: str) -> bool:
    """A log whose first entry was not finished is none."""
    begun = name.startswith("faces/_delta_log/") and not name.endswith(".json")
    return not begun and name.split("/")[0] not in _OURS


def to_filter(where: "str | ds.Expression | None") -> "ds.Expression | None":
    """A filter from text such as `status = 'ok' and det_score > 0.9`; expressions pass through."""
    if where is None or isinstance(where, ds.Expression):
        return where
    from facepipe.gallery.filters import parse_filter

    return parse_filter(where)


def _in_groups(dataset: ds.Dataset, where: "ds.Expression | None") -> Iterator[ds.Dataset]:
    """The files that may hold what is wanted, as datasets of few: what has been read of a file's metadata, some 80 kB,
    is kept as long as its dataset is, which in a table of 20,000 files is 1.6 GB.
    """
    kind, place, schema = dataset.format, dataset.filesystem, dataset.schema
    fragments = list(dataset.get_fragments(filter=where))[::-1]
    del dataset
    while fragments:
        some = [fragments.pop() for _ in range(min(_FILES_AT_ONCE, len(fragments)))]
        yield ds.FileSystemDataset(some, schema, kind, place)


def _named_in(where: "ds.Expression | None") -> list[str]:
    """The columns that a filter names; perhaps some more, such as one that is also a word in a value."""
    words = set(re.findall(r"\w+", "" if where is None else str(where)))
    return [name for name in FACES.names if name in words]


def _longer(array: npt.NDArray[Any], filled: int, length: int) -> npt.NDArray[Any]:
    longer = np.empty((length, *array.shape[1:]), array.dtype)
    longer[:filled] = array[:filled]
    return longer


def check_columns(columns: Sequence[str] | None) -> list[str]:
    names = list(FACES.names if columns is None else columns)
    unknown = [name for name in names if name not in FACES.names]
    if unknown:
        raise GalleryError(f"no column {', '.join(unknown)}; columns are {', '.join(FACES.names)}")
    return names
