"""dedup --new: the images that came since the last time against all that are there, by the search index; no graph.

The report is what `dedup` would say of the new images: the pairs that have one, and the groups with one, in full.
"""

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.curation.duplicates import DuplicateRule, Duplicates, find_duplicates
from facepipe.curation.duplicates.incremental import Around, around
from facepipe.curation.duplicates.report import duplicates_report
from facepipe.errors import IndexingError
from facepipe.gallery import Gallery
from facepipe.gallery.fresh import Changes, Files, Mark, changes
from facepipe.index import manifest as manifests
from facepipe.index.search import Index
from facepipe.reports.html import write_report
from facepipe.reports.model import Figure
from pipelines.dedup import DedupConfig
from pipelines.dedup.pipeline import MARK, DedupSummary, write_tables
from pipelines.dedup.pipeline import NAME as WHOLE
from pipelines.graph import Progress
from pipelines.runtime.phases import Phases
from pipelines.runtime.run_record import records
from pipelines.runtime.workspace import report_folder, reports_of

NAME = "dedup-new"
_THUMBS = 2 << 30  # bytes of table files that are read for the pictures in the page


@dataclass
class NewSummary(DedupSummary):
    """What was found. new: images that came; compared: old ones that they were compared with picture by picture. The
    other figures are of the new images and of their groups."""

    new: int = 0
    compared: int = 0


class _UnchangedError(Exception):
    """Nothing came: the report stays as it is."""


@records("dedup_new")
def run(config: DedupConfig, gallery: str, progress: Progress = lambda line: None) -> NewSummary:
    """Find the copies among and of the images that came since the last run, or since the last `dedup` that left a mark.

    Without either all images are new. Where none came, the report of the last run stays. Raises IndexingError where
    the index is missing, of another model, or lacks faces of the new images.
    """
    table, summary = Gallery(gallery), NewSummary()
    phases = Phases(summary.seconds)
    summary.out = os.path.join(reports_of(table), NAME)
    with suppress(_UnchangedError), report_folder(table, NAME) as folder:
        since = changes(table, _mark(table))
        found = around(since, lambda: _index(table), config.dedup, progress)
        phases.end("gather")
        if found is None:
            _keep(table, summary.out, folder)
            raise _UnchangedError
        progress("comparing pictures")
        edges = found.edges
        everything = find_duplicates(found.table, edges.u, edges.v, edges.distance, config.dedup)
        uris = pc.unique(found.table["uri"].filter(pa.array(found.new)))
        duplicates = of_new(everything, uris)
        phases.end("compare")
        write_tables(folder, duplicates, None, summary)
        _report(table, since, found, duplicates, (config.dedup, folder))
        Mark.of(table).save(os.path.join(folder, MARK))
        summary.new, summary.compared = len(uris), pc.count_distinct(found.table["uri"]).as_py() - len(uris)
        summary.without_hash = _without_hash(found)
        phases.end("write")
    return summary


def _mark(table: Gallery) -> Mark | None:
    """The later of what this and a whole `dedup` left, of this table."""
    found = [Mark.load(os.path.join(reports_of(table), name, MARK)) for name in (NAME, WHOLE)]
    marks = [mark for mark in found if mark is not None]
    same = [mark for mark in marks if mark.gallery == table.id]
    return max(same or marks, key=lambda mark: mark.version, default=None)


def _index(table: Gallery) -> Index:
    index = Index(table.path)
    if index.manifest.contract != manifests.contract_of(table):
        raise IndexingError(
            f"the index of {table.path!r} is of another model contract: `facepipe index {table.path}` builds it anew"
        )
    return index


def _keep(table: Gallery, final: str, folder: str) -> None:
    """The report as it is, with a newer mark: the files of the table may have changed without new rows."""
    if os.path.isdir(final):
        now = Mark.of(table)
        if Mark.load(os.path.join(final, MARK)) != now:
            now.save(os.path.join(final, MARK))
    shutil.rmtree(folder)


def of_new(found: Duplicates, uris: pa.Array) -> Duplicates:
    """Of duplicates the pairs with one of these images, the groups with one, and the decisions on all of both."""
    pairs = found.pairs.filter(pc.or_(*(pc.is_in(found.pairs[f"uri_{end}"], uris) for end in "ab")))
    mine = pc.is_in(found.decisions["uri"], uris)
    groups = np.unique(found.decisions.filter(mine)["group"].drop_null().to_numpy())
    inside = pc.is_in(found.decisions["group"], pa.array(groups, pa.int64()))
    decisions = found.decisions.filter(pc.or_(mine, inside))
    shown = found.groups.filter(pc.is_in(found.groups["group"], pa.array(groups, pa.int64())))
    return Duplicates(pairs, _renumbered(shown, groups), _renumbered(decisions, groups))


def _renumbered(table: pa.Table, groups: np.ndarray[tuple[int], np.dtype[np.int64]]) -> pa.Table:
    """The groups numbered 0, 1, ... in their order."""
    at = table.column_names.index("group")
    number = pc.index_in(table["group"], pa.array(groups, pa.int64())).cast(pa.int64())
    return table.set_column(at, "group", number)


def _without_hash(found: Around) -> int:
    table = found.table.filter(pa.array(found.new))
    first = pc.and_(pc.equal(table["face_index"], 0), table["image_hash"].is_null())
    return int(pc.sum(first).as_py() or 0)


def _report(
    table: Gallery, since: Changes, found: Around, duplicates: Duplicates, told: tuple[DuplicateRule, str]
) -> None:
    rule, folder = told
    images = pc.count_distinct(found.table["uri"].filter(pa.array(found.new))).as_py()
    new = Figure("new images", f"{images:,}", f"{found.asked:,} faces were looked up in the index")
    shown = Files(table, _pictured(table, since, found, duplicates))
    page = duplicates_report([shown], duplicates, rule, new)
    write_report(replace(page, title="Copies among the new images, and of them"), os.path.join(folder, "report.html"))


def _pictured(table: Gallery, since: Changes, found: Around, duplicates: Duplicates) -> list[str]:
    """The table's files that pictures are read from: those of the new images, then those that hold most of the rest,
    as long as it is no lot: pictures of old images lie all over the table."""
    size = {file["path"]: file["size_bytes"] for file in table.files()}
    shown = duplicates.decisions.filter(duplicates.decisions["group"].is_valid())["uri"]
    ends = [duplicates.pairs[f"uri_{end}"] for end in "ab"]
    uris = pc.unique(pa.chunked_array([chunk for column in (shown, *ends) for chunk in column.chunks], pa.string()))
    if not len(uris):
        return []
    old = found.table.filter(pc.and_(pc.is_in(found.table["uri"], uris), found.table["file"].is_valid()))
    counts = sorted(old["file"].value_counts().to_pylist(), key=lambda row: (-row["counts"], row["values"]))
    order = dict.fromkeys([*since.whole, *since.mixed, *(row["values"] for row in counts)])
    paths = [path for path in order if path in size]
    return [path for path, total in zip(paths, np.cumsum([size[p] for p in paths]), strict=True) if total <= _THUMBS]
