"""cluster --assign: a gallery's new faces into the clusters of its report, whose ids stay as they are.

The clusters' sums are kept in the report, with a mark of how far the gallery is in them: what is read of the gallery
is what came since, and the vectors of clusters that lost a face. Where there are no sums they are made from all faces.
"""

import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.curation.clusters import sums as standings
from facepipe.curation.clusters import tables
from facepipe.curation.clusters.assign import Placed, assign
from facepipe.curation.clusters.ledger import Ledger
from facepipe.curation.clusters.nearby import nearby, usable_index
from facepipe.curation.clusters.sums import MARK, SUMS, Standing
from facepipe.curation.graph.cohort import Cohort
from facepipe.curation.graph.linkage import Clusters
from facepipe.gallery import Gallery
from facepipe.gallery.changes import Mark, changes
from facepipe.index.rows import read_unit_vectors
from facepipe.reports.parquet import write_rows, write_table
from facepipe.schema import EMBEDDING_DIM
from facepipe.sorted_lookup import find_sorted
from facepipe.types import Float32, Int64
from pipelines.cluster.pipeline import NAME, read_state
from pipelines.graph import Progress
from pipelines.runtime.run_record import records
from pipelines.runtime.workspace import report_folder, reports_of

_ROWS = 65536
_MOST = 500  # a face is held apart from so many others of its photo: pairs grow with the square
_NO_IDS = np.empty(0, np.int64)
_NO_PAIRS = np.empty((0, 2), np.int64)


@dataclass
class AssignSummary:
    """What was done. new: faces that had no cluster; placed: of them in old clusters; clusters: new ones; gone: faces
    that are no longer in the gallery; full: the vectors of all faces were read."""

    new: int = 0
    placed: int = 0
    clusters: int = 0
    gone: int = 0
    full: bool = False
    seconds: float = 0.0


class _UnchangedError(Exception):
    """Nothing came and nothing went: the report stays as it is."""


@records("assign")
def run(gallery: str, one_photo: bool = True, progress: Progress = lambda line: None) -> AssignSummary:
    """Bring the cluster tables of a gallery up to date with its faces; suspicions and the page stay as they were.

    Raises EvaluationError where there are no clusters yet.
    """
    table, began, summary = Gallery(gallery), time.monotonic(), AssignSummary()
    if not os.path.isdir(os.path.join(reports_of(table), f"{NAME}.old")):  # report_folder puts that back
        tables.read(table.path, tables.CLUSTERS)  # names what is missing before a folder is made for what is new
    with suppress(_UnchangedError), report_folder(table, NAME) as folder:
        _bring_up(table, folder, one_photo, summary, progress)
    summary.seconds = round(time.monotonic() - began, 3)
    return summary


@dataclass(frozen=True)
class _News:
    """faces: face_id, uri, identity and vectors (n, 128) of new faces, by rising id; gone: sorted ids of those that
    have a cluster and are no longer in the gallery."""

    faces: pa.Table
    vectors: Float32
    gone: Int64

    @property
    def ids(self) -> Int64:
        return np.asarray(self.faces["face_id"].to_numpy())


def _bring_up(table: Gallery, folder: str, one_photo: bool, summary: AssignSummary, progress: Progress) -> None:
    old = os.path.join(reports_of(table), NAME)
    previous = tables.read(table.path, tables.CLUSTERS)
    cohort, threshold = read_state(old)
    ledger = Ledger(os.path.join(old, tables.FACES))
    sizes = ledger.counts()
    count = max(int(previous["cluster"].to_numpy().max(initial=-1)) + 1, len(sizes))
    loaded = Standing.load(old, sizes)
    standing, stale = loaded if loaded and count <= len(loaded[0].clusters) else (None, _NO_IDS)
    if standing:
        news, known = _since(table, standing, ledger), standing.clusters
        count = len(known)
    else:
        progress("no sums of the clusters are kept: reading all faces")
        news, known = _everything(table, ledger, cohort, count)
    summary.full = standing is None
    # Clusters that lost faces, and those whose row went with an erased medoid.
    unlisted = np.setdiff1d(np.flatnonzero(sizes), previous["cluster"].to_numpy())
    lost = np.unique(np.concatenate([ledger.locate(news.gone), stale, unlisted]))
    if standing and not len(news.ids) and not len(lost):
        _keep(standing.mark, table, old, folder)
    members = ledger.members(lost, news.gone)
    if standing and len(lost):
        known = standings.recounted(known, lost, members, table, cohort)
    progress(f"{len(news.ids)} new faces for {len(known)} clusters")
    fresh = Clusters.single(news.vectors, cohort.density(news.vectors))
    apart, taken = (_apart(news.faces), _taken(news, ledger)) if one_photo else (_NO_PAIRS, _NO_PAIRS)
    index = usable_index(table, standing.mark, len(fresh) * count) if standing else None
    near = nearby(index, news.vectors, ledger) if index else None
    placed = assign(fresh, standings.peopled(known), threshold, apart, taken, near)
    # Emptied clusters stay in the table of clusters, so that no number is given twice.
    cluster = np.where(placed.cluster >= 0, placed.cluster, count + placed.own)
    now = standings.grown(known, count + int(placed.own.max(initial=-1)) + 1)
    standings.add(now, cluster, fresh.sums, fresh.crowd)
    _carry(old, folder)
    _write(folder, ledger, news, _Now(previous, now, cluster, members))
    Standing(now, Mark.of(table)).save(folder)
    _count(summary, news, placed)


def _keep(mark: Mark, table: Gallery, old: str, folder: str) -> None:
    """The report as it is, with the newer mark: the files of the table may have changed without its faces."""
    now = Mark.of(table)
    if now != mark:
        now.save(os.path.join(old, MARK))
    shutil.rmtree(folder)
    raise _UnchangedError


def _count(summary: AssignSummary, news: _News, placed: Placed) -> None:
    summary.new, summary.placed = len(news.ids), int((placed.cluster >= 0).sum())
    summary.clusters, summary.gone = int(placed.own.max(initial=-1)) + 1, len(news.gone)


def _since(table: Gallery, standing: Standing, ledger: Ledger) -> _News:
    """What changed since the report was written."""
    found = changes(table, standing.mark)
    faces, vectors = _usable(found.fresh(["face_id", "uri", "identity", "embedding"]))
    new = ledger.locate(np.asarray(faces["face_id"].to_numpy())) < 0
    gone = found.gone_ids()
    if gone is None:
        gone = _absent(table, ledger.all_ids()[0])
    elif len(gone):
        gone = gone[ledger.locate(gone) >= 0]
    return _News(faces.filter(pa.array(new)), vectors[new], gone)


def _absent(table: Gallery, ids: Int64) -> Int64:
    """Those of the sorted ids that no face of the gallery has."""
    here = np.zeros(len(ids), bool)
    for batch in table.batches(["face_id"], rows=_ROWS):
        at = find_sorted(ids, batch["face_id"].drop_null().to_numpy())
        here[at[at >= 0]] = True
    return ids[~here]


def _everything(table: Gallery, ledger: Ledger, cohort: Cohort, count: int) -> tuple[_News, Clusters]:
    """One pass over the gallery: the faces that are new, and the sums of the clusters from those that are left."""
    ids, of = ledger.all_ids()
    here, known = np.zeros(len(ids), bool), standings.none(count)
    fresh: list[tuple[pa.Table, Float32]] = []
    for batch in table.batches(["face_id", "uri", "identity", "embedding"], rows=_ROWS):
        faces, vectors = _usable([batch])
        at = find_sorted(ids, faces["face_id"].to_numpy())
        held = at >= 0
        standings.add(known, of[at[held]], vectors[held], cohort.density(vectors[held]))
        here[at[held]] = True
        if not held.all():
            fresh.append((faces.filter(pa.array(~held)), vectors[~held]))
    return _News(*_joined(fresh), ids[~here]), known


def _usable(batches: Iterable[pa.RecordBatch]) -> tuple[pa.Table, Float32]:
    """(face_id, uri and identity of the faces with a vector of unit norm, the vectors), by rising id."""
    parts = []
    for batch in batches:
        faces = batch.filter(batch["face_id"].is_valid())
        vectors, good = read_unit_vectors(faces["embedding"])
        named = pa.Table.from_batches([faces]).select(["face_id", "uri", "identity"])
        parts.append((named.filter(pa.array(good)), vectors[good]))
    return _joined(parts)


def _joined(parts: list[tuple[pa.Table, Float32]]) -> tuple[pa.Table, Float32]:
    empty = pa.schema([tables.FACE_ROWS.field(name) for name in ("face_id", "uri", "identity")]).empty_table()
    faces = pa.concat_tables([empty, *(part.cast(empty.schema) for part, _ in parts)])
    vectors = np.concatenate([np.empty((0, EMBEDDING_DIM), np.float32), *(part for _, part in parts)])
    order = np.unique(faces["face_id"].to_numpy(), return_index=True)[1]
    return faces.take(pa.array(order)), vectors[order]


def _apart(faces: pa.Table) -> Int64:
    """(m, 2) positions of new faces in one photo."""
    photo = faces["uri"].combine_chunks().dictionary_encode().indices.to_numpy()
    order = np.argsort(photo, kind="stable")
    pairs = [_NO_PAIRS]
    for gap in range(1, min(_MOST, len(order))):
        together = np.flatnonzero(photo[order[gap:]] == photo[order[:-gap]])
        if not together.size:
            break
        pairs.append(np.stack([order[together], order[together + gap]], axis=1))
    found = np.concatenate(pairs)
    return found[np.lexsort((found[:, 1], found[:, 0]))]


def _taken(news: _News, ledger: Ledger) -> Int64:
    """(m, 2) positions of new faces, and clusters that hold another face of the same photo."""
    uris = news.faces["uri"].combine_chunks()
    there = ledger.of_photos(pc.unique(uris), news.gone) if len(uris) else None
    if not there:
        return _NO_PAIRS
    mine = pa.table({"uri": uris, "at": np.arange(len(uris))})
    pairs = mine.join(there, "uri", join_type="inner")
    return np.unique(np.stack([pairs["at"].to_numpy(), pairs["cluster"].to_numpy()], axis=1), axis=0)


@dataclass(frozen=True)
class _Now:
    """previous: the table of clusters; clusters: all there are now; cluster (n,) of the new faces; members: (ids,
    clusters) of those that stayed in clusters which lost a face."""

    previous: pa.Table
    clusters: Clusters
    cluster: Int64
    members: tuple[Int64, Int64]

    @property
    def size(self) -> Int64:
        return self.clusters.size


def _carry(old: str, folder: str) -> None:
    """What of the report stays as it was."""
    for name in os.listdir(old):
        if name not in (tables.FACES, tables.CLUSTERS, SUMS, MARK):
            shutil.copy2(os.path.join(old, name), folder)


def _write(folder: str, ledger: Ledger, news: _News, now: _Now) -> None:
    """The face and cluster tables anew."""
    clusters, medoids = _clusters(news, now)
    rows = chain(ledger.anew(news.gone, now.size, medoids), _new_rows(news, now, medoids))
    write_rows(os.path.join(folder, tables.FACES), tables.FACE_ROWS, rows)
    write_table(os.path.join(folder, tables.CLUSTERS), clusters)


def _new_rows(news: _News, now: _Now, medoids: Int64) -> Iterable[pa.Table]:
    """Rows of the new faces; how well they fit is not known."""
    if len(news.ids):
        columns = {
            **{name: news.faces[name] for name in ("face_id", "uri", "identity")},
            "cluster": pa.array(now.cluster),
            "size": pa.array(now.size[now.cluster]),
            "fit": pa.nulls(len(news.ids), pa.float32()),
            "medoid": pa.array(find_sorted(medoids, news.ids) >= 0),
        }
        yield pa.table(columns, schema=tables.FACE_ROWS)


def _clusters(news: _News, now: _Now) -> tuple[pa.Table, Int64]:
    """(rows of the clusters, sorted ids of the faces that are new as medoids). Where the medoid is gone, and in new
    clusters, the face of the smallest id stands for the cluster."""
    numbers, medoids = now.previous["cluster"].to_numpy(), now.previous["medoid"].to_numpy().copy()
    smallest = np.full(len(now.size), np.iinfo(np.int64).max)
    np.minimum.at(smallest, np.concatenate([now.members[1], now.cluster]), np.concatenate([now.members[0], news.ids]))
    lost = (find_sorted(news.gone, medoids) >= 0) & (now.size[numbers] > 0)
    medoids[lost] = smallest[numbers[lost]]
    old = now.previous.set_column(1, "size", pa.array(now.size[numbers])).set_column(2, "medoid", pa.array(medoids))
    made = np.setdiff1d(np.flatnonzero(now.size), numbers)
    columns = {"cluster": made, "size": now.size[made], "medoid": smallest[made]}
    new = pa.table({**columns, "cohesion": now.clusters.cohesion()[made]})
    return pa.concat_tables([old, new.cast(now.previous.schema)]), np.sort(np.append(medoids[lost], smallest[made]))
