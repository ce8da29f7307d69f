"""Commits: parts become visible, all at once and exactly once; older rows of changed images go in the same step."""

import json
import time
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable
from deltalake.transaction import AddAction, RemoveAction, Transaction

from facepipe import storage
from facepipe.gallery.parts import Record, encode, statistics
from facepipe.gallery.table import Gallery
from facepipe.hashing import image_id
from facepipe.schema import FACES, conform


class Committer:
    """Commits a run's records to a gallery, transaction after transaction."""

    def __init__(self, gallery: Gallery, run: str):
        self.gallery, self.run = gallery, run
        self.commits = 0
        self._table = DeltaTable(gallery.faces_folder)

    def __call__(self, records: list[Record], metadata: dict[str, Any]) -> None:
        """Make the records' parts visible, with the run's figures so far in the log."""
        parts = [record for record in records if record.path]
        touched = {uri: mark for record in records for uri, mark in record.touched.items() if mark}
        if not parts and not touched:
            return
        self._table.update_incremental()
        actions: list[AddAction | RemoveAction] = [_add(r.path, r.size, r.stats) for r in parts if r.path]
        replaced = {uri for record in parts for uri in record.replaced}
        if replaced or touched:
            actions += _rewritten(self.gallery, replaced, touched)
        if not actions:
            return
        self.commits += 1
        note = json.dumps({"run": self.run, "commit": self.commits, **metadata})
        properties = CommitProperties(
            custom_metadata={"facepipe": note}, app_transactions=[Transaction(self.run, self.commits)]
        )
        self._table.create_write_transaction(actions, "append", self._table.schema(), commit_properties=properties)


def _add(path: str, size: int, stats: str, data_change: bool = True) -> AddAction:
    return AddAction(path, size, {}, int(time.time() * 1000), data_change, stats)


def _rewritten(gallery: Gallery, replaced: set[str], touched: dict[str, str]) -> Iterator[AddAction | RemoveAction]:
    """Copies of the files that hold these uris, without the replaced rows, with new fingerprints on the touched."""
    uris = sorted(replaced | touched.keys())
    for file in Gallery(gallery.path).files():
        at = bisect_left(uris, file["min.uri"] or "")
        if at == len(uris) or uris[at] > (file["max.uri"] or uris[at]):
            continue
        with storage.open_seekable(storage.join(gallery.faces_folder, file["path"])) as handle:
            parquet = pq.ParquetFile(handle)
            if not pc.any(pc.is_in(parquet.read(["uri"])["uri"], pa.array(uris, pa.string()))).as_py():
                continue
            rows = conform(parquet.read())
        keep = rows.filter(pc.invert(pc.is_in(rows["uri"], pa.array(sorted(replaced), pa.string()))))
        changed = keep.num_rows < rows.num_rows
        keep, marked = _marked(keep, touched)
        if not changed and not marked:
            continue
        yield RemoveAction(file["path"], changed, int(time.time() * 1000))
        if keep.num_rows:
            data = encode(keep)
            name = f"part-rewrite-{keep.num_rows:06d}-{image_id(data)}.parquet"
            storage.write(storage.join(gallery.faces_folder, name), data)
            yield _add(name, len(data), statistics(keep), changed)


def _marked(rows: pa.Table, touched: dict[str, str]) -> tuple[pa.Table, bool]:
    """(rows with new fingerprints, whether there were any)."""
    uris, old = rows["uri"].to_pylist(), rows["fingerprint"].to_pylist()
    new = [touched.get(uri, mark) for uri, mark in zip(uris, old, strict=True)]
    n = FACES.get_field_index("fingerprint")
    return rows.set_column(n, FACES.field(n), pa.array(new, pa.string())), new != old
