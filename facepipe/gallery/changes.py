"""Find what came into a gallery's table since a mark, and which faces left it, without reading the whole table.

Two versions of the table are compared by their files, so the cost is in proportion to what changed. A rewrite, an
erasure or a compaction moves rows to other files. Such rows are told from new ones by their key and by the time of
their ingestion.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from facepipe import storage
from facepipe.errors import GalleryError, StorageError
from facepipe.gallery.deletion_vectors import RowChoice
from facepipe.gallery.table import Gallery, compare_files
from facepipe.sorted_lookup import find_sorted, is_in_sorted
from facepipe.types import Int64, UInt64

# Rows per batch while keys and ids are read.
_ROWS = 65536
# Names of files whose rows are all new: files of a rewrite or a compaction hold older rows.
_NEW_ROWS_ONLY = re.compile(r"part-(?!rewrite-|compact-).*-[0-9a-f]{32}\.parquet$")
# These columns identify a row wherever it stands. A face keeps its id when its image gets another uri.
_KEY = ("face_id", "uri", "face_index", "ingested_at")
_MAX_LAG = timedelta(days=1)  # between the time on a row and the commit that shows the row


@dataclass(frozen=True)
class ReadMark:
    """How far a reader has read a gallery.

    Attributes:
        gallery: Id of the table.
        version: Version of the table.
        newest: ISO time of the last ingestion that was read; None if no row has one.
    """

    gallery: str
    version: int
    newest: str | None = None

    @classmethod
    def from_gallery(cls, gallery: Gallery) -> "ReadMark":
        """Make the mark of a reader who has read all of a gallery in the version that is open."""
        times = [time for time in PartialGallery(gallery).read_newest_times().values() if time is not None]
        return cls(gallery.id, gallery.version, max(times).isoformat() if times else None)

    def save(self, path: str) -> None:
        """Write the mark to a file or an object."""
        storage.write(path, json.dumps(asdict(self)).encode())

    @classmethod
    def load(cls, path: str) -> "ReadMark | None":
        """Read a saved mark; None if there is none, or it cannot be read. All rows are new then."""
        try:
            data = storage.read(path)
        except StorageError:
            return None
        try:
            mark = cls(**json.loads(data))
            mark._parse_time()
        except (ValueError, TypeError):
            return None
        return mark

    def _parse_time(self) -> datetime | None:
        return datetime.fromisoformat(self.newest) if self.newest else None

    def filter_newer(self, lag: timedelta = timedelta(0)) -> ds.Expression:
        """Make a filter for rows that were ingested later than the mark less a lag, or do not say when."""
        time = self._parse_time()
        column = ds.field("ingested_at")
        if time is None:
            return pc.scalar(True)
        return column.is_null() | (column > pa.scalar(time.astimezone(UTC) - lag, pa.timestamp("us", "UTC")))


class PartialGallery(Gallery):
    """A gallery of which only some files are read; all of them by default."""

    def __init__(
        self, gallery: Gallery, files: Sequence[str] | None = None, only_rows: Mapping[str, Int64] | None = None
    ):
        """Open some files of a gallery.

        Args:
            gallery: the gallery.
            files: their paths; all by default.
            only_rows: numbers of the rows that are read of files, rising, (n,), by path; all by default.
        """
        # Take over the open table, so that nothing is read from the log again.
        self.__dict__.update(gallery.__dict__)
        self._chosen = None if files is None else frozenset(files)
        self._only_rows = only_rows or {}

    def _choose_rows(self) -> dict[str, RowChoice]:
        """Choose which rows are read of files that are not read in full, by path."""
        choices = super()._choose_rows()
        return choices | {path: RowChoice(rows, is_kept=True) for path, rows in self._only_rows.items()}

    def _read_actions(self) -> pa.Table:
        """Read the log's entries of the chosen files."""
        actions = super()._read_actions()
        if self._chosen is None:
            return actions
        return actions.filter(pc.is_in(actions["path"], pa.array(sorted(self._chosen), pa.string())))

    def read_newest_times(self) -> dict[str, datetime | None]:
        """Read from the log the time of the last ingestion in each of the table's files, by path."""
        actions = pa.table(self._table.get_add_actions(flatten=True))
        paths = actions["path"].to_pylist()
        # A file without statistics of this column has no time.
        name = "max.ingested_at"
        times = actions[name].to_pylist() if name in actions.column_names else [None] * len(paths)
        return dict(zip(paths, times, strict=True))


@dataclass(frozen=True)
class TableChanges:
    """What happened to the table's files between a mark and a version of a gallery.

    Attributes:
        gallery: The gallery now.
        mark: Up to where it was read; None if it never was.
        new_files: Names of files whose rows are all new.
        mixed_files: Names of files in which some rows may be new.
        removed_files: Names of files that have left the table since the mark; None if that is not known.
        old_gallery: The gallery at the mark; None if it cannot be opened.
        deleted_rows: Rows that were deleted since the mark from files which are still there: their numbers, by file.
    """

    gallery: Gallery
    mark: ReadMark | None
    new_files: tuple[str, ...]
    mixed_files: tuple[str, ...]
    removed_files: tuple[str, ...] | None
    old_gallery: Gallery | None = None
    deleted_rows: Mapping[str, Int64] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether the table's files hold the same rows."""
        has_files = self.new_files or self.mixed_files or self.removed_files or self.deleted_rows
        return not has_files and self.removed_files is not None

    def read_new_rows(self, columns: Sequence[str], rows: int = _ROWS) -> Iterator[pa.RecordBatch]:
        """Yield the new rows in batches with these columns.

        An image that was embedded again because its file changed is new. If neither the old files nor times of
        ingestion are there, rows may come that are not new.
        """
        # Files of a run hold new rows only.
        if self.new_files:
            yield from PartialGallery(self.gallery, self.new_files).batches(columns, rows=rows)
        if not self.mixed_files:
            return
        assert self.mark is not None
        # Rows of mixed files are new unless they stood in another file before, or were ingested earlier.
        moved_keys = self._read_moved_keys()
        mixed = PartialGallery(self.gallery, self.mixed_files)
        if moved_keys is None:
            for batch in mixed.batches(list(columns), self.mark.filter_newer(), rows=rows):
                yield batch.select(list(columns))
            return
        # The key columns are read for the comparison, and dropped before a batch is yielded.
        names = list(dict.fromkeys([*columns, *_KEY]))
        for batch in mixed.batches(names, self.mark.filter_newer(_MAX_LAG), rows=rows):
            new_rows = batch.filter(pa.array(~is_in_sorted(moved_keys, _hash_keys(batch))))
            if new_rows.num_rows:
                yield new_rows.select(list(columns))

    def find_deleted_ids(self) -> Int64 | None:
        """Find the faces that are no longer in the table.

        It takes 16 bytes of memory per face of the removed files.

        Returns:
            Sorted ids (n,); None if only a comparison of all ids can tell.
        """
        if self.removed_files is None or self.old_gallery is None:
            return None
        # Faces of removed files are candidates.
        try:
            removed = np.empty(0, np.int64)
            if self.removed_files or self.deleted_rows:
                removed = np.sort(_read_ids(self._open_removed(self.old_gallery, self.removed_files)))
        except (OSError, StorageError, pa.ArrowException):  # the files were vacuumed
            return None
        # Those that an added file holds were moved, not deleted.
        is_still_there = np.zeros(len(removed), bool)
        added_files = (*self.new_files, *self.mixed_files)
        if len(removed) and added_files:
            added = PartialGallery(self.gallery, added_files)
            for batch in added.batches(["face_id"], rows=_ROWS, with_hidden=True):
                at = find_sorted(removed, batch["face_id"].drop_null().to_numpy())
                is_still_there[at[at >= 0]] = True
        return removed[~is_still_there]

    def _open_removed(self, old_gallery: Gallery, removed_files: Sequence[str]) -> Gallery:
        """Open what has left the table: whole files, and rows of others."""
        return PartialGallery(old_gallery, [*removed_files, *self.deleted_rows], self.deleted_rows)

    def _read_moved_keys(self) -> UInt64 | None:
        """Read the sorted keys of old rows that may stand in another file now; None if they cannot be read."""
        if self.removed_files is None or self.old_gallery is None or self.mark is None:
            return None
        # Only rows near the mark can be taken for new ones, so older rows need no key.
        recent = self.mark.filter_newer(_MAX_LAG)
        parts = [np.empty(0, np.uint64)]
        # If no mixed file has such rows, the old files need not be read.
        candidates = PartialGallery(self.gallery, self.mixed_files).open_all_rows(["ingested_at"])
        if next(iter(candidates.get_fragments(filter=recent)), None) is None:
            return parts[0]
        try:
            old_files = self._open_removed(self.old_gallery, self.removed_files)
            batches = old_files.batches(_KEY, recent, rows=_ROWS, with_hidden=True)
            parts += [_hash_keys(batch) for batch in batches]
        except (OSError, StorageError, pa.ArrowException):  # the files were vacuumed
            return None
        return np.sort(np.concatenate(parts))


def find_changes(gallery: Gallery, mark: ReadMark | None) -> TableChanges:
    """Find what happened to the table's files since a mark.

    Without a mark everything is new. If the old version cannot be opened because its log was cleaned, or the mark is of
    another table, new rows are recognised by their time of ingestion alone.
    """
    # Without a mark every file is new; without the old version the rows have to tell.
    files = tuple(gallery.list_paths())
    if mark is None:
        return TableChanges(gallery, None, new_files=files, mixed_files=(), removed_files=None)
    old_gallery = _open_old_gallery(gallery, mark)
    if old_gallery is None:
        return TableChanges(gallery, mark, new_files=(), mixed_files=files, removed_files=None)
    # Compare the two versions by the names of their files, and by the rows that are deleted from them.
    differences = compare_files(old_gallery, gallery)
    is_unmoved = not (differences.removed or differences.deleted)
    # If nothing was removed, no row can have moved. Else the name tells whether a file holds rewritten rows.
    new = tuple(path for path in differences.added if is_unmoved or _NEW_ROWS_ONLY.search(path))
    mixed = tuple(path for path in differences.added if path not in set(new))
    return TableChanges(gallery, mark, new, mixed, differences.removed, old_gallery, differences.deleted)


def _open_old_gallery(gallery: Gallery, mark: ReadMark) -> Gallery | None:
    if mark.gallery != gallery.id or mark.version > gallery.version:
        return None
    if mark.version == gallery.version:
        return gallery
    try:
        return Gallery(gallery.path, mark.version)
    except GalleryError:
        return None


def _read_ids(gallery: Gallery) -> Int64:
    batches = gallery.batches(["face_id"], rows=_ROWS, with_hidden=True)
    parts = [batch["face_id"].drop_null().to_numpy() for batch in batches]
    return np.concatenate([np.empty(0, np.int64), *parts])


def _hash_keys(batch: pa.RecordBatch) -> UInt64:
    """Hash what identifies each row wherever it stands: face or image, and the time it was embedded; (n,)."""
    # Rows without a face are known by the image's uri.
    uris = pd.util.hash_array(np.asarray(batch["uri"].to_numpy(zero_copy_only=False), object))
    ids: Any = pc.fill_null(batch["face_id"], 0).to_numpy()
    has_face = batch["face_id"].is_valid().to_numpy(zero_copy_only=False)
    keys = np.where(has_face, pd.util.hash_array(ids), uris)
    # Nulls need a number outside the column's range, because the hash takes no nulls.
    for name, absent in (("face_index", -1), ("ingested_at", 0)):
        numbers: Any = pc.fill_null(batch[name].cast(pa.int64()), absent).to_numpy()
        keys = pd.util.hash_array(keys ^ pd.util.hash_array(numbers))
    return np.asarray(keys, np.uint64)
