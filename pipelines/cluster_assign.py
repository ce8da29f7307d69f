"""cluster --assign: a gallery's new faces into the clusters of its report, whose ids stay as they are."""

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds

from facepipe.clusters import tables
from facepipe.clusters.assign import assign
from facepipe.clusters.linkage import Clusters
from facepipe.gallery import Gallery
from facepipe.graph.cohort import Cohort
from facepipe.index.rows import unit_vectors
from facepipe.reports.parquet import write_rows, write_table
from facepipe.schema import EMBEDDING_DIM
from pipelines.cluster import NAME, read_state
from pipelines.graph import Progress
from pipelines.workspace import report_folder, reports_of

Ids = npt.NDArray[np.int64]
_ROWS = 65536


@dataclass
class AssignSummary:
    """What was done. new: faces that had no cluster; placed: of them in old clusters; clusters: new ones; gone: faces
    that are no longer in the gallery."""

    new: int = 0
    placed: int = 0
    clusters: int = 0
    gone: int = 0
    seconds: float = 0.0


def run(gallery: str, one_photo: bool = True, progress: Progress = lambda line: None) -> AssignSummary:
    """Bring the cluster tables of a gallery up to date with its faces; suspicions and the page stay as they were.

    Raises EvaluationError where there are no clusters yet.
    """
    table, began, summary = Gallery(gallery), time.monotonic(), AssignSummary()
    if not os.path.isdir(os.path.join(reports_of(table), f"{NAME}.old")):  # report_folder puts that back
        tables.read(table.path, tables.CLUSTERS)  # names what is missing before a folder is made for what is new
    with report_folder(table, NAME) as folder:
        previous = tables.read(table.path, tables.CLUSTERS)
        cohort, threshold = read_state(os.path.join(reports_of(table), NAME))
        book = _Book(tables.read(table.path, tables.FACES, ["face_id", "cluster", "fit"]), cohort)
        book.read(table)
        progress(f"{len(book.fresh)} new faces for {len(book.numbers)} clusters")
        apart, taken = (book.apart(), book.taken(table)) if one_photo else (_NONE, _NONE)
        placed = assign(book.new_faces(), book.known(), threshold, apart, taken)
        # Emptied clusters stay in the table of clusters, so that no number is given twice.
        first = int(previous["cluster"].to_numpy().max(initial=-1)) + 1
        held = book.numbers[placed.cluster] if len(book.numbers) else placed.cluster
        cluster = np.where(placed.cluster >= 0, held, first + placed.own)
        _write(table, folder, book, cluster, previous)
    summary.new, summary.placed = len(cluster), int((placed.cluster >= 0).sum())
    summary.clusters = int(placed.own.max(initial=-1)) + 1
    summary.gone = int((~book.here).sum())
    summary.seconds = round(time.monotonic() - began, 3)
    return summary


_NONE = np.empty((0, 2), np.int64)


class _Book:
    """One pass over the gallery: sums of the clusters as they are now, and the faces that are new."""

    def __init__(self, held: pa.Table, cohort: Cohort):
        """held: face_id, cluster and fit of the faces that have a cluster."""
        ids, clusters, fits = (held[name].to_numpy() for name in ("face_id", "cluster", "fit"))
        order = np.argsort(ids)
        self.ids, self.fits, self.cohort = ids[order], fits[order], cohort
        self.numbers, self.of = np.unique(clusters[order], return_inverse=True)
        self.here = np.zeros(len(ids), bool)  # whether the gallery still holds the face
        self.sums = np.zeros((len(self.numbers), EMBEDDING_DIM), np.float32)
        self.crowd, self.size = np.zeros(len(self.numbers), np.float32), np.zeros(len(self.numbers), np.int64)
        self.fresh: list[int] = []
        self._vectors: list[npt.NDArray[np.float32]] = []
        self._uris: list[str] = []

    def read(self, gallery: Gallery) -> None:
        for batch in gallery.batches(["face_id", "uri", "embedding"], rows=_ROWS):
            faces = batch.filter(batch["face_id"].is_valid())
            vectors, good = unit_vectors(faces["embedding"])
            ids = faces["face_id"].to_numpy()
            at = find(self.ids, ids)
            held, new = good & (at >= 0), good & (at < 0)
            self._add(at[held], vectors[held])
            self.fresh += ids[new].tolist()
            self._vectors.append(vectors[new])
            self._uris += faces["uri"].filter(pa.array(new)).to_pylist()

    def _add(self, at: Ids, vectors: npt.NDArray[np.float32]) -> None:
        of = self.of[at]
        np.add.at(self.sums, of, vectors)
        np.add.at(self.crowd, of, self.cohort.density(vectors))
        self.size += np.bincount(of, minlength=len(self.size))
        self.here[at] = True

    def known(self) -> Clusters:
        """Clusters that lost all faces are like nobody."""
        return Clusters(self.sums, np.where(self.size > 0, self.crowd, np.float32(1e3)), self.size)

    def new_faces(self) -> Clusters:
        vectors = np.concatenate([np.empty((0, EMBEDDING_DIM), np.float32), *self._vectors])
        return Clusters.single(vectors, self.cohort.density(vectors))

    def apart(self) -> Ids:
        """(m, 2) positions of new faces in one photo."""
        groups = self._by_uri().values()
        pairs = [(a, b) for group in groups for i, a in enumerate(group) for b in group[i + 1 :]]
        return np.array(pairs, np.int64).reshape(-1, 2)

    def taken(self, gallery: Gallery) -> Ids:
        """(m, 2) positions of new faces, and of clusters that hold another face of the same photo."""
        by_uri, pairs = self._by_uri(), []
        shared = ds.field("uri").isin(pa.array(by_uri, pa.string())) & ds.field("face_id").is_valid()
        for batch in gallery.batches(["face_id", "uri"], shared, rows=_ROWS) if by_uri else ():
            at = find(self.ids, batch["face_id"].to_numpy())
            for uri, place in zip(batch["uri"].to_pylist(), at.tolist(), strict=True):
                pairs += [(new, int(self.of[place])) for new in by_uri[uri] if place >= 0]
        return np.array(pairs, np.int64).reshape(-1, 2)

    def _by_uri(self) -> dict[str, list[int]]:
        by_uri: dict[str, list[int]] = {}
        for n, uri in enumerate(self._uris):
            by_uri.setdefault(uri, []).append(n)
        return by_uri


def find(sorted_ids: Ids, ids: Ids) -> Ids:
    """Positions (m,) of ids in sorted ones, -1 where absent."""
    if not len(sorted_ids):
        return np.full(len(ids), -1, np.int64)
    at = np.minimum(np.searchsorted(sorted_ids, ids), len(sorted_ids) - 1)
    return np.where(sorted_ids[at] == ids, at, -1)


def _write(gallery: Gallery, folder: str, book: _Book, cluster: Ids, previous: pa.Table) -> None:
    """The face and cluster tables anew; everything else of the report is copied."""
    old = os.path.join(reports_of(gallery), NAME)
    for name in os.listdir(old):
        if name not in (tables.FACES, tables.CLUSTERS):
            shutil.copy2(os.path.join(old, name), folder)
    fresh = np.array(book.fresh, np.int64)
    order = np.argsort(fresh)
    fresh, cluster = fresh[order], cluster[order]
    size = np.zeros(int(max(cluster.max(initial=-1), previous["cluster"].to_numpy().max(initial=-1))) + 1, np.int64)
    size[book.numbers] = book.size
    size += np.bincount(cluster, minlength=len(size))
    clusters = _clusters(previous, size, book, fresh, cluster)
    medoid = np.sort(clusters["medoid"].to_numpy())
    rows = _face_rows(gallery, book, fresh, cluster, size, medoid)
    write_rows(os.path.join(folder, tables.FACES), tables.FACE_ROWS, rows)
    write_table(os.path.join(folder, tables.CLUSTERS), clusters)


def _face_rows(gallery: Gallery, book: _Book, fresh: Ids, cluster: Ids, size: Ids, medoid: Ids) -> Iterator[pa.Table]:
    """Rows in the gallery's order; how well new faces fit is not known."""
    for batch in gallery.batches(["face_id", "uri", "identity"], rows=_ROWS):
        faces = pa.Table.from_batches([batch.filter(batch["face_id"].is_valid())])
        ids = faces["face_id"].to_numpy()
        old, new = find(book.ids, ids), find(fresh, ids)
        held = (old >= 0) | (new >= 0)
        faces, ids, old, new = faces.filter(pa.array(held)), ids[held], old[held], new[held]
        of, fit = np.empty(len(ids), np.int64), np.full(len(ids), np.nan, np.float32)
        known = old >= 0
        of[known], fit[known] = book.numbers[book.of[old[known]]], book.fits[old[known]]
        of[~known] = cluster[new[~known]]
        columns = [*faces.columns, of, size[of], pa.array(fit, mask=np.isnan(fit)), np.asarray(find(medoid, ids) >= 0)]
        yield pa.table(
            [pa.chunked_array([pa.array(c)]) if not isinstance(c, pa.ChunkedArray) else c for c in columns],
            schema=tables.FACE_ROWS,
        )


def _clusters(previous: pa.Table, size: Ids, book: _Book, fresh: Ids, cluster: Ids) -> pa.Table:
    """Old rows with their new sizes, and a row a new cluster. Where the medoid is gone, and in new clusters, the face
    of the smallest id stands for the cluster."""
    numbers, medoids = previous["cluster"].to_numpy(), previous["medoid"].to_numpy().copy()
    ids = np.concatenate([book.ids[book.here], fresh])
    of = np.concatenate([book.numbers[book.of[book.here]], cluster])
    smallest = np.full(len(size), np.iinfo(np.int64).max)
    np.minimum.at(smallest, of, ids)
    lost = ~np.isin(medoids, ids) & (size[numbers] > 0)
    medoids[lost] = smallest[numbers[lost]]
    old = previous.set_column(1, "size", pa.array(size[numbers])).set_column(2, "medoid", pa.array(medoids))
    made = np.unique(cluster[cluster > numbers.max(initial=-1)])
    ones = np.ones(len(made), np.float32)
    new = pa.table({"cluster": made, "size": size[made], "medoid": smallest[made], "cohesion": ones})
    return pa.concat_tables([old, new.cast(previous.schema)])
