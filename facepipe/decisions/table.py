"""The table GALLERY/decisions: a small Delta table of its own, so that people can decide while a long run embeds.

Rows are only ever appended. A writer holds the lease of the folder for the moment of a commit, and waits for others.
Readers need no lease. Small files are joined in the commit that finds too many of them; the old ones stay until
`facepipe compact` or an erasure deletes them, because a reader may be at them.
"""

import hashlib
import io
import json
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable, Schema
from deltalake.exceptions import DeltaError, TableNotFoundError

from facepipe import storage
from facepipe.decisions.schema import SCHEMA, conform_rows
from facepipe.errors import GalleryBusyError, GalleryError, StorageError
from facepipe.gallery.commits import log
from facepipe.gallery.commits.parts import is_part, parse_digest
from facepipe.gallery.commits.rewrite import make_add_action, make_remove_action
from facepipe.gallery.table import open_table
from facepipe.storage import conditional
from facepipe.storage.conditional import ConflictError
from facepipe.storage.inside import is_link, require_inside
from facepipe.storage.lease import Lease, hold_lease

FOLDER = "decisions"
"""Folder of the table in the gallery."""

# Files below this size are small, and so many of them are joined in the next commit.
_SMALL_BYTES = 4 << 20
_MANY_FILES = 64
_ROWS_PER_FILE = 1 << 18
# How long a writer waits for another one, which holds the lease for a moment only.
_MAX_WAIT_SECONDS = 120.0
_POLL_SECONDS = 0.1
# How often a reader begins again because files went while it read them.
_MAX_ATTEMPTS = 5


@dataclass(frozen=True)
class DecisionFile:
    """A file of the table.

    Attributes:
        path: its path below the table's folder.
        size: bytes.
        rows: number of rows, by the log.
    """

    path: str
    size: int
    rows: int


class DecisionTable:
    """The table of decisions of a gallery, in the version in which it was opened. It need not exist.

    Attributes:
        folder: path or URL of the table.
        version: version of the table; -1 if there is none.
        files: its files.
    """

    def __init__(self, gallery: str):
        """Open the table.

        Args:
            gallery: path or URL of the gallery.

        Raises:
            GalleryError: there is a table, and it cannot be read.
        """
        self.gallery = storage.to_absolute(gallery)
        self.folder = storage.join(self.gallery, FOLDER)
        self.version = -1
        self.files: tuple[DecisionFile, ...] = ()
        self._delta: DeltaTable | None = None
        self.reopen()

    @property
    def exists(self) -> bool:
        """Whether anybody has decided anything yet."""
        return self.version >= 0

    @property
    def rows(self) -> int:
        """Number of rows, by the log."""
        return sum(file.rows for file in self.files)

    def reopen(self) -> None:
        """Open the newest version."""
        try:
            self._delta = open_table(self.folder)
            self.version = int(self._delta.version())
            self.files = tuple(_list_files(self._delta))
            for file in self.files:
                require_inside(file.path, f"the log of {self.folder!r}")
        except TableNotFoundError:
            self._delta = None
            self.version = -1
            self.files = ()
        except (DeltaError, OSError, StorageError) as error:
            raise GalleryError(f"the decisions in {self.folder!r} cannot be read: {_describe(error)}") from error

    def read(self) -> pa.Table:
        """Read all rows, in no order. If an erasure deletes files meanwhile, the newest version is read.

        Raises:
            StorageError: a file cannot be read.
        """
        for attempt in range(_MAX_ATTEMPTS):
            try:
                return pa.concat_tables([SCHEMA.empty_table(), *(self.read_file(file.path) for file in self.files)])
            except StorageError:
                before = self.version
                self.reopen()
                if self.version == before or attempt == _MAX_ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    def read_file(self, path: str) -> pa.Table:
        """Read the rows of one file. Raises StorageError if it cannot be read."""
        full_path = storage.join(self.folder, path)
        try:
            if is_link(full_path):
                raise StorageError(f"{full_path!r} is a link")
            return conform_rows(pq.ParquetFile(pa.BufferReader(storage.read(full_path))).read())
        except (pa.ArrowException, OSError, ValueError) as error:
            raise StorageError(
                f"cannot read {full_path!r}: {_describe(error)}; `facepipe verify {self.gallery}` names what is damaged"
            ) from error


def _list_files(delta: DeltaTable) -> Iterator[DecisionFile]:
    actions = pa.table(delta.get_add_actions(flatten=True))
    columns = (actions[name].to_pylist() for name in ("path", "size_bytes", "num_records"))
    for path, size, rows in zip(*columns, strict=True):
        yield DecisionFile(path, size, rows or 0)


def _describe(error: Exception) -> str:
    return storage.describe_error(error)


class DecisionWriter:
    """Commits to the table while its lease is held.

    Attributes:
        table: the table in its newest version.
        lease: of the table's folder.
    """

    def __init__(self, table: DecisionTable, lease: Lease):
        self.table = table
        self.lease = lease

    def append(self, rows: pa.Table) -> None:
        """Append rows, all at once; small files are joined in the same commit if there are many.

        Args:
            rows: rows of the table's schema.

        Raises:
            GalleryBusyError: the lease is lost.
        """
        if not self.table.exists:
            log.create_log(self.table.folder, Schema.from_arrow(SCHEMA), name=FOLDER, configuration={})
            self.table.reopen()
        small = [file for file in self.table.files if file.size < _SMALL_BYTES]
        if len(small) < _MANY_FILES:
            self.commit(rows, [])
            return
        joined = [rows, *(self.table.read_file(file.path) for file in small)]
        self.commit(pa.concat_tables(joined), [file.path for file in small])

    def commit(self, rows: pa.Table | None, removed: Sequence[str], operation: str = "WRITE") -> None:
        """Commit rows as new files, and take files out of the table, in one step.

        Args:
            rows: rows to put into the table; none for a commit that only removes.
            removed: paths of files to take out.
            operation: what the log calls it.

        Raises:
            GalleryBusyError: the lease is lost.
            StorageError: the commit cannot be written.
        """
        folder = self.table.folder
        actions = [log.encode_action(make_remove_action(path)) for path in removed]
        added = []
        for start in range(0, rows.num_rows if rows is not None else 0, _ROWS_PER_FILE):
            assert rows is not None
            part = rows.slice(start, _ROWS_PER_FILE)
            data = encode_rows(part)
            digest = hashlib.sha256(data).hexdigest()[:32]
            path = f"part-decisions-{secrets.token_hex(8)}-{digest}.parquet"
            storage.write(storage.join(folder, path), data)
            actions.append(log.encode_action(make_add_action(path, len(data), _count_nulls(part))))
            added.append(path)
        # The version decides between two writers, and the lease between a writer and one that was paused.
        version = self.table.version + 1
        self.lease.renew()
        try:
            log.write_entry(folder, version, operation, actions)
        except ConflictError as error:
            raise self._make_busy_error() from error
        except StorageError:
            # A store may have taken the entry, and its answer is lost.
            if not (storage.is_remote(folder) and self._is_committed(version, added)):
                raise
        self.lease.settle()
        was_overtaken = log.has_later_version(folder, version)
        self.table.reopen()
        # The log before an erasure is deleted, so that a paused writer may find the name of its entry free again.
        if was_overtaken and not set(added) <= {file.path for file in self.table.files}:
            raise self._make_busy_error()
        if log.is_checkpoint_due(version):
            log.write_checkpoint(folder, self.lease)

    def _is_committed(self, version: int, added: Sequence[str]) -> bool:
        entry = conditional.read_tagged(storage.join(self.table.folder, log.LOG, f"{version:020d}.json"))
        return entry is not None and bool(added) and all(path.encode() in entry[0] for path in added)

    def _make_busy_error(self) -> GalleryBusyError:
        return GalleryBusyError(
            f"another run has written to {self.table.folder!r} since this one began; nothing was added: run the same "
            "command again"
        )

    def fence(self) -> None:
        """Make sure that no commit of a writer that was paused is accepted any more."""
        if self.table.exists and not self.lease.is_settled:
            self.commit(None, [], "FENCE")

    def delete_unreferenced(self, older_than: float = 0.0) -> int:
        """Delete files of ours that the table does not name; return how many.

        Args:
            older_than: seconds for which a file must have existed.
        """
        # List first: everything that is listed before the renewal was there before any later writer began.
        entries = list(storage.list_files(self.table.folder))
        now = self.lease.renew()
        self.fence()
        named = {file.path for file in self.table.files}
        base = self.table.folder.rstrip("/") + "/"
        unneeded = [
            entry.url
            for entry in entries
            if is_part(entry.url.removeprefix(base))
            and entry.url.removeprefix(base) not in named
            and now - entry.modified > older_than
            and not is_link(entry.url)
        ]
        storage.delete_many(unneeded, before_batch=self.lease.check)
        return len(unneeded)


@contextmanager
def hold_decisions(gallery: str, purpose: str = "") -> Iterator[DecisionWriter]:
    """Hold the lease of the table of decisions; wait for another writer, which holds it for moments.

    Args:
        gallery: path or URL of the gallery.
        purpose: `facepipe.storage.lease.ERASURE` if the holder is an erasure.

    Raises:
        GalleryBusyError: another writer holds it for minutes.
    """
    folder = storage.join(storage.to_absolute(gallery), FOLDER)
    deadline = time.monotonic() + _MAX_WAIT_SECONDS
    with ExitStack() as stack:
        while True:
            try:
                lease = stack.enter_context(hold_lease(folder, "decisions", purpose=purpose))
                break
            except GalleryBusyError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_POLL_SECONDS)
        yield DecisionWriter(DecisionTable(gallery), lease)


def compact_table(gallery: str, older_than: float, *, everything: bool = False) -> int:
    """Join the table's small files if there are many, and delete files that left it long ago.

    Args:
        gallery: path or URL of the gallery.
        older_than: seconds for which a file must have existed to be deleted.
        everything: join from two small files on.

    Returns:
        The number of files that were joined.
    """
    if not DecisionTable(gallery).exists:
        return 0
    with hold_decisions(gallery) as writer:
        small = [file for file in writer.table.files if file.size < _SMALL_BYTES]
        is_due = len(small) >= (2 if everything else _MANY_FILES)
        if is_due:
            joined = pa.concat_tables([writer.table.read_file(file.path) for file in small])
            writer.commit(joined, [file.path for file in small], "OPTIMIZE")
        writer.delete_unreferenced(older_than)
    return len(small) if is_due else 0


def encode_rows(rows: pa.Table) -> bytes:
    """Encode rows of the table as Parquet."""
    sink = io.BytesIO()
    pq.write_table(rows, sink, compression="zstd")
    return sink.getvalue()


def _count_nulls(rows: pa.Table) -> str:
    """Make Delta's statistics of a file: counts only, because ranges would quote names and ids in the log."""
    nulls = {name: rows[name].null_count for name in rows.column_names}
    return json.dumps({"numRecords": rows.num_rows, "minValues": {}, "maxValues": {}, "nullCount": nulls})


def verify_table(gallery: str) -> tuple[int, list[str]]:
    """Check the files of the table: checksums, number of rows, columns, ids that occur once.

    Returns:
        Number of rows, and a line per problem.
    """
    try:
        table = DecisionTable(gallery)
    except GalleryError as error:
        return 0, [str(error)]
    problems = []
    seen: set[str] = set()
    repeated = 0
    rows = 0
    for file in table.files:
        name = f"{FOLDER}/{file.path}"
        try:
            data = storage.read(storage.join(table.folder, file.path))
            part = table.read_file(file.path)
        except StorageError as error:
            problems.append(f"{name}: cannot be read: {error}")
            continue
        digest = parse_digest(file.path)
        if digest is not None and hashlib.sha256(data).hexdigest()[:32] != digest:
            problems.append(f"{name}: checksum differs, the file was altered")
        if part.num_rows != file.rows:
            problems.append(f"{name}: {part.num_rows} rows, the log says {file.rows}")
        rows += part.num_rows
        for decision_id in part["decision_id"].to_pylist():
            repeated += decision_id in seen
            seen.add(decision_id)
    if repeated:
        problems.append(f"{FOLDER}: {repeated} decisions that occur twice")
    with suppress(StorageError):
        empty = log.list_empty_entries(table.folder) if table.exists else []
        problems.extend(f"{FOLDER}: {name} of the log is empty: a power cut took a commit" for name in empty)
    return rows, problems
