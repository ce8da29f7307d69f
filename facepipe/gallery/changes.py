"""What came into a gallery's table since a mark, and which faces left it, at a cost in proportion to what changed.

Two versions of the table are compared by their files. Nobody rewrites a row and calls it new: what a rewrite, an
erasure or a compaction moves to another file is told from what is new by its key and the time of its ingestion.
"""

import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from facepipe import storage
from facepipe.errors import GalleryError, StorageError
from facepipe.gallery.table import Gallery
from facepipe.sorted_lookup import find_sorted, is_in_sorted
from facepipe.types import Int64, UInt64

_ROWS = 65536
_NEW_ROWS_ONLY = re.compile(r"part-(?!rewrite-|compact-).*-[0-9a-f]{32}\.parquet$")
_KEY = ("uri", "face_index", "ingested_at")
_LAG = timedelta(days=1)  # at most, between the stamp on a row and the commit that shows it


@dataclass(frozen=True)
class ReadMark:
    """How far somebody has read a gallery. newest: ISO time of the last ingestion seen; None where rows bear none."""

    gallery: str
    version: int
    newest: str | None = None

    @classmethod
    def from_gallery(cls, gallery: Gallery) -> "ReadMark":
        """All of a gallery, as it is open."""
        times = [time for time in PartialGallery(gallery).read_newest_times().values() if time is not None]
        return cls(gallery.id, gallery.version, max(times).isoformat() if times else None)

    def save(self, path: str) -> None:
        """Write it to a file, or an object."""
        storage.write(path, json.dumps(asdict(self)).encode())

    @classmethod
    def load(cls, path: str) -> "ReadMark | None":
        """One that was saved; None where none is, or none that can be read: all rows are new then."""
        try:
            data = storage.read(os.fsencode(path))
        except StorageError:
            return None
        try:
            found = cls(**json.loads(data))
            found._time()
        except (ValueError, TypeError):
            return None
        return found

    def _time(self) -> datetime | None:
        return datetime.fromisoformat(self.newest) if self.newest else None

    def filter_newer(self, lag: timedelta = timedelta(0)) -> ds.Expression:
        """Rows that were ingested later, and those that do not say when."""
        time, column = self._time(), ds.field("ingested_at")
        if time is None:
            return pc.scalar(True)
        return column.is_null() | (column > pa.scalar(time.astimezone(UTC) - lag, pa.timestamp("us", "UTC")))


class PartialGallery(Gallery):
    """A gallery of which only some files are read; all of them by default."""

    def __init__(self, gallery: Gallery, files: Sequence[str] | None = None):
        self.__dict__.update(gallery.__dict__)
        self._chosen = None if files is None else frozenset(files)

    def dataset(self, ranges: Collection[str] | None = None) -> ds.Dataset:
        """The chosen files as a pyarrow dataset."""
        whole = super().dataset(ranges)
        if self._chosen is None:
            return whole
        chosen = [fragment for fragment in whole.get_fragments() if fragment.path in self._chosen]
        return ds.FileSystemDataset(chosen, whole.schema, whole.format, whole.filesystem)

    def read_newest_times(self) -> dict[str, datetime | None]:
        """The last ingestion in each of the table's files, by path, from the log."""
        actions = pa.table(self._table.get_add_actions(flatten=True))
        paths = actions["path"].to_pylist()
        name = "max.ingested_at"
        times = actions[name].to_pylist() if name in actions.column_names else [None] * len(paths)
        return dict(zip(paths, times, strict=True))


@dataclass(frozen=True)
class TableChanges:
    """Between a mark and a gallery, by the names of files.

    new_files: all rows are new; mixed_files: some may be; removed_files: were in the table at the mark and are no more, None where that is
    not known. `old_gallery` is the gallery at the mark.
    """

    gallery: Gallery
    mark: ReadMark | None
    new_files: tuple[str, ...]
    mixed_files: tuple[str, ...]
    removed_files: tuple[str, ...] | None
    old_gallery: Gallery | None = None

    @property
    def is_empty(self) -> bool:
        """Whether the table's files are the same ones."""
        return not self.new_files and not self.mixed_files and not self.removed_files and self.removed_files is not None

    def read_new_rows(self, columns: Sequence[str], rows: int = _ROWS) -> Iterator[pa.RecordBatch]:
        """Rows that are new, in batches with these columns. An image that was embedded again because its file changed
        is new. Where neither the files of then are there nor times of ingestion, rows may come that are not new."""
        yield from PartialGallery(self.gallery, self.new_files).batches(columns, rows=rows) if self.new_files else ()
        if not self.mixed_files:
            return
        assert self.mark is not None
        moved = self._moved()
        where = self.mark.filter_newer() if moved is None else self.mark.filter_newer(_LAG)
        names = list(dict.fromkeys([*columns, *(_KEY if moved is not None else ())]))
        for batch in PartialGallery(self.gallery, self.mixed_files).batches(names, where, rows=rows):
            new = batch if moved is None else batch.filter(pa.array(~is_in_sorted(moved, _keys(batch))))
            if new.num_rows:
                yield new.select(list(columns))

    def find_deleted_ids(self) -> Int64 | None:
        """(n,) sorted ids of the faces that are in the table no more; None where only comparing all ids can tell.

        16 bytes of memory a face of the files that went.
        """
        if self.removed_files is None or self.old_gallery is None:
            return None
        try:
            left = (
                np.sort(_ids(PartialGallery(self.old_gallery, self.removed_files)))
                if self.removed_files
                else np.empty(0, np.int64)
            )
        except (OSError, StorageError, pa.ArrowException):  # vacuumed
            return None
        stays = np.zeros(len(left), bool)
        came = (*self.new_files, *self.mixed_files)
        for batch in PartialGallery(self.gallery, came).batches(["face_id"], rows=_ROWS) if len(left) and came else ():
            ids = batch["face_id"].drop_null().to_numpy()
            at = find_sorted(left, ids)
            stays[at[at >= 0]] = True
        return left[~stays]

    def _moved(self) -> UInt64 | None:
        """Sorted keys of the rows of then that may stand in another file now; None where they cannot be read."""
        if self.removed_files is None or self.old_gallery is None or self.mark is None:
            return None
        recent, parts = self.mark.filter_newer(_LAG), [np.empty(0, np.uint64)]
        candidates = (
            PartialGallery(self.gallery, self.mixed_files).dataset(["ingested_at"]).get_fragments(filter=recent)
        )
        if next(iter(candidates), None) is None:
            return parts[0]
        try:
            parts += [
                _keys(batch)
                for batch in PartialGallery(self.old_gallery, self.removed_files).batches(_KEY, recent, rows=_ROWS)
            ]
        except (OSError, StorageError, pa.ArrowException):  # vacuumed
            return None
        return np.sort(np.concatenate(parts))


def find_changes(gallery: Gallery, mark: ReadMark | None) -> TableChanges:
    """What became of the table's files since a mark. Without one everything is new; where the table of then cannot be
    opened (a cleaned log), or was another, rows are told by their time of ingestion alone."""
    now = tuple(file["path"] for file in gallery.files())
    if mark is None:
        return TableChanges(gallery, None, now, (), None)
    then = _then(gallery, mark)
    if then is None:
        return TableChanges(gallery, mark, (), now, None)
    before = {file["path"] for file in then.files()}
    gone = tuple(sorted(before.difference(now)))
    came = [path for path in now if path not in before]
    whole = tuple(path for path in came if not gone or _NEW_ROWS_ONLY.search(path))
    return TableChanges(gallery, mark, whole, tuple(p for p in came if p not in set(whole)), gone, then)


def _then(gallery: Gallery, mark: ReadMark) -> Gallery | None:
    if mark.gallery != gallery.id or mark.version > gallery.version:
        return None
    if mark.version == gallery.version:
        return gallery
    try:
        return Gallery(gallery.path, mark.version)
    except GalleryError:
        return None


def _ids(gallery: Gallery) -> Int64:
    parts = [batch["face_id"].drop_null().to_numpy() for batch in gallery.batches(["face_id"], rows=_ROWS)]
    return np.concatenate([np.empty(0, np.int64), *parts])


def _keys(batch: pa.RecordBatch) -> UInt64:
    """(n,) a hash of what makes a row that row, wherever it stands: image, face and the time it was embedded."""
    keys = pd.util.hash_array(np.asarray(batch["uri"].to_numpy(zero_copy_only=False), object))
    for name, absent in (("face_index", -1), ("ingested_at", 0)):
        numbers: Any = pc.fill_null(batch[name].cast(pa.int64()), absent).to_numpy()
        keys = pd.util.hash_array(keys ^ pd.util.hash_array(numbers))
    return np.asarray(keys, np.uint64)
