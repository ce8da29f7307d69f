"""Images by status and faces, counted per file of the table, so that only files which are new have to be read.

The log knows how many rows a file has, but not how many images have failed. To count them, each file has to be opened,
which takes a millisecond: minutes in a table of hundreds of thousands of files. A file of the table never changes, so
each is counted once, and again if rows of it are deleted. Runs that write to the gallery keep the counts in
`runs/counts.parquet`. It holds names of files and numbers, and nothing of any image. Without it, all files are counted.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from facepipe import storage
from facepipe.errors import StorageError
from facepipe.gallery.commits.parts import parse_digest
from facepipe.gallery.commits.rewrite import read_rows
from facepipe.gallery.table import RUNS, Gallery
from facepipe.schema import OK, STATUSES

_NAME = "counts.parquet"
_FACES = "faces"
_COUNTED = (_FACES, *STATUSES)
_DELETED = "deleted"  # number of deleted rows that were not counted
_SCHEMA = pa.schema([("path", pa.string()), (_DELETED, pa.int64()), *((name, pa.int64()) for name in _COUNTED)])
# What is read of a file.
_COLUMNS = ("status", "face_index")


def count_images(gallery: Gallery) -> dict[str, int]:
    """Count images by status, and faces, as `Gallery.counts` does, and read only files that were not counted before.

    Images that are being erased do not count.
    """
    known, uncounted = _split_counted(gallery)
    if not known.num_rows:
        return gallery.counts()
    total = Counter({name: pc.sum(known[name]).as_py() or 0 for name in _COUNTED})
    for path in uncounted:
        total.update(_count_rows(read_rows(gallery, path, _COLUMNS)))
    # Files were counted with all their rows.
    hidden = gallery.read_hidden()
    if hidden:
        is_hidden = ds.field("uri").isin(hidden.uris)
        for batch in gallery.batches(_COLUMNS, is_hidden, with_hidden=True):
            total.subtract(_count_rows(batch))
    return _to_counts(total)


def refresh_counts(gallery: Gallery) -> int:
    """Count the files that are new, and keep the counts. The caller holds the gallery's lease.

    Returns:
        The number of files that were read.

    Raises:
        StorageError: a file cannot be read, or the counts cannot be written. The old ones stay.
    """
    known, uncounted = _split_counted(gallery)
    stored = _read(gallery)
    named = [path for path in uncounted if parse_digest(path) is not None]
    if not named and known.num_rows == stored.num_rows:
        return 0
    rows = [
        {
            "path": path,
            _DELETED: len(gallery.deleted_rows.get(path, ())),
            **_count_rows(read_rows(gallery, path, _COLUMNS)),
        }
        for path in named
    ]
    # A status that another program has made up is in no column: such a file is counted each time.
    rows = [row for row in rows if row.keys() <= set(_SCHEMA.names)]
    table = pa.concat_tables([known, _to_table(rows)])
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    storage.replace(_get_path(gallery), sink.getvalue().to_pybytes())
    return len(named)


def list_files_with(gallery: Gallery, statuses: Iterable[str]) -> list[str]:
    """List the files of the table that may hold images with one of some statuses."""
    known, uncounted = _split_counted(gallery)
    has_any = pa.array([False] * known.num_rows, pa.bool_())
    for status in set(statuses).intersection(STATUSES):
        has_any = pc.or_(has_any, pc.greater(known[status], 0))
    held: list[str] = known["path"].filter(has_any).to_pylist()
    return [*held, *uncounted]


def _count_rows(rows: pa.Table | pa.RecordBatch) -> Counter[str]:
    """Count the images of rows by status, and the faces."""
    first_rows = rows.filter(pc.fill_null(pc.equal(rows["face_index"], 0), True))
    counts = Counter(first_rows["status"].to_pylist())
    counts[_FACES] = rows.num_rows - rows["face_index"].null_count
    return counts


def _to_counts(total: Counter[str]) -> dict[str, int]:
    """Order counts as `Gallery.counts` does: ok first, then the other statuses that there are."""
    images = {name: count for name, count in sorted(total.items()) if name not in (_FACES, OK) and count}
    ordered = {OK: total[OK], **images}
    return {"images": sum(ordered.values()), _FACES: total[_FACES], **ordered}


def _to_table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist([{**dict.fromkeys(_COUNTED, 0), **row} for row in rows], _SCHEMA)


def _split_counted(gallery: Gallery) -> tuple[pa.Table, list[str]]:
    """Split the table's files into those that were counted, with their counts, and the names of the others."""
    paths = pa.array(gallery.list_paths(), pa.string())
    stored = _read(gallery)
    known = stored.filter(pc.is_in(stored["path"], value_set=paths))
    if gallery.deleted_rows:
        # Deleted rows only become more, so that their number tells whether a file was counted since.
        numbers = [len(gallery.deleted_rows.get(path, ())) for path in known["path"].to_pylist()]
        known = known.filter(pc.equal(known[_DELETED], pa.array(numbers, pa.int64())))
    uncounted = paths.filter(pc.invert(pc.is_in(paths, value_set=known["path"].combine_chunks())))
    return known, uncounted.to_pylist()


def _read(gallery: Gallery) -> pa.Table:
    """Read the counts that are kept; none if they are missing or damaged, because they can be made again."""
    try:
        table = pq.read_table(pa.BufferReader(storage.read(_get_path(gallery))))
        return table.select(_SCHEMA.names).cast(_SCHEMA)
    except (StorageError, pa.ArrowException, KeyError, ValueError):
        return _SCHEMA.empty_table()


def _get_path(gallery: Gallery) -> str:
    return storage.join(gallery.path, RUNS, _NAME)
