"""Rows leave or change by their files being written anew: what goes out and what comes in is one transaction."""

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
from facepipe.gallery.table import Gallery
from facepipe.hashing import compute_image_id
from facepipe.schema import FACES, conform

Action: TypeAlias = AddAction | RemoveAction
REWRITE, COMPACT = "rewrite", "compact"  # in the names of files that hold rows which were there before


Change: TypeAlias = Callable[[pa.Table, pa.BooleanArray], pa.Table]


@dataclass(frozen=True)
class Rewrite:
    """What is changed. columns: those `matches` looks at; matches: (n,) mask of the rows concerned; change: the rows
    that take the place of all of a file's, given them and the mask; may_match: whether a file can hold such rows.

    data_change: whether readers lose or gain rows by it.
    """

    columns: Sequence[str]
    matches: Callable[[pa.Table], pa.BooleanArray]
    change: Change
    may_match: Callable[[dict[str, Any]], bool] = lambda file: True
    data_change: bool = True


@dataclass
class RewriteTrace:
    """What a rewrite did: (name, digest or None) of files before and after."""

    before: list[tuple[str, str | None]] = field(default_factory=list)
    after: list[tuple[str, str | None]] = field(default_factory=list)
    rows: int = 0


def rewrite_files(gallery: Gallery, what: Rewrite, trace: RewriteTrace | None = None) -> Iterator[Action]:
    """The actions of a rewrite, file by file; new files are written on the way."""
    for file in gallery.files():
        if not what.may_match(file):
            continue
        rows, mask = _matching(gallery, file["path"], what)
        if rows is None:
            continue
        kept = what.change(rows, mask)
        yield make_remove_action(file["path"], what.data_change)
        if trace is not None:
            trace.before.append((file["path"], parse_digest(file["path"])))
            trace.rows += rows.num_rows - kept.num_rows
        if kept.num_rows:
            action, name = write_rows(gallery, kept, REWRITE, what.data_change)
            yield action
            if trace is not None:
                trace.after.append((name, parse_digest(name)))


def plan_rewrite_of_uris(uris: Iterable[str], change: Change, data_change: bool = True) -> Rewrite:
    """A change of the files that hold these uris."""
    ordered = sorted(uris)
    wanted = pa.array(ordered, pa.string())

    def may_match(file: dict[str, Any]) -> bool:
        at = bisect_left(ordered, file["min.uri"] or "")
        return at < len(ordered) and ordered[at] <= (file["max.uri"] or ordered[at])

    return Rewrite(("uri",), lambda rows: pc.is_in(rows["uri"], wanted), change, may_match, data_change)


def _matching(gallery: Gallery, path: str, what: Rewrite) -> tuple[pa.Table | None, Any]:
    place = storage.join(gallery.faces_folder, path)
    try:
        with storage.open_seekable(place) as handle:
            parquet = pq.ParquetFile(handle)
            held = [name for name in what.columns if name in parquet.schema_arrow.names]
            looked_at = conform(parquet.read(held), pa.schema([FACES.field(name) for name in what.columns]))
            mask = what.matches(looked_at)
            return (conform(parquet.read()), mask) if pc.any(mask).as_py() else (None, None)
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot read {place!r}: {str(error).splitlines()[0]}") from error


def write_rows(gallery: Gallery, rows: pa.Table, kind: str, data_change: bool) -> tuple[AddAction, str]:
    """(action, name) of a new file of rows."""
    data = encode_parquet(rows)
    name = f"part-{kind}-{rows.num_rows:06d}-{compute_image_id(data)}.parquet"
    storage.write(storage.join(gallery.faces_folder, name), data)
    return make_add_action(name, len(data), compute_statistics(rows), data_change), name


def make_add_action(path: str, size: int, stats: str, data_change: bool = True) -> AddAction:
    """A file joins the table."""
    return AddAction(path, size, {}, int(time.time() * 1000), data_change, stats)


def make_remove_action(path: str, data_change: bool = True) -> RemoveAction:
    """A file leaves the table."""
    return RemoveAction(path, data_change, int(time.time() * 1000))
