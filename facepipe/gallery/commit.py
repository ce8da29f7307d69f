"""Commits: parts become visible, all at once and exactly once; rows of images that changed go in the same step."""

import json
import time
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
from facepipe.schema import FACES


class Committer:
    """Commits a run's records to a gallery, transaction after transaction."""

    def __init__(self, gallery: Gallery, run: str):
        self.gallery, self.run = gallery, run
        self.commits = 0
        self._table = DeltaTable(gallery.faces_folder)

    def __call__(self, records: list[Record], metadata: dict[str, Any]) -> None:
        """Make the records' parts visible, with the run's figures so far in the log."""
        parts = [record for record in records if record.path]
        if not parts:
            return
        self._table.update_incremental()
        actions: list[AddAction | RemoveAction] = [_add(r.path, r.size, r.stats) for r in parts if r.path]
        replaced = sorted({uri for record in parts for uri in record.replaced})
        if replaced:
            actions += _without(self.gallery, replaced)
        self.commits += 1
        note = json.dumps({"run": self.run, "commit": self.commits, **metadata})
        properties = CommitProperties(
            custom_metadata={"facepipe": note}, app_transactions=[Transaction(self.run, self.commits)]
        )
        self._table.create_write_transaction(actions, "append", self._table.schema(), commit_properties=properties)


def _add(path: str, size: int, stats: str) -> AddAction:
    return AddAction(path, size, {}, int(time.time() * 1000), True, stats)


def _without(gallery: Gallery, uris: list[str]) -> list[AddAction | RemoveAction]:
    """Files that hold rows of the uris, replaced by copies without those rows."""
    wanted = pa.array(uris)
    actions: list[AddAction | RemoveAction] = []
    for file in Gallery(gallery.path).files():
        low, high = file.get("min.uri"), file.get("max.uri")
        if low is not None and high is not None and not any(low <= uri <= high for uri in uris):
            continue
        path = storage.join(gallery.faces_folder, file["path"])
        with storage.open_seekable(path) as handle:
            rows = pq.ParquetFile(handle).read()
        keep = rows.filter(pc.invert(pc.is_in(rows["uri"], wanted)))
        if keep.num_rows == rows.num_rows:
            continue
        actions.append(RemoveAction(file["path"], True, int(time.time() * 1000)))
        if keep.num_rows:
            data = encode(keep.cast(FACES))
            name = f"part-rewrite-{file['num_records']:06d}-{image_id(data)}.parquet"
            storage.write(storage.join(gallery.faces_folder, name), data)
            actions.append(_add(name, len(data), statistics(keep)))
    return actions
