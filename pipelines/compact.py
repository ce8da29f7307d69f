"""compact: a gallery's small files into large ones, and files that no reader needs any more off the disk."""

from dataclasses import dataclass, field

from facepipe.gallery import Gallery
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.maintenance.compact import CompactConfig, compact_files, plan_compaction
from facepipe.gallery.maintenance.vacuum import delete_unreferenced, find_unreferenced
from facepipe.observe.runs import new_run_id
from facepipe.storage.lease import hold_lease
from pipelines.runtime.run_record import get_current_run, record_calls

_HOUR = 3600.0


@dataclass(frozen=True)
class CompactRunConfig:
    """Everything `compact` can be told."""

    compact: CompactConfig = field(default_factory=CompactConfig)


@dataclass
class CompactSummary:
    """What was done: files joined into fewer, files and bytes deleted, files of the table now."""

    joined: int = 0
    into: int = 0
    deleted: int = 0
    bytes: int = 0
    files: int = 0
    version: int = -1
    dry_run: bool = False


def run(config: CompactConfig, gallery: str, everything: bool = False, dry_run: bool = False) -> CompactSummary:
    """Join small files where there are enough of them (`everything`: two), and delete what left the table long ago.

    No row changes, and the index stays as it is. dry_run: only count, and write nothing, no record of the run either.
    Raises GalleryBusyError while another run writes.
    """
    table = Gallery(gallery)
    return _planned(config, table, everything) if dry_run else _compact(config, table.path, everything)


@record_calls("compact")
def _compact(config: CompactConfig, gallery: str, everything: bool) -> CompactSummary:
    table = Gallery(gallery)
    with hold_lease(table.path) as lease:
        table = Gallery(gallery)
        groups = plan_compaction(table, config, everything)
        recorded = get_current_run()
        commit = Committer(table, recorded.id if recorded else new_run_id(), lease)
        fewer = compact_files(table, groups, commit)
        lease.check()
        now = Gallery(gallery)
        gone = delete_unreferenced(now, config.keep_hours * _HOUR)
        joined = fewer + len(groups)
        return CompactSummary(
            *(joined, len(groups), len(gone), sum(file.size for file in gone), len(now.files()), now.version)
        )


def _planned(config: CompactConfig, table: Gallery, everything: bool) -> CompactSummary:
    groups, gone = plan_compaction(table, config, everything), find_unreferenced(table, config.keep_hours * _HOUR)
    joined = sum(map(len, groups))
    size = sum(file.size for file in gone)
    return CompactSummary(joined, len(groups), len(gone), size, len(table.files()), table.version, dry_run=True)
