"""The table of a report's faces, read as a stream: which cluster a face is in, and the table anew with what changed."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facepipe.curation.clusters.tables import FACE_ROWS
from facepipe.errors import StorageError
from facepipe.sorted_lookup import find_sorted
from facepipe.types import Int64

_ROWS = 65536


class Ledger:
    """faces.parquet of a cluster report; memory does not grow with it, but for `all_ids` and `members`."""

    def __init__(self, path: str):
        self._path = path

    def _open(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self._path)
        except (OSError, pa.ArrowException) as error:
            raise StorageError(f"cannot read {self._path!r}: {str(error).splitlines()[0]}") from error

    def _batches(self, *columns: str) -> Iterator[pa.RecordBatch]:
        try:
            with self._open() as file:
                yield from file.iter_batches(_ROWS, columns=list(columns))
        except (OSError, pa.ArrowException) as error:
            raise StorageError(f"cannot read {self._path!r}: {str(error).splitlines()[0]}") from error

    def all_ids(self) -> tuple[Int64, Int64]:
        """(face ids (n,), sorted; their clusters (n,))."""
        parts = [pa.Table.from_batches([batch]) for batch in self._batches("face_id", "cluster")]
        table = pa.concat_tables([FACE_ROWS.empty_table().select(["face_id", "cluster"]), *parts])
        ids, of = (np.asarray(table[name].to_numpy()) for name in ("face_id", "cluster"))
        order = np.argsort(ids)
        return ids[order], of[order]

    def counts(self) -> Int64:
        """(k,) faces of each cluster."""
        counts = np.zeros(0, np.int64)
        for batch in self._batches("cluster"):
            some = np.bincount(batch["cluster"].to_numpy(), minlength=len(counts))
            some[: len(counts)] += counts
            counts = some
        return counts

    def locate(self, ids: Int64) -> Int64:
        """The clusters (n,) of sorted face ids (n,); -1 for those that are in none."""
        of = np.full(len(ids), -1, np.int64)
        for batch in self._batches("face_id", "cluster") if len(ids) else ():
            at = find_sorted(ids, batch["face_id"].to_numpy())
            of[at[at >= 0]] = batch["cluster"].to_numpy()[at >= 0]
        return of

    def of_photos(self, uris: pa.Array, gone: Int64) -> pa.Table:
        """uri and cluster of the faces in these photos, those in `gone` (sorted) left out."""
        parts = []
        for batch in self._batches("face_id", "uri", "cluster"):
            shared = batch.filter(pc.is_in(batch["uri"], uris))
            stays = find_sorted(gone, shared["face_id"].to_numpy()) < 0
            parts.append(shared.filter(pa.array(stays)).select(["uri", "cluster"]))
        return pa.Table.from_batches(parts, pa.schema([FACE_ROWS.field("uri"), FACE_ROWS.field("cluster")]))

    def members(self, clusters: Int64, gone: Int64) -> tuple[Int64, Int64]:
        """(ids (n,), cluster (n,)) of the faces in some clusters (sorted), those in `gone` (sorted) left out."""
        ids, of = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for batch in self._batches("face_id", "cluster") if len(clusters) else ():
            inside = find_sorted(clusters, batch["cluster"].to_numpy()) >= 0
            some = batch["face_id"].to_numpy()[inside]
            stays = find_sorted(gone, some) < 0
            ids.append(some[stays])
            of.append(batch["cluster"].to_numpy()[inside][stays])
        return np.concatenate(ids), np.concatenate(of)

    def anew(self, gone: Int64, size: Int64, medoids: Int64) -> Iterator[pa.Table]:
        """The rows without those in `gone`, with the sizes (k,) that their clusters have now; the faces in `medoids`
        stand for their clusters from now on. Both are sorted."""
        for batch in self._batches(*FACE_ROWS.names):
            ids, cluster = batch["face_id"].to_numpy(), batch["cluster"].to_numpy()
            at, field = FACE_ROWS.get_field_index("size"), FACE_ROWS.field("size")
            table = pa.Table.from_batches([batch]).set_column(at, field, pa.array(size[cluster]))
            if len(medoids):
                stands = pc.or_(batch["medoid"], pa.array(find_sorted(medoids, ids) >= 0))
                table = table.set_column(FACE_ROWS.get_field_index("medoid"), FACE_ROWS.field("medoid"), stands)
            yield table.filter(pa.array(find_sorted(gone, ids) < 0)) if len(gone) else table
