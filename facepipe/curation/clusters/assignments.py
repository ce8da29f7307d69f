"""Read the table of a cluster report's faces as a stream, and rewrite it with what changed."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facepipe.curation.clusters.tables import FACE_SCHEMA
from facepipe.errors import StorageError
from facepipe.sorted_lookup import find_sorted, is_in_sorted
from facepipe.types import Int64

_ROWS = 65536
_NO_IDS = np.empty(0, np.int64)


class AssignmentTable:
    """faces.parquet of a cluster report. Memory does not grow with it, except in `read_all` and `read_members`."""

    def __init__(self, path: str):
        self._path = path

    def _iterate_batches(self, *columns: str) -> Iterator[pa.RecordBatch]:
        try:
            with pq.ParquetFile(self._path) as file:
                yield from file.iter_batches(_ROWS, columns=list(columns))
        except (OSError, pa.ArrowException) as error:
            raise StorageError(f"cannot read {self._path!r}: {str(error).splitlines()[0]}") from error

    def read_all(self) -> tuple[Int64, Int64]:
        """Read all face ids (n,), sorted, and their clusters (n,)."""
        parts = [FACE_SCHEMA.empty_table().select(["face_id", "cluster"])]
        parts += [pa.Table.from_batches([batch]) for batch in self._iterate_batches("face_id", "cluster")]
        table = pa.concat_tables(parts)
        ids = np.asarray(table["face_id"].to_numpy())
        clusters = np.asarray(table["cluster"].to_numpy())
        order = np.argsort(ids)
        return ids[order], clusters[order]

    def count_faces(self) -> Int64:
        """Count the faces of each cluster (k,)."""
        counts = np.zeros(0, np.int64)
        for batch in self._iterate_batches("cluster"):
            # A later batch may hold higher numbers: the counts grow with it.
            batch_counts = np.bincount(batch["cluster"].to_numpy(), minlength=len(counts))
            batch_counts[: len(counts)] += counts
            counts = batch_counts
        return counts

    def find_clusters(self, ids: Int64) -> Int64:
        """Find the clusters (n,) of sorted face ids (n,); -1 for faces that are in none."""
        clusters = np.full(len(ids), -1, np.int64)
        if not len(ids):
            return clusters
        for batch in self._iterate_batches("face_id", "cluster"):
            # The position of each row's id in `ids`, -1 if it is not among them.
            at = find_sorted(ids, batch["face_id"].to_numpy())
            clusters[at[at >= 0]] = batch["cluster"].to_numpy()[at >= 0]
        return clusters

    def find_photo_clusters(self, uris: pa.Array, removed: Int64) -> pa.Table:
        """Find uri, id and cluster of the faces in these photos, without the faces in `removed` (sorted ids).

        The uris are those that the photos had when the clusters were made. A photo may have another one since.
        """
        parts = []
        for batch in self._iterate_batches("face_id", "uri", "cluster"):
            faces = batch.filter(pc.is_in(batch["uri"], uris))
            is_removed = is_in_sorted(removed, faces["face_id"].to_numpy())
            parts.append(faces.filter(pa.array(~is_removed)).select(["uri", "face_id", "cluster"]))
        schema = pa.schema([FACE_SCHEMA.field(name) for name in ("uri", "face_id", "cluster")])
        return pa.Table.from_batches(parts, schema)

    def read_members(self, clusters: Int64, removed: Int64) -> tuple[Int64, Int64]:
        """Read ids (n,) and clusters (n,) of the faces in some sorted clusters, without the sorted ids `removed`."""
        ids = [_NO_IDS]
        numbers = [_NO_IDS]
        for batch in self._iterate_batches("face_id", "cluster") if len(clusters) else ():
            is_member = is_in_sorted(clusters, batch["cluster"].to_numpy())
            members = batch["face_id"].to_numpy()[is_member]
            is_removed = is_in_sorted(removed, members)
            ids.append(members[~is_removed])
            numbers.append(batch["cluster"].to_numpy()[is_member][~is_removed])
        return np.concatenate(ids), np.concatenate(numbers)

    def iterate_updated(self, removed: Int64, size: Int64, medoids: Int64) -> Iterator[pa.Table]:
        """Iterate over the rows with what changed.

        Args:
            removed: sorted ids of faces to leave out.
            size: current size of each cluster, (k,).
            medoids: sorted ids of the faces that are medoids from now on.
        """
        for batch in self._iterate_batches(*FACE_SCHEMA.names):
            ids = batch["face_id"].to_numpy()
            sizes = pa.array(size[batch["cluster"].to_numpy()])
            table = _set_column(pa.Table.from_batches([batch]), "size", sizes)
            if len(medoids):
                is_medoid = pc.or_(batch["medoid"], pa.array(is_in_sorted(medoids, ids)))
                table = _set_column(table, "medoid", is_medoid)
            yield table.filter(pa.array(~is_in_sorted(removed, ids))) if len(removed) else table


def _set_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(FACE_SCHEMA.get_field_index(name), FACE_SCHEMA.field(name), values)
