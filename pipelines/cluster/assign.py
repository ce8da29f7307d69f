"""cluster --assign: put a gallery's new faces into the clusters of its report, whose numbers stay as they are."""

import json
import os
import shutil
import time
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from facepipe.config import build
from facepipe.curation.clusters.assignments import AssignmentTable
from facepipe.curation.clusters.incremental import ClusterUpdate, update_clusters
from facepipe.curation.clusters.persons import PERSONS
from facepipe.curation.clusters.placement import STATE, PlacementRule
from facepipe.curation.clusters.sums import MARK, SUMS, ClusterSums
from facepipe.curation.clusters.tables import (
    CLUSTERS,
    FACE_SCHEMA,
    FACES,
    LEFT_OUT,
    LEFT_OUT_SCHEMA,
    read_cluster_table,
)
from facepipe.curation.report_folders import MARKER, inspect_folder
from facepipe.decisions.gallery import DecidedGallery
from facepipe.decisions.named import NAMED
from facepipe.errors import FacepipeError, StorageError
from facepipe.gallery import Gallery
from facepipe.gallery.changes import ReadMark
from facepipe.reports.parquet import write_rows, write_table
from facepipe.sorted_lookup import is_in_sorted
from facepipe.storage.store import PRIVATE_NAMES
from pipelines.cluster.pipeline import NAME, ClusterConfig, ClusterRules, count_faces
from pipelines.cluster.pipeline import run as run_cluster
from pipelines.graph import OnProgress
from pipelines.runtime.run_record import record_calls
from pipelines.runtime.workspace import ReportUnchangedError, locate_reports, open_report_folder


@dataclass
class AssignSummary:
    """Figures of an update.

    Attributes:
        new: Faces that had no cluster.
        placed: New faces in old clusters.
        clusters: New clusters.
        gone: Faces that are no longer in the gallery, or that people ignore.
        moved: Faces that have another cluster now, because people have decided so.
        full: Whether the vectors of all faces were read.
        anew: Whether all faces were clustered anew, because the gallery had grown. Clusters kept their numbers.
        growth: Faces of the gallery per face of the last clustering; 0 if that is not known.
        unplaced: Share of the faces since the last clustering that found no cluster.
        distance: Threshold of the last clustering, as a distance of faces of mean density.
        advice: What to do, if the clusters should be made anew and were not.
        seconds: Seconds of the run.
    """

    new: int = 0
    placed: int = 0
    clusters: int = 0
    gone: int = 0
    moved: int = 0
    full: bool = False
    anew: bool = False
    growth: float = 0.0
    unplaced: float = 0.0
    distance: float = 0.0
    advice: str = ""
    seconds: float = 0.0


@record_calls("assign")
def run(
    gallery: str,
    one_photo: bool = True,
    progress: OnProgress = lambda line: None,
    rules: ClusterRules | None = None,
) -> AssignSummary:
    """Bring the cluster tables of a gallery up to date with its faces. Suspicions and the page stay as they are.

    If the gallery has grown since its last clustering, all faces are clustered anew first, with the settings of that
    clustering. Clusters keep their numbers, and new faces join old clusters only if that is sure.

    Args:
        gallery: path of the gallery.
        one_photo: whether faces of one photo are different persons.
        progress: called with each line of progress.
        rules: say from which growth and up to which size to cluster anew.

    Raises:
        EvaluationError: if there are no clusters yet.
    """
    began = time.monotonic()
    table = DecidedGallery(gallery)
    summary = AssignSummary()
    rules = rules or ClusterRules()
    report = os.path.join(locate_reports(table), NAME)
    # Name what is missing before a folder is made for what is new. `open_report_folder` renames an old report back.
    if not os.path.isdir(f"{report}.old"):
        read_cluster_table(table.path, CLUSTERS)
    anew = _plan_anew(table, report, rules)
    if anew is not None:
        progress("the gallery has grown: clustering it anew")
        _cluster_anew(table, report, anew, progress, summary)
    else:
        _update(table, report, summary, one_photo=one_photo, progress=progress)
        summary.advice = _advise(table, summary, rules)
    if summary.advice:
        progress(summary.advice)
    summary.seconds = round(time.monotonic() - began, 3)
    return summary


def _update(
    table: DecidedGallery, report: str, summary: AssignSummary, *, one_photo: bool, progress: OnProgress
) -> None:
    """Place the new faces, and take out those that are gone."""
    with open_report_folder(table, NAME) as new_report:
        decided = table.decided
        update = update_clusters(table, report, one_photo=one_photo, progress=progress, decided=decided)
        _note_drift(summary, PlacementRule.load(report) if update is None else update.rule, count_faces(table))
        # If no face came and none left, the report stays as it is.
        if update is None:
            raise ReportUnchangedError(MARK, ReadMark.from_gallery(table))
        # Files that do not change are copied, because the new folder replaces the report as a whole.
        _copy_unchanged(report, new_report.path)
        _write_tables(update, new_report.path)
        update.rule.save(new_report.path)
        ClusterSums(update.clusters, ReadMark.from_gallery(table)).save(new_report.path)
        _summarise(summary, update)


def _plan_anew(table: Gallery, report: str, rules: ClusterRules) -> ClusterConfig | None:
    """Return the config to cluster all faces anew with, if the gallery has grown enough and is small enough."""
    try:
        rule = PlacementRule.load(report)
    except StorageError:
        return None  # the update says what is wrong
    faces = count_faces(table)
    if not rule.settings or faces < (1 + rules.anew_growth) * rule.faces or faces > rules.anew_faces:
        return None
    try:
        return build(ClusterConfig, json.loads(rule.settings))
    except (ValueError, FacepipeError):  # settings of another version
        return None


def _cluster_anew(
    table: Gallery, report: str, config: ClusterConfig, progress: OnProgress, summary: AssignSummary
) -> None:
    """Cluster all faces, and count what happened to those that came and went."""
    before, _ = AssignmentTable(os.path.join(report, FACES)).read_all()
    next_number = PlacementRule.load(report).next_number
    run_cluster(config, table.path, progress, keep_ids=True, part_new=True)
    after, clusters = AssignmentTable(os.path.join(report, FACES)).read_all()
    is_new = ~is_in_sorted(before, after)
    summary.new = int(is_new.sum())
    summary.placed = int((clusters[is_new] < next_number).sum())
    summary.clusters = len(np.unique(clusters[clusters >= next_number]))
    summary.gone = int((~is_in_sorted(after, before)).sum())
    summary.full = True
    summary.anew = True
    _note_drift(summary, PlacementRule.load(report), count_faces(Gallery(table.path)))


def _note_drift(summary: AssignSummary, rule: PlacementRule, faces: int) -> None:
    """Note how far the gallery is from the one that was clustered."""
    summary.growth = round(faces / rule.faces, 3) if rule.faces else 0.0
    summary.unplaced = round(rule.unplaced / rule.added, 3) if rule.added else 0.0
    summary.distance = round(rule.distance, 4)


def _advise(table: Gallery, summary: AssignSummary, rules: ClusterRules) -> str:
    """Say when to cluster anew, with the command that does it."""
    command = f"run `facepipe cluster {table.path} --keep-ids`"
    if not summary.growth and summary.new:
        return f"these clusters do not say from how many faces they were made: {command} once"
    if summary.growth < 1 + rules.anew_growth:
        return ""
    return (
        f"the gallery has {summary.growth:.2f} times the faces that were clustered, and {summary.unplaced:.0%} of the "
        f"new ones found no cluster: {command}"
    )


def _copy_unchanged(report: str, folder: str) -> None:
    """Copy the files of the report that stay as they are. Files of somebody else are moved when the folder changes."""
    current = inspect_folder(report, NAME)
    for name in current.files if current is not None else ():
        if name not in (FACES, CLUSTERS, PERSONS, NAMED, LEFT_OUT, SUMS, MARK, STATE, MARKER, *PRIVATE_NAMES):
            shutil.copy2(os.path.join(report, name), folder)


def _write_tables(update: ClusterUpdate, folder: str) -> None:
    write_rows(os.path.join(folder, FACES), FACE_SCHEMA, update.iterate_face_rows())
    write_table(os.path.join(folder, CLUSTERS), update.table)
    write_table(os.path.join(folder, PERSONS), update.persons)
    write_table(os.path.join(folder, NAMED), update.build_named_rows())
    write_table(os.path.join(folder, LEFT_OUT), pa.table([update.left_out], schema=LEFT_OUT_SCHEMA))


def _summarise(summary: AssignSummary, update: ClusterUpdate) -> None:
    summary.new = int((~update.changes.is_moved).sum())
    summary.placed = update.placed_count
    summary.clusters = update.new_cluster_count
    summary.moved = len(update.changes.moved)
    summary.gone = len(update.changes.removed) - summary.moved
    summary.full = update.is_full
