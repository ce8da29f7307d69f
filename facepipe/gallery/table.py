"""The gallery's table of faces: a Delta Lake table, read through its log and never through a glob."""

import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from deltalake import DeltaTable, Schema
from deltalake.exceptions import DeltaError, TableNotFoundError

from facepipe import storage
from facepipe.errors import ConfigError, ContractError, GalleryBusyError, GalleryError, StorageError
from facepipe.gallery.chosen_rows import iterate_chosen_rows
from facepipe.gallery.commits import log
from facepipe.gallery.contract import CONTRACT_PROPERTY, Contract
from facepipe.gallery.deletion_vectors import Descriptor, RowChoice, decode_rows
from facepipe.gallery.file_bounds import FileBounds
from facepipe.gallery.filters import to_filter
from facepipe.gallery.hidden import HiddenImages, HiddenWatch
from facepipe.gallery.marks import KEY, NO_MARKS, TRANSACTION, Marks, format_name, needs_marks, read_marks
from facepipe.schema import FACES, OK
from facepipe.storage.aliases import find_table_path
from facepipe.storage.conditional import ConflictError, require_usable_place
from facepipe.storage.inside import is_link, iterate_links, make_link_error, require_inside
from facepipe.storage.lease import LEASE_FILE, LEASE_GUARD
from facepipe.storage.locks import PROBE
from facepipe.storage.new_folders import make_new_folders, remove_new_folders
from facepipe.storage.table_access import get_delta_options, open_arrow_filesystem
from facepipe.types import Float32, Int64

if TYPE_CHECKING:
    import pandas as pd

RUNS = "runs"
LOG = "_delta_log"
# The folders of a gallery. Each may be a link to a folder on another disk.
FOLDERS = ("faces", "index", "reports", "erased", "decisions", RUNS)
_FIRST_VERSION = f"{0:020}.json"
FENCE = "fence"  # job of a commit that changes nothing: it keeps late commits of runs that lost their lease out
# Names that a first run may leave in a folder before the table is there.
_OWN_NAMES = {LEASE_FILE, LEASE_GUARD, RUNS}
_VECTOR_ROWS = 65536  # rows read at a time
# Files whose metadata is held at a time.
_FILES_AT_ONCE = 64
# Files at a time of which a filter says whether they may hold anything.
_FILES_PASSED_OVER = 1024
# What `Gallery.files` reads of the log, which holds more statistics than any caller wants.
_FILE_COLUMNS = (
    "path",
    "size_bytes",
    "modification_time",
    "num_records",
    "min.uri",
    "max.uri",
    "min.source",
    "max.source",
    "min.identity",
    "max.identity",
    "min.ingested_at",
    "max.ingested_at",
    "null_count.missing_since",
    "null_count.face_id",
)
# Columns of text whose ranges the log holds.
_TEXT_COLUMNS = ("image_id", "uri", "source", "fingerprint", "status", "error", "identity", "failed_with")
# An older facepipe wrote ranges with escapes, which Arrow's reader of the log joins to characters of these planes. They
# may also be what was written, and only the file can tell.
_DOUBTFUL = re.compile("[" + "".join(f"{chr(n << 16)}-{chr((n << 16) + 0xFFFF)}" for n in range(1, 16, 2)) + "]")
TEXT_PROPERTY = "facepipe.text"
"""Name of the table property that tells how texts and their ranges are stored; absent in tables of older versions."""
EXACT_TEXT = "nfc"
"""Its value if all labels are in normal form C, and all ranges of texts in the log can be trusted."""


@dataclass(frozen=True)
class RunCommit:
    """A commit of a run.

    Attributes:
        run: id of the run.
        time: when it was, UTC, ISO 8601.
    """

    run: str
    time: str


@dataclass(frozen=True)
class TableTotals:
    """What the log says of all files of a table together.

    Attributes:
        files: Number of files.
        bytes: Their size.
        rows: Number of rows.
        faces: Number of rows with a face.
    """

    files: int
    bytes: int
    rows: int
    faces: int


@dataclass(frozen=True)
class _FilePart:
    """Files that are read together.

    Attributes:
        dataset: the files.
        choice: which rows are read; None for all. Given only if there is one file.
    """

    dataset: ds.Dataset
    choice: RowChoice | None = None


class Gallery:
    """A gallery of face embeddings.

    Images whose erasure is recorded are left out from that moment on, also by a gallery that is open already.

        gallery = facepipe.Gallery("G")
        ids, vectors = gallery.vectors()                    # (n,) int64, (n, dim) float32 of unit norm
        frame = gallery.to_pandas(["uri", "identity", "det_score"], where="det_score > 0.9 and identity is not null")
        for batch in gallery.batches(["uri", "embedding"]): ...

    Attributes:
        path: Absolute path or URL of the gallery.
        faces_folder: Path or URL of the table.
    """

    def __init__(self, path: str | os.PathLike[str], version: int | None = None):
        """Open a gallery.

        Args:
            path: path or URL.
            version: version of the table to read; the newest by default.

        Raises:
            GalleryError: there is no gallery, or it cannot be read.
        """
        self.path = storage.to_absolute(os.fspath(path))
        self.faces_folder = storage.join(self.path, "faces")
        self._has_checked_names = False
        _refuse_file(self.path)
        _refuse_links_to_others(self.path)
        self._hidden = HiddenWatch(self.path)
        self._marks: Marks | None = None
        self._deleted_rows: dict[str, Int64] | None = None
        try:
            self._table = open_table(self.faces_folder, version)
            # deltalake looks into the log again for it, which an erasure may have cleaned by then.
            self._marks_number = self.get_transaction(TRANSACTION)
        except TableNotFoundError as error:
            if version is not None and self.exists(self.path):
                _require_version(self.path, self.faces_folder, version)
                raise GalleryError(
                    f"version {version} of the gallery at {self.path!r} was deleted meanwhile: open the gallery again, "
                    "or run the same command again"
                ) from error
            raise GalleryError(_describe_no_gallery(self.path)) from error
        except StorageError as error:
            raise GalleryError(f"the gallery at {self.path!r} leads out of itself: {error}") from error
        except Exception as error:  # deltalake raises many kinds for a log that cannot be read
            if version is not None:
                _require_version(self.path, self.faces_folder, version)
            reason = storage.describe_error(error) + _describe_empty_entries(self.faces_folder)
            raise GalleryError(f"the gallery at {self.path!r} cannot be read: {reason}") from error

    def __repr__(self) -> str:
        # Nothing of the rows is read: a table of hundreds of millions is shown at once.
        contract = self.contract
        return f"Gallery({self.path!r}, version={self.version}, models={contract.detector} + {contract.embedder})"

    @classmethod
    def exists(cls, path: str) -> bool:
        """Tell whether there is a gallery."""
        folder = storage.join(path, "faces", log.LOG)
        # deltalake's own test holds the interpreter, and with it the lease's heartbeat, while a store is slow.
        return any(entry.url.endswith((".json", ".parquet")) for entry in storage.list_files(folder))

    @classmethod
    def open_or_create(cls, path: str, contract: Contract, properties: Mapping[str, str] | None = None) -> "Gallery":
        """Open a gallery to write to, with the columns of this version, or create it.

        Args:
            path: path or URL.
            contract: contract of the gallery.
            properties: further properties of a table that is created.

        Raises:
            ContractError: the gallery has another contract.
        """
        if not cls.exists(path):
            return cls.create(path, contract, properties)
        gallery = cls(path)
        gallery.contract.require(contract, f"the gallery {path!r}")
        gallery.add_missing_columns()
        return gallery

    @classmethod
    def create(cls, path: str, contract: Contract, properties: Mapping[str, str] | None = None) -> "Gallery":
        """Create an empty gallery with a contract. Raises GalleryError for a folder that holds something else."""
        cls.require_free(path)
        faces_folder = storage.join(path, "faces")
        log_folder = storage.join(faces_folder, log.LOG)
        try:
            new_folders = [] if storage.is_remote(path) else make_new_folders(log_folder)
        except OSError as error:
            raise GalleryError(f"cannot make a gallery at {path!r}: {storage.describe_error(error)}") from error
        is_created = False
        try:
            is_created = _create_table(path, faces_folder, contract, properties or {})
            return cls(path)
        except BaseException:
            if not storage.is_remote(path):
                _remove_unfinished(log_folder, is_created=is_created)
                remove_new_folders(new_folders)
            raise

    @staticmethod
    def require_free(path: str) -> None:
        """Require of a place without a gallery that it holds nothing else.

        Raises:
            GalleryError: it holds something.
            ConfigError: it is a file.
        """
        _refuse_file(path)
        if _is_taken(path):
            raise GalleryError(f"{path!r} exists and is not a gallery: choose a new folder")

    def add_missing_columns(self) -> None:
        """Add the columns that an older facepipe did not know when it made the table; they are null in its rows."""
        present = {field.name for field in self._table.schema().fields}
        missing = pa.schema([field for field in FACES if field.name not in present])
        if not len(missing):
            return
        schema = Schema([*self._table.schema().fields, *Schema.from_arrow(missing).fields])
        try:
            log.add_columns(self.faces_folder, self._table, schema)
        except ConflictError as error:
            raise GalleryBusyError(f"another run has written to {self.path!r} since this one began") from error
        self._table.update_incremental()
        self._marks_number = self.get_transaction(TRANSACTION)
        self._marks = None
        self._deleted_rows = None

    @property
    def version(self) -> int:
        """The table version that is read."""
        return self._table.version()

    @property
    def id(self) -> str:
        """The UUID of the table, which it keeps wherever it lies."""
        return str(self._table.metadata().id)

    @property
    def contract(self) -> Contract:
        """The models and settings that all embeddings here were made with."""
        text = self._table.metadata().configuration.get(CONTRACT_PROPERTY)
        if text is None:
            raise ContractError(f"the table in {self.path!r} has no facepipe contract: it was not made by facepipe")
        return Contract.from_json(text)

    @property
    def dim(self) -> int:
        """Numbers per embedding."""
        return self.contract.dim

    @property
    def has_exact_text(self) -> bool:
        """Whether labels are in normal form and ranges of texts can be trusted. `compact` mends an older table."""
        return bool(self._table.metadata().configuration.get(TEXT_PROPERTY) == EXACT_TEXT)

    def get_property(self, name: str) -> str | None:
        """Get a property of the table; None if it has none of this name."""
        return self._table.metadata().configuration.get(name)

    @property
    def marks(self) -> Marks:
        """What has changed of images since their rows were written. All reading methods but `dataset` apply it.

        Raises:
            StorageError: it cannot be read.
        """
        if self._marks is None:
            try:
                self._marks = read_marks(self.faces_folder, self._marks_number)
            except StorageError as error:
                if Gallery(self.path).marks_file != self.marks_file:
                    raise StorageError(
                        f"the gallery {self.path!r} was changed while version {self.version} was read: open it again"
                    ) from error
                raise
        return self._marks

    @property
    def marks_file(self) -> str | None:
        """Name of the file with the marks, below the table's folder; None if there are no marks."""
        return format_name(self._marks_number) if self._marks_number else None

    @property
    def has_deletion_vectors(self) -> bool:
        """Whether rows of the table's files may be deleted although the files hold them."""
        return log.has_deletion_vectors(self._table)

    @property
    def deleted_rows(self) -> Mapping[str, Int64]:
        """Rows that files hold and the table does not: rising numbers (n,), by the file's path. Readers leave them out.

        Raises:
            GalleryError: another program has deleted rows in a way that facepipe cannot read.
            StorageError: the log cannot be read.
        """
        if self._deleted_rows is None:
            if self.has_deletion_vectors:
                self._deleted_rows = self._read_deleted_rows()
            else:
                self._deleted_rows = {}
        return self._deleted_rows

    def _read_deleted_rows(self) -> dict[str, Int64]:
        try:
            return {path: decode_rows(vector) for path, vector in self.read_deletion_vectors().items()}
        except StorageError:
            # The log was cleaned since the table was opened. deltalake has the vectors in memory, as one flag per row.
            vectors = pa.table(self._table.deletion_vectors().read_all())
        names = {os.path.basename(path): path for path in self.list_paths()}
        return {
            names[unquote(os.path.basename(url))]: np.flatnonzero(~np.asarray(flags.values))
            for url, flags in zip(vectors["filepath"].to_pylist(), vectors["selection_vector"], strict=True)
        }

    def read_deletion_vectors(self) -> dict[str, Descriptor]:
        """Read which rows of files are deleted, by the file's path, as the log has it.

        Raises:
            StorageError: the log was cleaned since the table was opened, or cannot be read.
        """
        return log.read_deletion_vectors(self.faces_folder, self.version) if self.has_deletion_vectors else {}

    def get_transaction(self, name: str) -> int:
        """Get the number of the last transaction of a run, or of another name, in the table's log; 0 if it has none.

        Raises:
            DeltaError: the log was cleaned since the table was opened.
        """
        return int(self._table.transaction_version(name) or 0)

    def require_writable(self) -> None:
        """Require that another program has not changed the table in a way that facepipe cannot write.

        Raises:
            GalleryError: it has.
        """
        log.require_known_protocol(self.faces_folder, self._table)

    def set_property(self, name: str, value: str) -> None:
        """Set a property of the table, in a commit of its own."""
        try:
            log.set_property(self.faces_folder, reopen_table(self.faces_folder), name, value)
        except ConflictError as error:
            raise GalleryBusyError(f"another run has written to {self.path!r} since this one began") from error

    def files(self) -> list[dict[str, Any]]:
        """Return path, size, row count, ranges of some columns and number of faces of each file of the table.

        A range is None if the log has none, or if it cannot be trusted. `num_records` counts what the file holds, and
        `rows` what the table has of it.
        """
        actions = pa.table(self._table.get_add_actions(flatten=True))
        self._check_names(actions["path"])
        names = [name for name in _FILE_COLUMNS if name in actions.column_names]
        rows: list[dict[str, Any]] = actions.select(names).to_pylist()
        doubtful = self._find_untrusted_files()
        deleted_rows = self.deleted_rows
        for row in rows:
            row["rows"] = row["num_records"] - len(deleted_rows.get(row["path"], ()))
            row["faces"] = row["num_records"] - (row.pop("null_count.face_id", 0) or 0)
            if row["path"] in doubtful:
                row.update({name: None for name in names if name.endswith((".uri", ".source", ".identity"))})
        return rows

    def list_paths(self) -> list[str]:
        """List the paths of the table's files. In a table of very many files this costs much less than `files`."""
        paths = pa.table(self._table.get_add_actions(flatten=False))["path"]
        self._check_names(paths)
        listed: list[str] = paths.to_pylist()
        return listed

    def read_sizes(self) -> pa.Table:
        """Read from the log the path, bytes, rows and faces of each file, as columns of one table.

        In a table of very many files this costs much less than `files`.
        """
        actions = pa.table(self._table.get_add_actions(flatten=True))
        self._check_names(actions["path"])
        rows = pc.fill_null(actions["num_records"], 0)
        faces = rows
        # Deleted rows count as rows without a face.
        if "null_count.face_id" in actions.column_names:
            faces = pc.subtract(rows, pc.fill_null(actions["null_count.face_id"], 0))
        if self.deleted_rows:
            deleted = [len(self.deleted_rows.get(path, ())) for path in actions["path"].to_pylist()]
            rows = pc.subtract(rows, pa.array(deleted, pa.int64()))
        columns = {"path": actions["path"], "size_bytes": actions["size_bytes"], "rows": rows, "faces": faces}
        return pa.table(columns)

    def count_totals(self) -> TableTotals:
        """Count files, bytes, rows and faces by the log. No list of files is made."""
        sizes = self.read_sizes()
        return TableTotals(
            files=sizes.num_rows,
            bytes=pc.sum(sizes["size_bytes"]).as_py() or 0,
            rows=pc.sum(sizes["rows"]).as_py() or 0,
            faces=pc.sum(sizes["faces"]).as_py() or 0,
        )

    def _check_names(self, paths: pa.ChunkedArray | None = None) -> None:
        """Refuse a table whose log names files outside its folder, or files that are links.

        Args:
            paths: names of the table's files as the log has them; read from the log by default.

        Raises:
            GalleryError: there is such a name.
        """
        if self._has_checked_names:
            return
        if paths is None:
            paths = pa.table(self._table.get_add_actions(flatten=False))["path"]
        names = paths.to_pylist()
        try:
            for name in names:
                require_inside(name, f"the log of {self.path!r}")
            # Links are listed once: looking at each file would take a call per file.
            links = set(iterate_links(self.faces_folder))
            for name in names if links else ():
                parts = name.split("/")
                if not links.isdisjoint("/".join(parts[: n + 1]) for n in range(len(parts))):
                    raise make_link_error(storage.join(self.faces_folder, name))
        except StorageError as error:
            raise GalleryError(f"the gallery at {self.path!r} leads out of itself: {error}") from error
        self._has_checked_names = True

    def read_text_ranges(self) -> dict[str, dict[str, tuple[str, str]]]:
        """Read from the log the smallest and the largest text per file and column, as other readers see them."""
        actions = pa.table(self._table.get_add_actions(flatten=True))
        ranges: dict[str, dict[str, tuple[str, str]]] = {path: {} for path in actions["path"].to_pylist()}
        for column in _TEXT_COLUMNS:
            if f"min.{column}" not in actions.column_names:
                continue
            limits = zip(actions[f"min.{column}"].to_pylist(), actions[f"max.{column}"].to_pylist(), strict=True)
            for file_ranges, (low, high) in zip(ranges.values(), limits, strict=True):
                if low is not None and high is not None:
                    file_ranges[column] = (low, high)
        return ranges

    def read_null_counts(self, columns: Sequence[str]) -> list[dict[str, Any]]:
        """Read from the log path and size of each file, and the number of nulls in columns: None if it says nothing."""
        actions = pa.table(self._table.get_add_actions(flatten=True))
        unknown = pa.nulls(actions.num_rows, pa.int64())
        nulls = {}
        for name in columns:
            # The log of a table that was made before a column does not know the column.
            is_known = f"null_count.{name}" in actions.column_names
            nulls[name] = actions[f"null_count.{name}"] if is_known else unknown
        return pa.table({"path": actions["path"], "size_bytes": actions["size_bytes"], **nulls}).to_pylist()

    def read_statistics(self, paths: Collection[str]) -> dict[str, dict[str, Any]]:
        """Read from the log the statistics of some files, as Delta names them, with values of Python, by path."""
        actions = pa.table(self._table.get_add_actions(flatten=True))
        chosen = actions.filter(pc.is_in(actions["path"], pa.array(sorted(paths), pa.string())))
        statistics = {}
        for row in chosen.to_pylist():
            by_kind: dict[str, dict[str, Any]] = {"min": {}, "max": {}, "null_count": {}}
            for key, value in row.items():
                kind, _, column = key.partition(".")
                if kind in by_kind and value is not None:
                    by_kind[kind][column] = value
            statistics[row["path"]] = {
                "numRecords": row["num_records"],
                "minValues": by_kind["min"],
                "maxValues": by_kind["max"],
                "nullCount": by_kind["null_count"],
            }
        return statistics

    def find_files_with_doubtful_ranges(self) -> frozenset[str]:
        """Find the files whose ranges of texts may be wrong in the log, if an older version wrote them."""
        actions = pa.table(self._table.get_add_actions(flatten=True))
        paths = actions["path"].to_pylist()
        names = [f"{limit}.{column}" for column in _TEXT_COLUMNS for limit in ("min", "max")]
        return frozenset(
            path
            for name in names
            if name in actions.column_names
            for path, text in zip(paths, actions[name].to_pylist(), strict=True)
            if text and not text.isascii() and _DOUBTFUL.search(text)
        )

    def _find_untrusted_files(self) -> frozenset[str]:
        return frozenset() if self.has_exact_text else self.find_files_with_doubtful_ranges()

    def dataset(self, ranges: Collection[str] | None = None) -> ds.Dataset:
        """Open the table as a pyarrow dataset, for whatever this class does not offer.

        Its columns `fingerprint` and `missing_since` are as the files have them: `marks` may say more.

        Args:
            ranges: columns by which a filter may tell, from the log, that a file holds nothing for it; all by default.
                In a table of many files they are the cost of opening it, some 40 microseconds per column and file.

        Raises:
            GalleryError: files hold deleted rows, which a dataset of pyarrow cannot leave out.
        """
        if self.deleted_rows:
            raise GalleryError(
                f"files of {self.path!r} hold deleted rows, which a dataset of pyarrow cannot leave out: use "
                f"Gallery.batches, or run `facepipe compact --all {self.path}`, which writes such files anew"
            )
        hidden = self.read_hidden()
        dataset = self.open_all_rows(ranges)
        return dataset.filter(hidden.visible) if hidden else dataset

    def freeze(self) -> None:
        """Leave out the same images from now on, even if an erasure is recorded meanwhile.

        Work that reads the gallery several times needs this, so that its passes agree.
        """
        self._hidden.freeze()

    def open_all_rows(self, ranges: Collection[str] | None = None) -> ds.Dataset:
        """Open the table as a dataset with all rows of its files. Readers use `dataset`.

        Rows of images that are being erased are among them, and deleted rows.
        """
        actions = self._read_actions()
        self._check_names(actions["path"])
        schema = pa.unify_schemas([pa.schema(self._table.schema().to_arrow(as_large_types=False)), FACES])
        filesystem = open_arrow_filesystem(self.faces_folder)
        file_format = ds.ParquetFileFormat()
        # A filter passes over files by the ranges of these columns.
        with_ranges = set(schema.names if ranges is None else ranges)
        untrusted = self._find_untrusted_files() if with_ranges.intersection(_TEXT_COLUMNS) else frozenset()
        bounds = FileBounds(actions, with_ranges, untrusted)
        fragments = [
            file_format.make_fragment(path, filesystem, partition_expression=bounds.get_guarantee(n))
            for n, path in enumerate(actions["path"].to_pylist())
        ]
        return ds.FileSystemDataset(fragments, schema, file_format, filesystem)

    def _split_files(
        self, ranges: Collection[str], where: "ds.Expression | None", *, with_deleted: bool = False
    ) -> Iterator[_FilePart]:
        """Split the files that may match a filter into datasets of a few files each.

        A file that holds deleted rows is a dataset of its own.

        What has been read of a file's metadata, some 80 kB, is kept as long as its dataset. In a table of 20,000 files
        that would be 1.6 GB. To open all files as one dataset would also stop the interpreter, and with it the lease's
        heartbeat, for as long as that takes.

        Args:
            ranges: columns by which the filter may tell, from the log, that a file holds nothing for it.
            where: the filter.
            with_deleted: whether deleted rows are read as well.
        """
        actions = self._read_actions()
        self._check_names(actions["path"])
        choices = {} if with_deleted else self._choose_rows()
        schema = pa.unify_schemas([pa.schema(self._table.schema().to_arrow(as_large_types=False)), FACES])
        filesystem = open_arrow_filesystem(self.faces_folder)
        bounds = FileBounds(actions, ranges, self._find_untrusted_files() if where is not None else frozenset())
        file_format = ds.ParquetFileFormat()
        pending: list[ds.Fragment] = []
        for start in range(0, actions.num_rows, _FILES_PASSED_OVER):
            paths = actions["path"].slice(start, _FILES_PASSED_OVER).to_pylist()
            fragments = [
                file_format.make_fragment(path, filesystem, partition_expression=bounds.get_guarantee(start + n))
                for n, path in enumerate(paths)
            ]
            if where is not None:
                candidates = ds.FileSystemDataset(fragments, schema, file_format, filesystem)
                fragments = list(candidates.get_fragments(filter=where))
            if choices:
                for fragment in fragments:
                    if fragment.path in choices:
                        part = ds.FileSystemDataset([fragment], schema, file_format, filesystem)
                        yield _FilePart(part, choices[fragment.path])
                        del part
                fragments = [fragment for fragment in fragments if fragment.path not in choices]
            pending += fragments
            is_last = start + len(paths) >= actions.num_rows
            while len(pending) >= _FILES_AT_ONCE or (pending and is_last):
                files = pending[:_FILES_AT_ONCE]
                del pending[:_FILES_AT_ONCE]
                yield _FilePart(ds.FileSystemDataset(files, schema, file_format, filesystem))
                del files

    def _choose_rows(self) -> dict[str, RowChoice]:
        """Choose which rows are read of files that are not read in full, by path."""
        return {path: RowChoice(rows) for path, rows in self.deleted_rows.items()}

    def _read_actions(self) -> pa.Table:
        """Read the log's entries of the files that are read."""
        return pa.table(self._table.get_add_actions(flatten=True))

    def batches(
        self,
        columns: Sequence[str] | None = None,
        where: "str | ds.Expression | None" = None,
        rows: int = 8192,
        *,
        with_hidden: bool = False,
        with_deleted: bool = False,
    ) -> Iterator[pa.RecordBatch]:
        """Stream rows as record batches; memory does not grow with the gallery.

        Args:
            columns: names of columns; all by default.
            where: a filter, such as `status = 'ok' and det_score > 0.9`; all rows by default.
            rows: most rows per batch.
            with_hidden: include images whose erasure is recorded. Only what maintains the gallery needs them.
            with_deleted: include deleted rows that files still hold. Only a proof that nothing is left needs them.
        """
        names = check_columns(columns)
        row_filter = to_filter(where)
        filter_names = _find_named_columns(row_filter)
        marks = self.marks if needs_marks([*names, *filter_names]) else NO_MARKS
        first_filter = row_filter
        read_names = names
        if len(marks):
            read_names = list(dict.fromkeys([*names, *KEY, *filter_names]))
            # A row that is marked may match although its file says otherwise, so no file may be passed over.
            if needs_marks(filter_names):
                first_filter = None
        for part in self._split_files(filter_names, first_filter, with_deleted=with_deleted):
            # Look before each part, because an erasure may be recorded during a long read.
            part_filter = first_filter if with_hidden else self._add_hidden(first_filter)
            if part.choice is None:
                batches = self._scan(part.dataset, read_names, part_filter, rows)
            else:
                batches = self._scan_chosen(part, read_names, part_filter, rows)
            for batch in batches:
                yield from _apply_marks(marks, batch, row_filter, names)

    def read_chosen_rows(
        self, key: str, values: pa.Array, columns: Sequence[str], *, file_column: str | None = None
    ) -> Iterator[pa.Table]:
        """Read the rows whose key is among some values, file by file, with as few bytes of thumbnails as possible.

        Args:
            key: name of the column that is compared, `face_id` or `uri`.
            values: of the wanted rows.
            columns: names of the columns to return.
            file_column: name of a further column with the path of each row's file.
        """
        names = check_columns(columns)
        dataset = self.open_all_rows([key])
        marks = self.marks if needs_marks(names) else NO_MARKS
        with_key = list(dict.fromkeys([*names, *(KEY if len(marks) else ("uri",))]))
        parts = iterate_chosen_rows(dataset, key, values, with_key, self._choose_rows())
        while True:
            try:
                part = next(parts, None)
            except (OSError, pa.ArrowException) as error:
                raise StorageError(self._explain_unreadable(error)) from error
            if part is None:
                return
            # Look again for each file, because an erasure may be recorded meanwhile.
            hidden = self.read_hidden()
            rows = part.rows.filter(hidden.visible) if hidden else part.rows
            if rows.num_rows:
                chosen = marks.apply(rows).select(names)
                if file_column is not None:
                    chosen = chosen.append_column(file_column, pa.array([part.path] * chosen.num_rows, pa.string()))
                yield chosen

    def read_hidden(self) -> HiddenImages:
        """Read which images are being erased.

        Raises:
            GalleryError: rows of the version that is open were erased since, and are on disk still.
        """
        hidden = self._hidden.read()
        oldest = self._hidden.oldest_readable
        if self.version < oldest and log.has_later_version(self.faces_folder, self.version):
            raise GalleryError(
                f"images were erased from the gallery {self.path!r} since version {self.version}: open the gallery "
                "again, or run the same command again"
            )
        return hidden

    def _add_hidden(self, where: "ds.Expression | None") -> "ds.Expression | None":
        """Make a filter leave out the images that are being erased."""
        hidden = self.read_hidden()
        if not hidden:
            return where
        return hidden.visible if where is None else where & hidden.visible

    def _scan_chosen(
        self, part: _FilePart, names: list[str], where: "ds.Expression | None", rows: int
    ) -> Iterator[pa.RecordBatch]:
        """Yield the chosen rows of a file that match a filter, which comes last because rows are counted."""
        assert part.choice is not None
        needed = list(dict.fromkeys([*names, *_find_named_columns(where)])) or [FACES.names[0]]
        for batch in part.choice.filter_batches(self._scan(part.dataset, needed, None, rows)):
            matching = batch if where is None else batch.filter(where)
            if matching.num_rows:
                yield matching.select(names)

    def _scan(
        self, dataset: ds.Dataset, names: list[str], where: "ds.Expression | None", rows: int
    ) -> Iterator[pa.RecordBatch]:
        """Yield the batches of a dataset that hold rows, and map Arrow's errors."""
        scanner = dataset.scanner(columns=names, filter=where, batch_size=rows, batch_readahead=2, fragment_readahead=1)
        batches = scanner.to_batches()
        while True:
            try:
                batch = next(batches, None)
            except (OSError, pa.ArrowException) as error:
                raise StorageError(self._explain_unreadable(error)) from error
            if batch is None:
                return
            if batch.num_rows:
                yield batch

    def _explain_unreadable(self, error: Exception) -> str:
        """Say why a file cannot be read: it is damaged, or a later version has replaced it."""
        message = f"cannot read the table in {self.faces_folder!r}: {storage.describe_error(error)}"
        base = self.faces_folder.rstrip("/") + "/"
        try:
            present = {entry.url.removeprefix(base) for entry in storage.list_files(self.faces_folder)}
            current = set(Gallery(self.path).list_paths())
            missing = set(self.list_paths()) - present
        except (StorageError, GalleryError):
            missing = set()
        # Files that no version needs any more are deleted by an erasure at once, and by a compaction after some hours.
        if missing and not missing & current:
            return (
                f"{message}; the gallery was changed while version {self.version} was read, and files of it are "
                "deleted: open the gallery again"
            )
        return f"{message}; `facepipe verify {self.path}` names what is damaged"

    def to_arrow(self, columns: Sequence[str] | None = None, where: "str | ds.Expression | None" = None) -> pa.Table:
        """Read rows as one Arrow table."""
        names = check_columns(columns)
        return pa.Table.from_batches(self.batches(names, where), pa.schema([FACES.field(name) for name in names]))

    def to_pandas(
        self, columns: Sequence[str] | None = None, where: "str | ds.Expression | None" = None
    ) -> "pd.DataFrame":
        """Read rows as a pandas frame."""
        return self.to_arrow(columns, where).to_pandas()

    def vectors(self, where: "str | ds.Expression | None" = None) -> tuple[Int64, Float32]:
        """Read face ids (n,) and unit vectors (n, dim) of all faces, or of those that match a filter."""
        has_face = ds.field("face_id").is_valid()
        row_filter = to_filter(where)
        # Of all faces the log knows the number: each vector is then copied once, and held once.
        room = sum(file["faces"] for file in self.files()) if row_filter is None else _VECTOR_ROWS
        ids = np.empty(room, np.int64)
        vectors = np.empty((room, self.dim), np.float32)
        count = 0
        face_filter = has_face if row_filter is None else has_face & row_filter
        for batch in self.batches(["face_id", "embedding"], face_filter, rows=_VECTOR_ROWS):
            # Copy batch after batch into the arrays, which grow to twice the need if a filter hides their length.
            end = count + batch.num_rows
            if end > len(ids):
                ids = _enlarge(ids, count, 2 * end)
                vectors = _enlarge(vectors, count, 2 * end)
            ids[count:end] = batch["face_id"].to_numpy()
            vectors[count:end] = batch["embedding"].flatten().to_numpy(zero_copy_only=False).reshape(-1, self.dim)
            count = end
        return ids[:count], vectors[:count]

    def counts(self) -> dict[str, int]:
        """Count images by status, and faces."""
        images: Counter[str] = Counter()
        faces = 0
        for batch in self.batches(["status", "face_index"]):
            first_rows = batch.filter(pc.fill_null(pc.equal(batch["face_index"], 0), True))
            images.update(first_rows["status"].to_pylist())
            faces += batch.num_rows - batch["face_index"].null_count
        # The status ok comes first, then the others in order.
        ordered = {OK: images.pop(OK, 0), **dict(sorted(images.items()))}
        return {"images": sum(ordered.values()), "faces": faces, **ordered}

    def has_files_of(self, version: int) -> bool:
        """Tell whether the table has the same rows of files as an older version; False if that cannot be opened."""
        if version == self.version or log.find_last_equal_version(self.faces_folder, version) >= self.version:
            return True
        try:
            return compare_files(Gallery(self.path, version), self).is_empty
        except (GalleryError, StorageError):
            return False

    def read_commits(self, last: int) -> list[RunCommit]:
        """Read which runs made the newest commits, and when; other commits are left out."""
        commits = []
        for entry in self._table.history(last):
            if "facepipe" in entry and "timestamp" in entry:
                time = datetime.fromtimestamp(entry["timestamp"] / 1000, UTC)
                text = time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
                commits.append(RunCommit(str(json.loads(entry["facepipe"]).get("run", "")), text))
        return commits

    def runs(self, last: int = 5) -> list[dict[str, Any]]:
        """Read the metadata of the newest runs' last commits: run id, counts, seconds per stage."""
        # A run makes several commits; twenty per run are enough in most cases.
        history = self._table.history(20 * last)
        commits = [json.loads(entry["facepipe"]) for entry in history if "facepipe" in entry]
        # Oldest first, so that the last commit of a run replaces its earlier ones.
        by_run: dict[str, dict[str, Any]] = {}
        for commit in reversed(commits):
            if commit.get("job") == FENCE:
                continue
            by_run[commit["run"]] = commit
        return list(by_run.values())[-last:]


@dataclass(frozen=True)
class FileDifferences:
    """How the files of a table differ between two versions.

    Attributes:
        added: Paths of files with rows that the older version does not have.
        removed: Paths of files with rows that the newer version may not have.
        deleted: Rows that were deleted from files which both versions have: rising numbers (n,), by path.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    deleted: dict[str, Int64]

    @property
    def is_empty(self) -> bool:
        """Whether both versions have the same rows."""
        return not (self.added or self.removed or self.deleted)


def compare_files(old: Gallery, new: Gallery) -> FileDifferences:
    """Compare the files of two versions of a table.

    Args:
        old: the table in the older version.
        new: the table in the newer version.
    """
    old_paths = old.list_paths()
    new_paths = new.list_paths()
    in_both = set(old_paths).intersection(new_paths)
    nothing = np.empty(0, np.int64)
    deleted = {}
    restored = set()
    for path in in_both.intersection({*old.deleted_rows, *new.deleted_rows}):
        before = old.deleted_rows.get(path, nothing)
        after = new.deleted_rows.get(path, nothing)
        if len(np.setdiff1d(before, after, assume_unique=True)):
            restored.add(path)  # another program has brought rows back: all of them are compared
        elif len(after) > len(before):
            deleted[path] = np.setdiff1d(after, before, assume_unique=True)
    return FileDifferences(
        added=tuple(path for path in new_paths if path not in in_both or path in restored),
        removed=tuple(sorted(path for path in old_paths if path not in in_both or path in restored)),
        deleted=dict(sorted(deleted.items())),
    )


def open_table(folder: str, version: int | None = None) -> DeltaTable:
    """Open a Delta table in a folder or an object store.

    Raises:
        StorageError: its log, or a file of the log, is a link.
    """
    log = storage.join(folder, LOG)
    if is_link(log):
        raise make_link_error(log)
    for name in iterate_links(log):
        raise make_link_error(storage.join(log, name))
    return DeltaTable(find_table_path(folder), version=version, storage_options=get_delta_options(folder))


def reopen_table(folder: str) -> DeltaTable:
    """Open a table that was there before.

    Raises:
        StorageError: the disk or the store does not answer now.
    """
    try:
        return open_table(folder)
    except OSError as error:
        raise StorageError(f"cannot read the table {folder!r}: {storage.describe_error(error)}") from error


def _require_version(path: str, folder: str, version: int) -> None:
    """Raise GalleryError if the table has not got so far."""
    with suppress(TableNotFoundError, StorageError, DeltaError):
        newest = open_table(folder).version()
        if version > newest:
            raise GalleryError(f"the gallery at {path!r} has no version {version}: its newest is {newest}")


def _describe_no_gallery(path: str) -> str:
    """Describe a path without a gallery, and how to make one. A folder of other files is most likely the source."""
    text = f"no gallery at {path!r} (no faces/ table in it)"
    with suppress(OSError, StorageError):
        if not storage.is_remote(path) and os.listdir(path):
            return f"{text}: if it holds photos, `facepipe embed {shlex.quote(path)} GALLERY` makes a gallery of them"
    return f"{text}: `facepipe embed SOURCE {shlex.quote(path)}` makes one"


def _refuse_links_to_others(path: str) -> None:
    """Refuse a gallery one of whose folders is a link into another gallery.

    A folder may lie on another disk, and then is a link. But a link into another gallery would have two names for its
    files, with a lease each, and whoever deletes by one name deletes from the other.

    Raises:
        GalleryError: there is such a link.
    """
    own_table = os.path.realpath(os.path.join(path, "faces"))
    for name in FOLDERS:
        folder = storage.join(path, name)
        if not is_link(folder):
            continue
        target = os.path.realpath(folder)
        for parent in Path(target).parents:
            is_gallery = os.path.isdir(parent / "faces" / LOG)
            # The table of this gallery may lie elsewhere, beside its index. Nobody else writes to it there.
            is_other = os.path.realpath(parent / "faces") != own_table or os.path.exists(parent / LEASE_FILE)
            if is_gallery and is_other and str(parent) != os.path.realpath(path):
                raise GalleryError(
                    f"{folder!r} is a link into the gallery {str(parent)!r}: give each gallery folders of its own, or "
                    f"name {str(parent)!r} itself"
                )


def _describe_empty_entries(folder: str) -> str:
    """Describe the damage that a power cut did to the log of an older facepipe; empty if there is none."""
    with suppress(StorageError):
        names = log.list_empty_entries(folder)
        if names:
            return (
                f"; {len(names)} files of its log are empty, such as {names[0]}. A power cut leaves them so if an "
                "older facepipe wrote them (docs/runbook.md)"
            )
    return ""


def check_columns(columns: Sequence[str] | None) -> list[str]:
    """Return the names of columns, all by default. Raises GalleryError for an unknown one."""
    names = list(FACES.names if columns is None else columns)
    unknown = [name for name in names if name not in FACES.names]
    if unknown:
        raise GalleryError(f"no column {', '.join(unknown)}; columns are {', '.join(FACES.names)}")
    return names


def _create_table(path: str, folder: str, contract: Contract, properties: Mapping[str, str]) -> bool:
    """Create the table of a gallery in its folder; return whether this call did it."""
    configuration = {**properties, CONTRACT_PROPERTY: contract.to_json(), TEXT_PROPERTY: EXACT_TEXT}
    try:
        require_usable_place(path)
        log.create_log(folder, Schema.from_arrow(FACES), name="faces", configuration=configuration)
    except StorageError as error:
        # If a store's answer was lost, the table is there all the same. The caller's lease says that it is ours.
        if not (storage.is_remote(path) and Gallery.exists(path)):
            raise GalleryError(f"cannot make a gallery at {path!r}: {error}") from error
        return False
    return True


def _remove_unfinished(folder: str, *, is_created: bool) -> None:
    """Remove what is left in the log of a table that could not be created, or not be opened after that."""
    with suppress(OSError):
        names = os.listdir(folder)
        if not any(name.endswith(".json") and name != _FIRST_VERSION for name in names):
            for name in names:
                if log.UNFINISHED.fullmatch(name) or (is_created and name == _FIRST_VERSION):
                    os.unlink(os.path.join(folder, name))


def _refuse_file(path: str) -> None:
    if not storage.is_remote(path) and os.path.isfile(path):
        raise ConfigError(f"the gallery {path!r} is a file; name a folder")


def _is_taken(path: str) -> bool:
    """Tell whether a folder for a new gallery holds something.

    What a first run leaves before it makes the table does not count.
    """
    if not storage.is_remote(path):
        if not os.path.exists(path):
            return False
        if not os.path.isdir(path) or any(map(_is_foreign, set(os.listdir(path)) - {"faces"})):
            return True
    start = len(path.rstrip("/")) + 1
    return any(_is_foreign(entry.url[start:]) for entry in storage.list_files(path))


def _is_foreign(name: str) -> bool:
    """Tell whether a file in the folder is not ours. A log whose first entry was not finished does not count."""
    is_unfinished_log = name.startswith("faces/_delta_log/") and not name.endswith(".json")
    is_own = name.split("/")[0] in _OWN_NAMES or name.startswith(PROBE)
    return not (is_unfinished_log or is_own)


def _apply_marks(
    marks: Marks, batch: pa.RecordBatch, row_filter: "ds.Expression | None", names: list[str]
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a batch that match a filter by what the marks say, with some columns; nothing if none does."""
    if len(marks):
        batch = marks.apply(batch)
        if row_filter is not None:
            batch = batch.filter(row_filter)
        batch = batch.select(names)
    if batch.num_rows:
        yield batch


def _find_named_columns(where: "ds.Expression | None") -> list[str]:
    """Find the columns that a filter names; perhaps some more, such as one that is also a word in a value."""
    if where is None:
        return []
    try:
        words = set(re.findall(r"\w+", str(where)))
    except UnicodeDecodeError:
        # Arrow shortens a long value in the middle of a character. Then it may be any of them.
        return list(FACES.names)
    return [name for name in FACES.names if name in words]


def _enlarge(array: npt.NDArray[Any], count: int, length: int) -> npt.NDArray[Any]:
    """Copy the first `count` rows into a new array of `length` rows."""
    larger = np.empty((length, *array.shape[1:]), array.dtype)
    larger[:count] = array[:count]
    return larger
