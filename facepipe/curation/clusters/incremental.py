"""Bring the clusters of a report up to date with a gallery. The numbers of clusters stay as they are.

The report holds the clusters' sums, with a mark of which version of the gallery is in them. So the update reads only
what came since, and the vectors of clusters that lost a face. Without sums it computes them from all faces.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from facepipe.curation.clusters.assign import FacePlacement, assign_faces
from facepipe.curation.clusters.assignments import AssignmentTable
from facepipe.curation.clusters.constraints import are_twins, drop_twins, pair_equal_keys
from facepipe.curation.clusters.decided import DecidedNodes
from facepipe.curation.clusters.decided_places import GroupPlaces, find_group_places, place_groups
from facepipe.curation.clusters.nearby import find_near_clusters, open_usable_index
from facepipe.curation.clusters.persons import EarlierPersons, SeenTimes, update_persons
from facepipe.curation.clusters.placement import PlacementRule
from facepipe.curation.clusters.sums import (
    ClusterSums,
    add_faces,
    extend_clusters,
    make_empty_clusters,
    mask_empty,
    recompute_clusters,
)
from facepipe.curation.clusters.tables import CLUSTERS, FACE_SCHEMA, FACES, read_cluster_table, read_left_out
from facepipe.curation.graph.clusters import Clusters
from facepipe.curation.graph.cohort import Cohort
from facepipe.curation.graph.fitness import COLUMNS, find_unfit_faces
from facepipe.curation.space import find_space_scale
from facepipe.decisions.named import build_named_rows
from facepipe.decisions.persons import DecidedFaces
from facepipe.gallery import Gallery
from facepipe.gallery.changes import find_changes
from facepipe.index.rows import read_unit_vectors
from facepipe.schema import FACES as FACES_SCHEMA
from facepipe.sorted_lookup import find_sorted, is_in_sorted
from facepipe.types import Bool, Float32, Int64

_ROWS = 65536
_NO_IDS = np.empty(0, np.int64)
_NO_PAIRS = np.empty((0, 2), np.int64)
# Columns that the row of a new face takes from the gallery.
_NEW_COLUMNS = ("face_id", "uri", "identity")
# Columns that are read of a face that may be new.
_READ_COLUMNS = (*_NEW_COLUMNS, "ingested_at", *COLUMNS)


@dataclass(frozen=True)
class GalleryChanges:
    """Faces that came into a gallery, and faces that left it.

    Attributes:
        faces: face_id, uri, identity and what tells the quality of n new faces, by rising id.
        vectors: Their vectors, (n, dim).
        removed: Sorted ids of faces that leave their cluster: they are no longer in the gallery, people ignore them, or
            they move.
        moved: Sorted ids of faces that leave their cluster for another, as people have decided. They are among the new
            faces and the removed ones.
    """

    faces: pa.Table
    vectors: Float32
    removed: Int64
    moved: Int64

    @property
    def ids(self) -> Int64:
        """Ids of the new faces, (n,), rising."""
        return np.asarray(self.faces["face_id"].to_numpy())

    @property
    def is_moved(self) -> Bool:
        """Whether each of the faces (n,) had another cluster."""
        return is_in_sorted(self.moved, self.ids)


@dataclass(frozen=True)
class ClusterUpdate:
    """The clusters of a report with new faces placed and removed faces taken out.

    Attributes:
        changes: What changed.
        clusters: All clusters. Row n is cluster n.
        cluster: Cluster of each new face, (n,).
        placed_count: Number of new faces in old clusters.
        new_cluster_count: Number of new clusters.
        table: Rows of clusters.parquet.
        persons: Rows of persons.parquet.
        left_out: Sorted ids of the faces that people ignore.
        medoids: Sorted ids of the faces that are medoids from now on.
        assignments: faces.parquet of the report.
        is_full: Whether the vectors of all faces were read.
        rule: The rule of the next update.
    """

    changes: GalleryChanges
    clusters: Clusters
    cluster: Int64
    placed_count: int
    new_cluster_count: int
    table: pa.Table
    persons: pa.Table
    left_out: Int64
    medoids: Int64
    assignments: AssignmentTable
    is_full: bool
    rule: PlacementRule

    def iterate_face_rows(self) -> Iterator[pa.Table]:
        """Iterate over the rows of faces.parquet: the old faces, then the new ones."""
        old = self.assignments.iterate_updated(self.changes.removed, self.clusters.size, self.medoids)
        return chain(old, self._iterate_new_rows())

    def build_named_rows(self) -> pa.Table:
        """Build the rows of named.parquet: the faces in clusters that have a name."""
        named = self.persons.filter(self.persons["name"].is_valid())["cluster"].drop_null().to_numpy()
        ids, clusters = self.assignments.read_members(np.sort(named), self.changes.removed)
        is_named = np.isin(self.cluster, named)
        return build_named_rows(
            np.concatenate([ids, self.changes.ids[is_named]]),
            np.concatenate([clusters, self.cluster[is_named]]),
            self.persons,
        )

    def _iterate_new_rows(self) -> Iterator[pa.Table]:
        """Build the rows of the new faces; how well they fit is not known."""
        faces = self.changes.faces
        if not faces.num_rows:
            return
        columns = {name: faces[name] for name in _NEW_COLUMNS}
        columns |= {
            "cluster": pa.array(self.cluster),
            "size": pa.array(self.clusters.size[self.cluster]),
            "fit": pa.nulls(faces.num_rows, pa.float32()),
            "medoid": pa.array(is_in_sorted(self.medoids, self.changes.ids)),
        }
        yield pa.table(columns, schema=FACE_SCHEMA)


def update_clusters(
    gallery: Gallery,
    report: str,
    *,
    one_photo: bool,
    progress: Callable[[str], None],
    decided: DecidedFaces | None = None,
) -> ClusterUpdate | None:
    """Bring the clusters of a report up to date with the faces of its gallery.

    Args:
        gallery: the gallery.
        report: folder of its cluster report.
        one_photo: whether faces of one photo are different persons.
        progress: called with each line of progress.
        decided: what people have decided; nothing by default. It holds exactly, also for faces that have a cluster.

    Returns:
        None if no face came, none left, and nobody has decided anything since.

    Raises:
        EvaluationError: if there are no clusters.
        StorageError: if the report cannot be read.
    """
    previous = read_cluster_table(gallery.path, CLUSTERS)
    rule = PlacementRule.load(report)
    assignments = AssignmentTable(os.path.join(report, FACES))
    sizes = assignments.count_faces()
    # Count the numbers in use by either table, so that none is given twice.
    count = max(int(previous["cluster"].to_numpy().max(initial=-1)) + 1, len(sizes), rule.next_number)

    # Faces that people ignore leave their cluster, and so do those that are somebody else by decision.
    decisions = decided or DecidedFaces()
    cluster_of_decided = assignments.find_clusters(decisions.ids)
    cluster_of_decided[decisions.is_ignored(decisions.ids)] = -1
    places = find_group_places(decisions, cluster_of_decided)
    ignored = decisions.ignored[assignments.find_clusters(decisions.ignored) >= 0]
    moved = np.setdiff1d(places.moved, decisions.ignored)

    # Read what changed; without usable sums that takes all faces.
    sums = ClusterSums.load(report, sizes)
    # Sums that lack a cluster of the table cannot be used.
    if sums and count > len(sums.clusters):
        sums = None
    if sums:
        delta = _read_changes(gallery, sums, assignments)
        known = sums.clusters
        count = len(known)
    else:
        progress("no sums of the clusters are kept: reading all faces")
        delta, known = _read_everything(gallery, assignments, rule.cohort, count, np.union1d(ignored, moved))
    # Faces that nobody ignores any more come back.
    returning = np.setdiff1d(read_left_out(report), decisions.ignored)
    delta = _apply_decisions(gallery, delta, decisions, ignored=ignored, moved=moved, returning=returning)

    # Compute the sums of clusters that lost faces. Some have no row in the table, because their medoid was erased.
    without_row = np.setdiff1d(np.flatnonzero(sizes), previous["cluster"].to_numpy())
    stale = sums.stale if sums else _NO_IDS
    lost = np.unique(np.concatenate([assignments.find_clusters(delta.removed), stale, without_row]))
    if sums and not len(delta.ids) and not len(lost) and decisions.version == rule.decisions:
        return None
    member_ids, member_clusters = assignments.read_members(lost, delta.removed)
    if sums and len(lost):
        known = recompute_clusters(known, lost, member_ids, member_clusters, gallery, rule.cohort)

    # Place the new faces.
    progress(f"{len(delta.ids)} new faces for {len(known)} clusters")
    unfit = find_unfit_faces(delta.faces, rule.min_quality)
    min_lead = rule.limit.find_threshold(int((known.size > 0).sum()))
    placement, new_faces = _place_faces(
        gallery,
        delta,
        known,
        rule,
        assignments,
        sums=sums,
        count=count,
        one_photo=one_photo,
        unfit=unfit,
        min_lead=min_lead,
        decided=decisions,
        places=places,
    )
    # Empty clusters stay in the table of clusters, so that no number is given twice.
    cluster = np.where(placement.known >= 0, placement.known, count + placement.new)
    clusters = extend_clusters(known, count + placement.new_count)
    add_faces(clusters, cluster, new_faces.sums, new_faces.crowd)
    table, medoids = _update_cluster_table(
        previous,
        clusters,
        removed=delta.removed,
        ids=np.concatenate([member_ids, delta.ids]),
        numbers=np.concatenate([member_clusters, cluster]),
    )
    earlier = EarlierPersons.load(report, rule.next_person)
    seen = None if earlier else _read_seen(gallery, assignments, delta, cluster, len(clusters))
    persons = update_persons(
        earlier or EarlierPersons(),
        table,
        decided=decisions,
        cluster_of_decided=cluster_of_decided,
        cluster_of_group=_find_group_clusters(decisions, places, delta, cluster),
        new_clusters=cluster,
        new_times=delta.faces["ingested_at"],
        seen=seen,
    )
    return ClusterUpdate(
        changes=delta,
        clusters=clusters,
        cluster=cluster,
        placed_count=int(((placement.known >= 0) & ~delta.is_moved).sum()),
        new_cluster_count=placement.new_count,
        table=table,
        persons=persons,
        left_out=decisions.ignored,
        medoids=medoids,
        assignments=assignments,
        is_full=sums is None,
        rule=replace(
            _update_rule(rule, placement, cluster, unfit, is_moved=delta.is_moved, next_number=len(clusters)),
            decisions=decisions.version,
            next_person=EarlierPersons(persons, rule.next_person).find_next(),
        ),
    )


def _find_group_clusters(decided: DecidedFaces, places: GroupPlaces, delta: GalleryChanges, cluster: Int64) -> Int64:
    """Find the cluster of each group of decided faces, (g,), -1 for none, after the new faces are placed."""
    clusters = places.cluster.copy()
    group = decided.find_groups(delta.ids)
    clusters[group[group >= 0]] = cluster[group >= 0]
    return clusters


def _read_seen(
    gallery: Gallery, assignments: AssignmentTable, delta: GalleryChanges, cluster: Int64, count: int
) -> SeenTimes:
    """Read when the faces of all clusters came in, for a report that does not say."""
    ids, numbers = assignments.read_all()
    stays = ~is_in_sorted(delta.removed, ids)
    ids = np.concatenate([ids[stays], delta.ids])
    order = np.argsort(ids)
    return SeenTimes.read(gallery, ids[order], np.concatenate([numbers[stays], cluster])[order], count)


def _update_rule(
    rule: PlacementRule, placement: FacePlacement, cluster: Int64, unfit: Bool, *, is_moved: Bool, next_number: int
) -> PlacementRule:
    """Note what was added, and which clusters hold no fit face."""
    unfit_clusters = cluster[unfit & (placement.known < 0)]
    waiting = np.setdiff1d(np.union1d(rule.waiting, unfit_clusters), cluster[~unfit])
    return replace(
        rule,
        waiting=waiting.astype(np.int64),
        next_number=next_number,
        added=rule.added + int((~is_moved).sum()),
        unplaced=rule.unplaced + int(((placement.known < 0) & ~is_moved).sum()),
    )


def _read_changes(gallery: Gallery, sums: ClusterSums, assignments: AssignmentTable) -> GalleryChanges:
    """Read what changed since the mark of the sums."""
    since = find_changes(gallery, sums.mark)
    faces, vectors = _read_usable(since.read_new_rows([*_READ_COLUMNS, "embedding"]), gallery.dim)
    # A face that has a cluster already is not new.
    is_new = assignments.find_clusters(np.asarray(faces["face_id"].to_numpy())) < 0
    removed = since.find_deleted_ids()
    # If the log does not tell who left, compare all ids with the gallery.
    if removed is None:
        removed = _find_absent(gallery, assignments.read_all()[0])
    elif len(removed):
        removed = removed[assignments.find_clusters(removed) >= 0]
    return GalleryChanges(faces.filter(pa.array(is_new)), vectors[is_new], removed, _NO_IDS)


def _apply_decisions(
    gallery: Gallery, delta: GalleryChanges, decided: DecidedFaces, *, ignored: Int64, moved: Int64, returning: Int64
) -> GalleryChanges:
    """Let faces leave their clusters, and add those that move or return to the new faces.

    Args:
        gallery: the gallery.
        delta: what changed in the gallery.
        decided: what people have decided.
        ignored: sorted ids of faces that have a cluster and are ignored.
        moved: sorted ids of faces that have a cluster and belong to another.
        returning: sorted ids of faces that were ignored.
    """
    if not len(decided.ignored) and not len(moved) and not len(returning):
        return delta
    wanted = np.setdiff1d(np.union1d(moved, returning), np.union1d(delta.ids, np.setdiff1d(delta.removed, moved)))
    parts = [(delta.faces, delta.vectors)]
    if len(wanted):
        rows = gallery.read_chosen_rows("face_id", pa.array(wanted), [*_READ_COLUMNS, "embedding"])
        batches = (batch for part in rows for batch in part.to_batches())
        parts.append(_read_usable(batches, gallery.dim))
    faces, vectors = _merge_by_id(parts, gallery.dim)
    kept = ~decided.is_ignored(np.asarray(faces["face_id"].to_numpy()))
    removed = np.union1d(delta.removed, np.union1d(ignored, moved))
    return GalleryChanges(faces.filter(pa.array(kept)), vectors[kept], removed, moved)


def _find_absent(gallery: Gallery, ids: Int64) -> Int64:
    """Find those of the sorted ids that no face of the gallery has."""
    is_present = np.zeros(len(ids), bool)
    for batch in gallery.batches(["face_id"], rows=_ROWS):
        at = find_sorted(ids, batch["face_id"].drop_null().to_numpy())
        is_present[at[at >= 0]] = True
    return ids[~is_present]


def _read_everything(
    gallery: Gallery, assignments: AssignmentTable, cohort: Cohort, count: int, leaving: Int64
) -> tuple[GalleryChanges, Clusters]:
    """Read all faces once: what changed, and the sums of the clusters from the faces that they still have.

    Args:
        gallery: the gallery.
        assignments: faces.parquet of the report.
        cohort: densities are computed with it.
        count: number of clusters.
        leaving: sorted ids of faces that are in the gallery and leave their cluster.
    """
    ids, numbers = assignments.read_all()
    is_present = np.zeros(len(ids), bool)
    clusters = make_empty_clusters(count, gallery.dim)
    parts: list[tuple[pa.Table, Float32]] = []
    for batch in gallery.batches([*_READ_COLUMNS, "embedding"], rows=_ROWS):
        faces, vectors = _read_usable([batch], gallery.dim)
        # Add known faces to their clusters, and set the others aside.
        at = find_sorted(ids, faces["face_id"].to_numpy())
        is_known = at >= 0
        is_present[at[is_known]] = True
        stays = is_known & ~is_in_sorted(leaving, faces["face_id"].to_numpy())
        add_faces(clusters, numbers[at[stays]], vectors[stays], cohort.compute_density(vectors[stays]))
        if not is_known.all():
            parts.append((faces.filter(pa.array(~is_known)), vectors[~is_known]))
    new_faces, new_vectors = _merge_by_id(parts, gallery.dim)
    return GalleryChanges(new_faces, new_vectors, ids[~is_present], _NO_IDS), clusters


def _read_usable(batches: Iterable[pa.RecordBatch], dim: int) -> tuple[pa.Table, Float32]:
    """Read face_id, uri and identity of the faces with a unit vector, and the vectors (n, dim), by rising id."""
    parts = []
    for batch in batches:
        faces = batch.filter(batch["face_id"].is_valid())
        vectors, is_unit = read_unit_vectors(faces["embedding"], dim)
        table = pa.Table.from_batches([faces]).select(list(_READ_COLUMNS))
        parts.append((table.filter(pa.array(is_unit)), vectors[is_unit]))
    return _merge_by_id(parts, dim)


def _merge_by_id(parts: list[tuple[pa.Table, Float32]], dim: int) -> tuple[pa.Table, Float32]:
    """Merge faces and their vectors, each id once, by rising id."""
    empty = pa.schema([FACES_SCHEMA.field(name) for name in _READ_COLUMNS]).empty_table()
    faces = pa.concat_tables([empty, *(table.cast(empty.schema) for table, _ in parts)])
    vectors = np.concatenate([np.empty((0, dim), np.float32), *(vectors for _, vectors in parts)])
    # The first row of each id, by rising id.
    order = np.unique(faces["face_id"].to_numpy(), return_index=True)[1]
    return faces.take(pa.array(order)), vectors[order]


def _place_faces(
    gallery: Gallery,
    delta: GalleryChanges,
    known: Clusters,
    rule: PlacementRule,
    assignments: AssignmentTable,
    *,
    sums: ClusterSums | None,
    count: int,
    one_photo: bool,
    unfit: Bool,
    min_lead: float,
    decided: DecidedFaces,
    places: GroupPlaces,
) -> tuple[FacePlacement, Clusters]:
    """Place the new faces in existing or new clusters, and return them as clusters of one."""
    faces = Clusters.from_faces(delta.vectors, rule.cohort.compute_density(delta.vectors))
    different = _NO_PAIRS
    excluded = _NO_PAIRS
    # Keep new faces of one photo apart, and away from clusters that hold a face of the photo.
    if one_photo:
        photo = delta.faces["uri"].combine_chunks().dictionary_encode().indices.to_numpy()
        different = drop_twins(pair_equal_keys(photo, np.arange(len(photo))), delta.vectors, find_space_scale(gallery))
        excluded = _find_excluded(gallery, delta, assignments)
    # Compare through the index if that pays, and otherwise with all clusters.
    index = open_usable_index(gallery, sums.mark, len(faces) * count) if sums else None
    near = find_near_clusters(index, delta.vectors, assignments) if index else None
    # What is one person by decision is placed as one.
    nodes = DecidedNodes.locate(decided, delta.ids)
    unit = nodes.unite(())
    first = np.unique(unit, return_index=True)[1]
    fit_units = np.unique(unit[~unfit])
    is_unfit = np.ones(len(first), bool)
    is_unfit[fit_units] = False
    pairs = unit[np.concatenate([different, nodes.different])]
    placement = assign_faces(
        faces.merge(unit),
        mask_empty(known),
        rule.threshold,
        pairs[pairs[:, 0] != pairs[:, 1]],
        excluded=np.stack([unit[excluded[:, 0]], excluded[:, 1]], axis=1),
        near=near.unite(unit) if near else None,
        min_lead=min_lead,
        unfit=is_unfit,
        waiting=rule.waiting,
        decided=place_groups(decided, places, nodes.group[first], len(known)),
    )
    return FacePlacement(placement.known[unit], placement.new[unit]), faces


def _find_excluded(gallery: Gallery, delta: GalleryChanges, assignments: AssignmentTable) -> Int64:
    """Find the pairs (m, 2) of a new face and a cluster that holds another face of the same photo."""
    uris = delta.faces["uri"].combine_chunks()
    if not len(uris):
        return _NO_PAIRS
    taken = assignments.find_photo_clusters(pc.unique(uris), delta.removed)
    if not taken.num_rows:
        return _NO_PAIRS
    # A face whose photo was moved has another uri by now, and its old one may be that of another photo.
    has_id = ds.field("face_id").isin(taken["face_id"].combine_chunks())
    current = gallery.to_arrow(["face_id", "uri", "embedding"], has_id)
    taken = taken.join(current.select(["face_id", "uri"]), ["face_id", "uri"], join_type="inner")
    # Join by uri: one row per new face and known face of its photo.
    faces = pa.table({"uri": uris, "at": np.arange(len(uris))})
    pairs = faces.join(taken.select(["uri", "face_id", "cluster"]), "uri", join_type="inner")
    # A new face that is as near as a copy is the same person's.
    order = np.argsort(current["face_id"].to_numpy())
    known_ids = current["face_id"].to_numpy()[order]
    known_vectors = read_unit_vectors(current["embedding"], gallery.dim)[0][order]
    at = find_sorted(known_ids, pairs["face_id"].to_numpy())
    is_apart = ~are_twins(delta.vectors[pairs["at"].to_numpy()], known_vectors[at], find_space_scale(gallery))
    pairs = pairs.filter(pa.array(is_apart))
    return np.unique(np.stack([pairs["at"].to_numpy(), pairs["cluster"].to_numpy()], axis=1), axis=0)


def _update_cluster_table(
    previous: pa.Table, clusters: Clusters, *, removed: Int64, ids: Int64, numbers: Int64
) -> tuple[pa.Table, Int64]:
    """Update the rows of clusters.parquet.

    If a cluster lost its medoid, and in new clusters, the face with the smallest id becomes the medoid.

    Args:
        previous: the rows so far.
        clusters: all clusters.
        removed: sorted ids of removed faces.
        ids: ids of the new faces, and of all faces in clusters that lost one.
        numbers: clusters of these faces.

    Returns:
        The rows, and the sorted ids of the faces that are medoids from now on.
    """
    # The smallest of these ids in each cluster, (k,).
    smallest = np.full(len(clusters), np.iinfo(np.int64).max)
    np.minimum.at(smallest, numbers, ids)
    # Old clusters: new sizes, and another medoid if theirs was removed.
    old_numbers = previous["cluster"].to_numpy()
    medoids = previous["medoid"].to_numpy().copy()
    has_lost_medoid = is_in_sorted(removed, medoids) & (clusters.size[old_numbers] > 0)
    medoids[has_lost_medoid] = smallest[old_numbers[has_lost_medoid]]
    old = previous.set_column(1, "size", pa.array(clusters.size[old_numbers]))
    old = old.set_column(2, "medoid", pa.array(medoids))
    # New clusters.
    new_numbers = np.setdiff1d(np.flatnonzero(clusters.size), old_numbers)
    new = pa.table(
        {
            "cluster": new_numbers,
            "size": clusters.size[new_numbers],
            "medoid": smallest[new_numbers],
            "cohesion": clusters.compute_cohesion()[new_numbers],
        }
    )
    table = pa.concat_tables([old, new.cast(previous.schema)])
    return table, np.sort(np.append(medoids[has_lost_medoid], smallest[new_numbers]))
