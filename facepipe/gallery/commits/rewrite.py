"""Delete or change rows: removed and added files are one transaction.

A file is written anew if it is small, or if many of its rows change. Of a few rows in large files the log says that
they are deleted, and what they become is written to a new file. What marks can hold changes no file at all.
"""

import secrets
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake.transaction import AddAction, RemoveAction

from facepipe import storage
from facepipe.errors import StorageError
from facepipe.gallery.chosen_rows import read_numbered_rows
from facepipe.gallery.commits.parts import (
    compute_statistics,
    encode_parquet,
    encode_statistics,
    parse_digest,
    to_json_value,
)
from facepipe.gallery.deletion_vectors import RowChoice
from facepipe.gallery.marks import KEY, NO_MARKS, SCHEMA, make_marks, needs_marks
from facepipe.gallery.table import Gallery
from facepipe.hashing import compute_image_id
from facepipe.schema import FACES, conform
from facepipe.storage.table_access import open_arrow_filesystem
from facepipe.types import Bool, Int64

# In the names of files that hold rows which were in the table before.
REWRITE = "rewrite"
COMPACT = "compact"

# Files are spared, by marks and deletion vectors, if they would come to more bytes than this. Of fewer bytes new files
# cost little, other programs see marks at once, and all of them can read the table.
_SPARED_FROM_BYTES = 64 << 20
# A file in which more of the rows change is written anew at once.
_SPARED_SHARE = 0.1
# So is one of which more of the rows would be deleted ones.
_MOST_DELETED = 0.2
# Rows that leave files which are spared are gathered to files of so many rows.
_MOVED_ROWS = 65536
# Marks of a gallery at most: all readers hold them.
MOST_MARKS = 2_000_000


@dataclass(frozen=True)
class MarkImages:
    """An action that changes the marks of images, and no file.

    Attributes:
        images: The new marks (`marks.SCHEMA`).
    """

    images: pa.Table


@dataclass(frozen=True)
class DeleteRows:
    """An action that deletes rows of a file, and leaves the file as it is.

    Attributes:
        path: Path of the file.
        size: Its bytes.
        stats: Its statistics for the log, as JSON.
        rows: Numbers of all its deleted rows, those of before included, rising, (n,).
        since_ms: When the first of them were deleted, in milliseconds since 1970.
        uris: Images of the rows that this action deletes.
        data_change: Whether readers lose or gain rows by it.
    """

    path: str
    size: int
    stats: str
    rows: Int64
    since_ms: int
    uris: pa.Array
    data_change: bool


@dataclass(frozen=True)
class PlainTable:
    """An action by which a table whose files have no deleted rows says that they never will."""


Action: TypeAlias = AddAction | RemoveAction | MarkImages | DeleteRows | PlainTable
DELETED_COLUMNS = ("uri", "image_id", "identity", "face_id")
"""Columns by which a rewrite finds deleted rows that must not stay on disk."""
Change: TypeAlias = Callable[[pa.Table, pa.BooleanArray], pa.Table]


@dataclass(frozen=True)
class Rewrite:
    """A change of rows.

    Attributes:
        columns: Names of the columns that `matches` reads.
        matches: Returns which rows are concerned, (n,).
        change: Returns the new rows of a file, from all its rows and the mask of those concerned.
        may_match: Whether a file, as `Gallery.files` describes it, can hold such rows.
        data_change: Whether readers lose or gain rows by it.
        change_marked: Makes the same change in the columns that marks can hold, from rows of `marks.SCHEMA` which are
            concerned. It returns the rows of those images for which that is the whole change. Absent: of none.
        keeps: Given if `change` treats each row by itself, and each image as a whole. Tells from rows of
            `marks.SCHEMA` that are concerned which of them `change` keeps.
        purges: Tells which deleted rows must not stay on disk, from rows of DELETED_COLUMNS. Their files are written
            anew.
        defers: Whether such rows, and those that `change` deletes, may stay on disk for a while. Their files are noted
            in the trace, so that somebody writes them anew later.
        deletes: Whether `change` deletes the rows concerned, and does nothing else. A file of which all rows go is then
            not read.
    """

    columns: Sequence[str]
    matches: Callable[[pa.Table], pa.BooleanArray]
    change: Change
    may_match: Callable[[dict[str, Any]], bool] = lambda file: True
    data_change: bool = True
    change_marked: Callable[[pa.Table], pa.Table] | None = None
    keeps: Callable[[pa.Table], pa.BooleanArray] | None = None
    purges: Callable[[pa.Table], pa.BooleanArray] | None = None
    deletes: bool = False
    defers: bool = False


@dataclass
class RewriteTrace:
    """What a rewrite did.

    Attributes:
        before: (name, digest or None) of the files that were removed.
        after: (name, digest or None) of the files that were added.
        rows: Number of rows deleted.
        hidden: (name, digest or None) of the files that hold deleted rows which must not stay on disk for long.
    """

    before: list[tuple[str, str | None]] = field(default_factory=list)
    after: list[tuple[str, str | None]] = field(default_factory=list)
    rows: int = 0
    hidden: list[tuple[str, str | None]] = field(default_factory=list)


def rewrite_files(gallery: Gallery, rewrite: Rewrite, trace: RewriteTrace | None = None) -> Iterator[Action]:
    """Write the new files of a rewrite, and yield the actions that put them into the table.

    Args:
        gallery: the gallery in the version that is changed.
        rewrite: the change.
        trace: filled in, if it is given.
    """
    # In the order of uris: a change that counts images, or gives them out, then does not depend on who wrote the files.
    spared: list[_SparedFile] = []
    for file in sorted(gallery.files(), key=lambda file: (file["min.uri"] or "", file["path"])):
        must_go = rewrite.purges is not None and _holds_deleted(gallery, file["path"], rewrite.purges)
        if must_go and rewrite.defers:
            must_go = False
            if trace is not None:
                trace.hidden.append((file["path"], parse_digest(file["path"])))
        if not (must_go or rewrite.may_match(file)):
            continue
        # Read the few columns of the test first; the whole file is read only if a row matches.
        mask = rewrite.matches(read_rows(gallery, file["path"], rewrite.columns))
        if not (must_go or pc.any(mask).as_py()):
            continue
        plan = None if must_go else _plan_sparing(gallery, file, rewrite, mask)
        if plan is None:
            yield from _rewrite_file(gallery, file["path"], mask, rewrite, trace)
        else:
            spared.append(plan)
    if spared and _is_worth_sparing(gallery, spared):
        yield from _spare_files(gallery, spared, rewrite)
        if trace is not None:
            _note_hidden(trace, spared)
        return
    for plan in spared:
        yield from _rewrite_file(gallery, plan.file["path"], plan.mask, rewrite, trace)


@dataclass(frozen=True)
class _SparedFile:
    """A file that need not be written anew.

    Attributes:
        file: the file, as `Gallery.files` describes it.
        mask: which of its rows are concerned.
        marks: what to keep apart instead.
        deleted: numbers of the rows to delete, (n,).
        moved: whether each of them comes back in another file, (n,).
        uris: images of these rows.
        faces: how many of these rows have a face.
    """

    file: dict[str, Any]
    mask: pa.BooleanArray
    marks: pa.Table
    deleted: Int64
    moved: Bool
    uris: pa.Array
    faces: int


def _holds_deleted(gallery: Gallery, path: str, find: Callable[[pa.Table], pa.BooleanArray]) -> bool:
    """Tell whether a file holds deleted rows that must not stay on disk."""
    deleted = gallery.deleted_rows.get(path)
    if deleted is None:
        return False
    rows = read_rows(gallery, path, DELETED_COLUMNS, with_deleted=True).take(pa.array(deleted))
    return bool(pc.any(find(rows)).as_py())


def _note_hidden(trace: RewriteTrace, files: list[_SparedFile]) -> None:
    """Note the files that hold rows which were deleted and come back nowhere."""
    for file in files:
        lost = len(file.deleted) - int(file.moved.sum())
        trace.rows += lost
        if lost:
            trace.hidden.append((file.file["path"], parse_digest(file.file["path"])))


def _is_worth_sparing(gallery: Gallery, files: list[_SparedFile]) -> bool:
    """Tell whether writing files anew would write many bytes for a few values each."""
    count = len(gallery.marks) + sum(file.marks.num_rows for file in files)
    return sum(file.file["size_bytes"] for file in files) >= _SPARED_FROM_BYTES and count <= MOST_MARKS


def _plan_sparing(
    gallery: Gallery, file: dict[str, Any], rewrite: Rewrite, mask: pa.BooleanArray
) -> _SparedFile | None:
    """Plan how a file's rows change without writing it anew; None if it has to be."""
    if rewrite.change_marked is None and rewrite.keeps is None:
        return None
    is_concerned = np.asarray(mask).astype(bool)
    if is_concerned.sum() > _SPARED_SHARE * len(is_concerned):
        return None
    rows = read_rows(gallery, file["path"], [*SCHEMA.names, "face_id"]).filter(mask)
    marked = SCHEMA.empty_table()
    if rewrite.change_marked is not None:
        marked = rewrite.change_marked(rows.select(SCHEMA.names))
    # What marks cannot hold is deleted here, and comes back in another file.
    is_left = pc.invert(pc.is_in(rows["uri"], marked["uri"].combine_chunks()))
    rest = rows.filter(is_left)
    if rest.num_rows and rewrite.keeps is None:
        return None
    numbers = _number_rows(gallery, file)[is_concerned][np.asarray(is_left).astype(bool)]
    is_kept = np.ones(0, bool)
    if rest.num_rows and rewrite.keeps is not None:
        is_kept = np.asarray(rewrite.keeps(rest)).astype(bool)
    before = file["num_records"] - file["rows"]
    if before + len(numbers) > _MOST_DELETED * file["num_records"]:
        return None
    faces = rest.num_rows - rest["face_id"].null_count
    uris = rest["uri"].combine_chunks()
    return _SparedFile(file, mask, make_marks(marked), numbers, is_kept, uris, faces)


def _number_rows(gallery: Gallery, file: dict[str, Any]) -> Int64:
    """List the numbers of the rows of a file that are not deleted, (n,)."""
    return np.delete(np.arange(file["num_records"]), gallery.deleted_rows.get(file["path"], np.empty(0, np.int64)))


def _spare_files(gallery: Gallery, files: list[_SparedFile], rewrite: Rewrite) -> Iterator[Action]:
    """Yield the actions that change rows of files and leave the files as they are."""
    marks = [file.marks for file in files if file.marks.num_rows]
    if marks:
        yield MarkImages(pa.concat_tables(marks))
    with_deleted = [file for file in files if len(file.deleted)]
    statistics = gallery.read_statistics([file.file["path"] for file in with_deleted])
    moved: list[pa.Table] = []
    count = 0
    for file in with_deleted:
        rows = _read_moved_rows(gallery, file)
        yield _make_deletion(gallery, file, statistics[file.file["path"]], rewrite.data_change)
        if rows.num_rows:
            moved.append(rewrite.change(rows, pa.array([True] * rows.num_rows)))
            count += rows.num_rows
        if count >= _MOVED_ROWS:
            yield write_rows(gallery, pa.concat_tables(moved), REWRITE, rewrite.data_change)[0]
            moved = []
            count = 0
    if count:
        yield write_rows(gallery, pa.concat_tables(moved), REWRITE, rewrite.data_change)[0]


def _read_moved_rows(gallery: Gallery, file: _SparedFile) -> pa.Table:
    """Read the rows that leave a file for another one, with what the marks say."""
    path = file.file["path"]
    numbers = file.deleted[file.moved]
    if not len(numbers):
        return FACES.empty_table()
    try:
        with open_arrow_filesystem(gallery.faces_folder).open_input_file(path) as opened:
            rows = conform(read_numbered_rows(opened, numbers, FACES.names))
    except (OSError, pa.ArrowException) as error:
        full_path = storage.join(gallery.faces_folder, path)
        raise StorageError(f"cannot read {full_path!r}: {str(error).splitlines()[0]}") from error
    return gallery.marks.apply(rows)


def _make_deletion(gallery: Gallery, plan: _SparedFile, statistics: dict[str, Any], data_change: bool) -> DeleteRows:
    """Make the action that deletes rows of a file."""
    file = plan.file
    before = gallery.deleted_rows.get(file["path"], np.empty(0, np.int64))
    now_ms = int(time.time() * 1000)
    # With deleted rows, ranges are those of more rows than there are. Deleted rows count as rows without a face, which
    # Delta allows, so that the log still tells the number of faces.
    nulls = {**statistics["nullCount"], "face_id": file["num_records"] - (file["faces"] - plan.faces)}
    limits = {
        name: {column: to_json_value(value) for column, value in statistics[name].items()}
        for name in ("minValues", "maxValues")
    }
    stats = encode_statistics({**statistics, **limits, "nullCount": nulls, "tightBounds": False})
    return DeleteRows(
        path=file["path"],
        size=file["size_bytes"],
        stats=stats,
        rows=np.union1d(before, plan.deleted),
        since_ms=file["modification_time"] if len(before) else now_ms,
        uris=plan.uris,
        data_change=data_change,
    )


def _rewrite_file(
    gallery: Gallery, path: str, mask: pa.BooleanArray, rewrite: Rewrite, trace: RewriteTrace | None
) -> Iterator[Action]:
    """Write a file anew, and yield the actions that replace it."""
    if rewrite.deletes and pc.all(mask).as_py():
        yield make_remove_action(path, rewrite.data_change)
        if trace is not None:
            trace.before.append((path, parse_digest(path)))
            trace.rows += len(mask)
        return
    rows = read_rows(gallery, path)
    new_rows = rewrite.change(rows, mask)
    # The old file leaves the table, and what is left of its rows comes back as a new one.
    yield make_remove_action(path, rewrite.data_change)
    if trace is not None:
        trace.before.append((path, parse_digest(path)))
        trace.rows += rows.num_rows - new_rows.num_rows
    if new_rows.num_rows:
        action, name = write_rows(gallery, new_rows, REWRITE, rewrite.data_change)
        yield action
        if trace is not None:
            trace.after.append((name, parse_digest(name)))


def plan_rewrite_of_uris(
    uris: Iterable[str],
    change: Change,
    data_change: bool = True,
    change_marked: Callable[[pa.Table], pa.Table] | None = None,
    keeps: Callable[[pa.Table], pa.BooleanArray] | None = None,
) -> Rewrite:
    """Plan a change of the files that hold these uris. See `Rewrite` for the arguments."""
    ordered = sorted(uris)
    wanted = pa.array(ordered, pa.string())

    # Bisect for the first wanted uri that is not below the file's range.
    def may_match(file: dict[str, Any]) -> bool:
        n = bisect_left(ordered, file["min.uri"] or "")
        return n < len(ordered) and ordered[n] <= (file["max.uri"] or ordered[n])

    return Rewrite(
        columns=("uri",),
        matches=lambda rows: pc.is_in(rows["uri"], wanted),
        change=change,
        may_match=may_match,
        data_change=data_change,
        change_marked=change_marked,
        keeps=keeps,
    )


def read_rows(
    gallery: Gallery, path: str, columns: Sequence[str] | None = None, *, with_deleted: bool = False
) -> pa.Table:
    """Read a file of the table, with what the marks say; columns that it lacks, because it is older, are null.

    Args:
        gallery: the gallery.
        path: path of the file below the table's folder.
        columns: names of columns, all by default.
        with_deleted: include deleted rows that the file still holds.

    Raises:
        StorageError: the file cannot be read.
    """
    full_path = storage.join(gallery.faces_folder, path)
    wanted = FACES.names if columns is None else list(columns)
    marks = gallery.marks if needs_marks(wanted) else NO_MARKS
    schema = pa.schema([FACES.field(name) for name in dict.fromkeys([*wanted, *(KEY if len(marks) else ())])])
    try:
        with storage.open_seekable(full_path) as handle:
            parquet = pq.ParquetFile(handle)
            names = [name for name in schema.names if name in parquet.schema_arrow.names]
            rows = conform(parquet.read(names), schema)
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot read {full_path!r}: {str(error).splitlines()[0]}") from error
    deleted = gallery.deleted_rows.get(path)
    if deleted is not None and not with_deleted:
        rows = rows.filter(pa.array(RowChoice(deleted).mask(0, rows.num_rows)))
    return marks.apply(rows).select(wanted)


def write_rows(gallery: Gallery, rows: pa.Table, kind: str, data_change: bool) -> tuple[AddAction, str]:
    """Write rows as a new file; return the action that adds it to the table, and its name.

    Args:
        gallery: the gallery to write to.
        rows: rows that were in the table before.
        kind: REWRITE or COMPACT.
        data_change: whether readers lose or gain rows by it.
    """
    return _write_file(gallery, rows, f"{kind}-{rows.num_rows:06d}", data_change)


def write_new_rows(gallery: Gallery, rows: pa.Table, prefix: str) -> AddAction:
    """Write rows that were not in the table before as a new file; return the action that adds it.

    Args:
        gallery: the gallery to write to.
        rows: the rows.
        prefix: first part of the file's name, such as the run's id.
    """
    return _write_file(gallery, rows, prefix, data_change=True)[0]


def _write_file(gallery: Gallery, rows: pa.Table, prefix: str, data_change: bool) -> tuple[AddAction, str]:
    data = encode_parquet(rows)
    # No name is used twice, even for the same rows. So a file that one run lists as left over is never one that a later
    # run has just committed.
    name = f"part-{prefix}-{secrets.token_hex(8)}-{compute_image_id(data)}.parquet"
    storage.write(storage.join(gallery.faces_folder, name), data)
    return make_add_action(name, len(data), compute_statistics(rows), data_change), name


def make_add_action(path: str, size: int, stats: str, data_change: bool = True) -> AddAction:
    """Make the action that adds a file to the table."""
    return AddAction(path, size, {}, int(time.time() * 1000), data_change, stats)


def make_remove_action(path: str, data_change: bool = True) -> RemoveAction:
    """Make the action that removes a file from the table."""
    return RemoveAction(path, data_change, int(time.time() * 1000))
