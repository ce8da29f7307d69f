"""dedup --new: compare the images that came since the last time with all others, by the search index.

The report is what `dedup` would say of the new images: the pairs and groups with a new image, in full. No graph is
needed.
"""

import os
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.curation.duplicates import DuplicateRule, Duplicates, find_duplicates
from facepipe.curation.duplicates.images import rank_images
from facepipe.curation.duplicates.incremental import NewImages, gather_new_images
from facepipe.curation.duplicates.report import build_duplicates_report
from facepipe.curation.space import find_space_limits
from facepipe.decisions.persons import read_decided_faces
from facepipe.errors import IndexingError
from facepipe.gallery import Gallery
from facepipe.gallery.changes import PartialGallery, ReadMark, TableChanges, find_changes
from facepipe.index import manifest as manifests
from facepipe.index.search import Index
from facepipe.reports.html import write_report
from facepipe.reports.model import Figure, Report
from facepipe.types import Int64
from pipelines.dedup import DedupConfig
from pipelines.dedup.pipeline import MARK, DedupSummary, write_tables
from pipelines.dedup.pipeline import NAME as WHOLE
from pipelines.graph import OnProgress
from pipelines.runtime.run_record import PhaseTimer, record_calls
from pipelines.runtime.workspace import ReportUnchangedError, locate_reports, open_report_folder

NAME = "dedup-new"
_MAX_THUMB_BYTES = 2 << 30  # of the table's files that are read for the pictures in the page


@dataclass
class NewSummary(DedupSummary):
    """Figures of a search for duplicates of new images. Other figures are of the new images and their groups.

    Attributes:
        new: New images.
        compared: Old images that they were compared with, picture by picture.
    """

    new: int = 0
    compared: int = 0


@record_calls("dedup_new")
def run(config: DedupConfig, gallery: str, progress: OnProgress = lambda line: None) -> NewSummary:
    """Find the copies of the images that came since the last run, or since the last `dedup` that left a mark.

    If there was no such run, all images are new. If there are no new images, the last report stays.

    Args:
        config: the configuration.
        gallery: path of the gallery. The report goes to GALLERY/reports/dedup-new/.
        progress: called with each line of progress.

    Raises:
        IndexingError: if the index is missing, of another model, or lacks faces of the new images.
    """
    table = Gallery(gallery)
    config = replace(config, dedup=config.dedup.fit_model(find_space_limits(table)))
    summary = NewSummary(out=os.path.join(locate_reports(table), NAME))
    phases = PhaseTimer(summary.seconds)
    with open_report_folder(table, NAME) as new_report:
        # Gather the new images, and the old ones that are near them by the index.
        since = find_changes(table, _load_last_mark(table))
        decided = read_decided_faces(table)
        images = gather_new_images(since, lambda: _open_index(table), config.dedup, progress, decided)
        phases.end("gather")
        # Without new images the last report stays.
        if images is None:
            raise ReportUnchangedError(MARK, ReadMark.from_gallery(table))
        progress("comparing pictures")
        # Compare all gathered images, and keep the pairs and groups with a new one.
        ranked = rank_images(images.table, config.dedup.keep, [decided])
        everything = find_duplicates(images.table, images.edges, config.dedup, images.measure, ranked)
        uris = pc.unique(images.table["uri"].filter(pa.array(images.is_new)))
        duplicates = select_new(everything, uris)
        phases.end("compare")
        write_tables(new_report.path, duplicates, None, summary)
        report = _build_report(table, since, images, duplicates, config.dedup)
        write_report(report, os.path.join(new_report.path, "report.html"))
        # The mark says from which version of the table the next run starts.
        ReadMark.from_gallery(table).save(os.path.join(new_report.path, MARK))
        summary.new = len(uris)
        summary.compared = pc.count_distinct(images.table["uri"]).as_py() - len(uris)
        summary.without_hash = _count_without_hash(images)
        phases.end("write")
    return summary


def _load_last_mark(table: Gallery) -> ReadMark | None:
    """Load the later of the marks that this command and a whole `dedup` left, if possible one of this table."""
    marks = []
    for name in (NAME, WHOLE):
        mark = ReadMark.load(os.path.join(locate_reports(table), name, MARK))
        if mark is not None:
            marks.append(mark)
    # A mark of another table is better than none: new rows are then recognised by their time of ingestion.
    of_this_table = [mark for mark in marks if mark.gallery == table.id]
    return max(of_this_table or marks, key=lambda mark: mark.version, default=None)


def count_new_images(table: Gallery) -> int:
    """Count the images that came since the last run, and that the next one would compare with all others."""
    count = 0
    for batch in find_changes(table, _load_last_mark(table)).read_new_rows(["face_index"]):
        # One row per image: its first face, or the only row of an image without a face.
        count += pc.sum(pc.fill_null(pc.equal(batch["face_index"], 0), True)).as_py() or 0
    return count


def _open_index(table: Gallery) -> Index:
    index = Index(table.path, with_ignored=True)
    index.freeze()
    if index.manifest.contract != manifests.dump_contract(table):
        raise IndexingError(
            f"the index of {table.path!r} is of another model contract: run `facepipe index {table.path}` to rebuild it"
        )
    return index


def select_new(duplicates: Duplicates, uris: pa.Array) -> Duplicates:
    """Select the pairs with one of these images, the groups with one, and the decisions on all images of both."""
    pairs = duplicates.pairs
    # A pair counts if either image is new. A group counts as a whole if one of its images is new.
    pairs = pairs.filter(pc.or_(pc.is_in(pairs["uri_a"], uris), pc.is_in(pairs["uri_b"], uris)))
    is_new = pc.is_in(duplicates.decisions["uri"], uris)
    numbers = np.unique(duplicates.decisions.filter(is_new)["group"].drop_null().to_numpy())
    is_in_group = pc.is_in(duplicates.decisions["group"], pa.array(numbers, pa.int64()))
    decisions = duplicates.decisions.filter(pc.or_(is_new, is_in_group))
    groups = duplicates.groups.filter(pc.is_in(duplicates.groups["group"], pa.array(numbers, pa.int64())))
    return Duplicates(pairs, _renumber_groups(groups, numbers), _renumber_groups(decisions, numbers))


def _renumber_groups(table: pa.Table, numbers: Int64) -> pa.Table:
    """Assign these groups the numbers 0, 1, ... in their order."""
    at = table.column_names.index("group")
    group = pc.index_in(table["group"], pa.array(numbers, pa.int64())).cast(pa.int64())
    return table.set_column(at, "group", group)


def _count_without_hash(images: NewImages) -> int:
    table = images.table.filter(pa.array(images.is_new))
    # The row with face index 0 stands for the image.
    without_hash = pc.and_(pc.equal(table["face_index"], 0), table["image_hash"].is_null())
    return int(pc.sum(without_hash).as_py() or 0)


def _build_report(
    table: Gallery, since: TableChanges, images: NewImages, duplicates: Duplicates, rule: DuplicateRule
) -> Report:
    count = pc.count_distinct(images.table["uri"].filter(pa.array(images.is_new))).as_py()
    new = Figure("new images", f"{count:,}", f"{images.query_count:,} faces were looked up in the index")
    files = PartialGallery(table, _select_files(table, since, images, duplicates))
    report = build_duplicates_report([files], duplicates, rule, new)
    return replace(report, title="Copies among the new images, and of them")


def _select_files(table: Gallery, since: TableChanges, images: NewImages, duplicates: Duplicates) -> list[str]:
    """Select the table's files that pictures are read from, up to a limit of bytes.

    The files of the new images come first, then those that hold most of the rest. The limit is needed because pictures
    of old images lie all over the table.
    """
    size = {file["path"]: file["size_bytes"] for file in table.files()}
    # Collect the images that the page shows: those in a group, and those in a pair.
    grouped = duplicates.decisions.filter(duplicates.decisions["group"].is_valid())
    columns = [grouped["uri"], duplicates.pairs["uri_a"], duplicates.pairs["uri_b"]]
    uris = pc.unique(pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string()))
    if not len(uris):
        return []
    old = images.table.filter(pc.and_(pc.is_in(images.table["uri"], uris), images.table["file"].is_valid()))
    counts = sorted(old["file"].value_counts().to_pylist(), key=lambda row: (-row["counts"], row["values"]))
    # A dict without values keeps the order and drops repeated files.
    order = dict.fromkeys([*since.new_files, *since.mixed_files, *(row["values"] for row in counts)])
    paths = [path for path in order if path in size]
    totals = np.cumsum([size[path] for path in paths])
    return [path for path, total in zip(paths, totals, strict=True) if total <= _MAX_THUMB_BYTES]
