"""Delete or change rows by writing their files anew: removed and added files are one transaction."""

import secrets
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake.transaction import AddAction, RemoveAction

from facepipe import storage
from facepipe.errors import StorageError
from facepipe.gallery.commits.parts import compute_statistics, encode_parquet, parse_digest
from facepipe.gallery.marks import KEY, NO_MARKS, SCHEMA, make_marks, needs_marks
from facepipe.gallery.table import Gallery
from facepipe.hashing import compute_image_id
from facepipe.schema import FACES, conform

# In the names of files that hold rows which were in the table before.
REWRITE = "rewrite"
COMPACT = "compact"

# A change of a few columns is kept apart from rows, as marks, if the files would come to more bytes than this. Of fewer
# bytes a new file costs little, and other programs see the change at once.
_MARKS_FROM_BYTES = 64 << 20
# A file in which more of the rows change is written anew at once.
_MARKED_SHARE = 0.1
# Marks of a gallery at most: all readers hold them.
MOST_MARKS = 2_000_000


@dataclass(frozen=True)
class MarkImages:
    """An action that changes the marks of images, and no file.

    Attributes:
        images: The new marks (`marks.SCHEMA`).
    """

    images: pa.Table


Action: TypeAlias = AddAction | RemoveAction | MarkImages
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
            concerned; None if the rows have to be written anew. Absent: they always have to.
        deletes: Whether `change` deletes the rows concerned, and does nothing else. A file of which all rows go is then
            not read.
    """

    columns: Sequence[str]
    matches: Callable[[pa.Table], pa.BooleanArray]
    change: Change
    may_match: Callable[[dict[str, Any]], bool] = lambda file: True
    data_change: bool = True
    change_marked: Callable[[pa.Table], pa.Table | None] | None = None
    deletes: bool = False


@dataclass
class RewriteTrace:
    """What a rewrite did.

    Attributes:
        before: (name, digest or None) of the files that were removed.
        after: (name, digest or None) of the files that were added.
        rows: Number of rows deleted.
    """

    before: list[tuple[str, str | None]] = field(default_factory=list)
    after: list[tuple[str, str | None]] = field(default_factory=list)
    rows: int = 0


def rewrite_files(gallery: Gallery, rewrite: Rewrite, trace: RewriteTrace | None = None) -> Iterator[Action]:
    """Write the new files of a rewrite, and yield the actions that put them into the table.

    Args:
        gallery: the gallery in the version that is changed.
        rewrite: the change.
        trace: filled in, if it is given.
    """
    # In the order of uris: a change that counts images, or gives them out, then does not depend on who wrote the files.
    deferrable: list[_DeferrableFile] = []
    for file in sorted(gallery.files(), key=lambda file: (file["min.uri"] or "", file["path"])):
        if not rewrite.may_match(file):
            continue
        # Read the few columns of the test first; the whole file is read only if a row matches.
        mask = rewrite.matches(read_rows(gallery, file["path"], rewrite.columns))
        if not pc.any(mask).as_py():
            continue
        marks = _make_file_marks(gallery, file["path"], rewrite, mask)
        if marks is None:
            yield from _rewrite_file(gallery, file["path"], mask, rewrite, trace)
        else:
            deferrable.append(_DeferrableFile(file["path"], file["size_bytes"], mask, marks))
    if deferrable and _is_worth_marks(gallery, deferrable):
        yield MarkImages(pa.concat_tables([file.marks for file in deferrable]))
        return
    for deferred in deferrable:
        yield from _rewrite_file(gallery, deferred.path, deferred.mask, rewrite, trace)


@dataclass(frozen=True)
class _DeferrableFile:
    """A file whose rows need not be written anew.

    Attributes:
        path: its path below the table's folder.
        size: its bytes.
        mask: which rows are concerned.
        marks: what to keep apart instead.
    """

    path: str
    size: int
    mask: pa.BooleanArray
    marks: pa.Table


def _is_worth_marks(gallery: Gallery, files: list[_DeferrableFile]) -> bool:
    """Tell whether writing files anew would write many bytes for a few values each."""
    count = len(gallery.marks) + sum(file.marks.num_rows for file in files)
    return sum(file.size for file in files) >= _MARKS_FROM_BYTES and count <= MOST_MARKS


def _make_file_marks(gallery: Gallery, path: str, rewrite: Rewrite, mask: pa.BooleanArray) -> pa.Table | None:
    """Make the marks that say the same as a change of a file's rows; None if the file has to be written anew."""
    if rewrite.change_marked is None or (pc.sum(mask).as_py() or 0) > _MARKED_SHARE * len(mask):
        return None
    changed = rewrite.change_marked(read_rows(gallery, path, SCHEMA.names).filter(mask))
    return None if changed is None else make_marks(changed)


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
    change_marked: Callable[[pa.Table], pa.Table | None] | None = None,
) -> Rewrite:
    """Plan a change of the files that hold these uris."""
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
    )


def read_rows(gallery: Gallery, path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a file of the table, with what the marks say; columns that it lacks, because it is older, are null.

    Args:
        gallery: the gallery.
        path: path of the file below the table's folder.
        columns: names of columns, all by default.

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
