"""cluster --assign: put a gallery's new faces into the clusters of its report, whose numbers stay as they are."""

import os
import shutil
import time
from dataclasses import dataclass

from facepipe.curation.clusters.incremental import ClusterUpdate, update_clusters
from facepipe.curation.clusters.sums import MARK, SUMS, ClusterSums
from facepipe.curation.clusters.tables import CLUSTERS, FACE_SCHEMA, FACES, read_cluster_table
from facepipe.curation.report_folders import MARKER, inspect_folder
from facepipe.gallery import Gallery
from facepipe.gallery.changes import ReadMark
from facepipe.reports.parquet import write_rows, write_table
from facepipe.storage.store import PRIVATE_NAMES
from pipelines.cluster.pipeline import NAME
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
        gone: Faces that are no longer in the gallery.
        full: Whether the vectors of all faces were read.
        seconds: Seconds of the run.
    """

    new: int = 0
    placed: int = 0
    clusters: int = 0
    gone: int = 0
    full: bool = False
    seconds: float = 0.0


@record_calls("assign")
def run(gallery: str, one_photo: bool = True, progress: OnProgress = lambda line: None) -> AssignSummary:
    """Bring the cluster tables of a gallery up to date with its faces. Suspicions and the page stay as they are.

    Args:
        gallery: path of the gallery.
        one_photo: whether faces of one photo are different persons.
        progress: called with each line of progress.

    Raises:
        EvaluationError: if there are no clusters yet.
    """
    began = time.monotonic()
    table = Gallery(gallery)
    summary = AssignSummary()
    report = os.path.join(locate_reports(table), NAME)
    # Name what is missing before a folder is made for what is new. `open_report_folder` renames an old report back.
    if not os.path.isdir(f"{report}.old"):
        read_cluster_table(table.path, CLUSTERS)
    with open_report_folder(table, NAME) as new_report:
        update = update_clusters(table, report, one_photo=one_photo, progress=progress)
        # If no face came and none left, the report stays as it is.
        if update is None:
            raise ReportUnchangedError(MARK, ReadMark.from_gallery(table))
        # Files that do not change are copied, because the new folder replaces the report as a whole.
        _copy_unchanged(report, new_report.path)
        _write_tables(update, new_report.path)
        ClusterSums(update.clusters, ReadMark.from_gallery(table)).save(new_report.path)
        _summarise(summary, update)
    summary.seconds = round(time.monotonic() - began, 3)
    return summary


def _copy_unchanged(report: str, folder: str) -> None:
    """Copy the files of the report that stay as they are. Files of somebody else are moved when the folder changes."""
    current = inspect_folder(report, NAME)
    for name in current.files if current is not None else ():
        if name not in (FACES, CLUSTERS, SUMS, MARK, MARKER, *PRIVATE_NAMES):
            shutil.copy2(os.path.join(report, name), folder)


def _write_tables(update: ClusterUpdate, folder: str) -> None:
    write_rows(os.path.join(folder, FACES), FACE_SCHEMA, update.iterate_face_rows())
    write_table(os.path.join(folder, CLUSTERS), update.table)


def _summarise(summary: AssignSummary, update: ClusterUpdate) -> None:
    summary.new = len(update.changes.ids)
    summary.placed = update.placed_count
    summary.clusters = update.new_cluster_count
    summary.gone = len(update.changes.removed)
    summary.full = update.is_full
