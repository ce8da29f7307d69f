"""Compact a gallery: join small files to large ones, and delete files that no reader needs any more."""

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field

from facepipe.decisions.table import compact_table
from facepipe.erasure.purges import choose_due, do_purges, list_purges
from facepipe.erasure.takeup import RequestTaker
from facepipe.errors import GalleryBusyError, StorageError
from facepipe.gallery import Gallery
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.file_counts import refresh_counts
from facepipe.gallery.maintenance.compact import CompactConfig, compact_files, fold_marks, plan_compaction
from facepipe.gallery.maintenance.purge import find_due_files, purge_files
from facepipe.gallery.maintenance.text_repair import count_files_to_repair, repair_text
from facepipe.gallery.maintenance.vacuum import claim_unreferenced, delete_files, delete_uploads, find_unreferenced
from facepipe.observe.runs import new_run_id
from facepipe.storage.lease import hold_lease
from facepipe.storage.uploads import UploadsUnknownError
from pipelines.runtime.run_record import get_current_run, record_calls

_SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class CompactRunConfig:
    """Everything that `compact` can be configured with.

    Attributes:
        compact: When files are joined, and to what.
    """

    compact: CompactConfig = field(default_factory=CompactConfig)


@dataclass
class CompactSummary:
    """What was done.

    Attributes:
        repaired: Files of an older version whose labels or ranges in the log were mended.
        joined: Files that were joined.
        into: Files that they became.
        folded: Files into which marks were folded.
        purged: Files that were written anew because they held deleted rows.
        deleted: Files that were deleted.
        bytes: Their size.
        files: Files of the table now.
        version: Version of the table now.
        decisions: Files of the table of decisions that were joined.
        dry_run: Whether nothing was done, but only counted.
    """

    repaired: int = 0
    joined: int = 0
    into: int = 0
    folded: int = 0
    purged: int = 0
    deleted: int = 0
    bytes: int = 0
    files: int = 0
    version: int = -1
    decisions: int = 0
    dry_run: bool = False


def run(
    config: CompactConfig,
    gallery: str,
    everything: bool = False,
    dry_run: bool = False,
    dated: Collection[str] = (),
) -> CompactSummary:
    """Join small files if there are enough of them, and delete what left the table long ago.

    No row changes, and the index stays as it is. A table of an older version is repaired first: its labels get their
    normal form, and its log right ranges of texts.

    Args:
        config: sizes, counts and times.
        gallery: path or URL of the gallery.
        everything: join from two small files on, and look for text to repair in any table.
        dry_run: only count, and write nothing, not even a record of the run.
        dated: names of sources with a retention: their files are joined in the order of their times.

    Raises:
        GalleryBusyError: another run is writing to the gallery.
    """
    table = Gallery(gallery)
    if dry_run:
        return _preview(config, table, everything)
    return _compact(config, table.path, everything, dated)


@record_calls("compact")
def _compact(config: CompactConfig, gallery: str, everything: bool, dated: Collection[str]) -> CompactSummary:
    with hold_lease(gallery) as lease:
        table = Gallery(gallery)
        current_run = get_current_run()
        commit = Committer(table, current_run.id if current_run else new_run_id(), lease)
        repaired = repair_text(table, commit, everything=everything)
        table = Gallery(gallery)
        groups = plan_compaction(table, config, everything, dated)
        # Join first and delete after the commit: files that were joined just now are kept for their readers.
        with RequestTaker(commit, lease) as taker:
            taker.start()
            fewer = compact_files(table, groups, commit)
            folded = fold_marks(Gallery(gallery), commit, everything)
            joined = Gallery(gallery)
            purged = purge_files(joined, find_due_files(joined, config.purge_days, everything=everything), commit)
            purges = choose_due(list_purges(gallery), margin=True, everything=everything)
            # A run that reads old files may hold the lease of the index or of the reports: the next compaction purges.
            with suppress(GalleryBusyError):
                purged += do_purges(gallery, purges, lease, commit)
            if everything:
                commit.drop_deletion_vectors()
        deleted = claim_unreferenced(gallery, lease, config.keep_hours * _SECONDS_PER_HOUR)
        delete_files(deleted, lease)
        with suppress(UploadsUnknownError):
            delete_uploads(gallery, lease)
        decisions = compact_table(gallery, config.keep_hours * _SECONDS_PER_HOUR, everything=everything)
        compacted = Gallery(gallery)
        with suppress(StorageError):  # without these counts `info` is slower, and nothing else
            refresh_counts(compacted)
        return CompactSummary(
            repaired=repaired,
            joined=fewer + len(groups),
            into=len(groups),
            folded=folded,
            purged=purged,
            deleted=len(deleted),
            bytes=sum(entry.size for entry in deleted),
            files=compacted.count_totals().files,
            version=compacted.version,
            decisions=decisions,
        )


def _preview(config: CompactConfig, table: Gallery, everything: bool) -> CompactSummary:
    """Count what a run would do."""
    groups = plan_compaction(table, config, everything)
    unreferenced = find_unreferenced(table, config.keep_hours * _SECONDS_PER_HOUR)
    return CompactSummary(
        repaired=count_files_to_repair(table, everything=everything),
        joined=sum(map(len, groups)),
        into=len(groups),
        purged=len(find_due_files(table, config.purge_days, everything=everything)),
        deleted=len(unreferenced),
        bytes=sum(entry.size for entry in unreferenced),
        files=table.count_totals().files,
        version=table.version,
        dry_run=True,
    )
