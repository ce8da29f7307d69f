"""The figures that `facepipe info` shows of a gallery."""

import csv
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow.dataset as ds

from facepipe.gallery.changes import PartialGallery
from facepipe.gallery.file_counts import count_images, list_files_with
from facepipe.gallery.table import Gallery
from facepipe.observe import runs
from facepipe.observe.runs import RunRecord
from facepipe.schema import FAILED
from facepipe.storage import join
from facepipe.storage.lease import has_process_ended, is_held
from facepipe.storage.outputs import write_output
from facepipe.storage.owned import require_own_list
from facepipe.text import protect_cell

_MAX_ERRORS = 20
_MAX_RUNS = 10
# Files that are read for the reasons why images failed.
_MAX_FILES = 4096
# Commits that are read to find when a run that was killed was last seen.
_MAX_COMMITS = 200
_DAY = 86400.0
# Columns of the list of images that failed.
_FAILED_COLUMNS = ("path", "status", "error")


def describe_gallery(gallery: Gallery) -> dict[str, Any]:
    """Collect counts by status, contract, files and bytes, the most frequent errors and the last runs."""
    totals = gallery.count_totals()
    errors = count_errors(gallery)
    return {
        "path": gallery.path,
        "version": gallery.version,
        "counts": count_images(gallery),
        "files": totals.files,
        "bytes": totals.bytes,
        "contract": asdict(gallery.contract),
        "errors": errors.counts,
        "errors_files": {"read": errors.files_read, "of": errors.files},
        "runs": describe_runs(gallery),
    }


def describe_runs(gallery: Gallery) -> list[dict[str, Any]]:
    """Describe the newest runs, newest first. One that was killed is `interrupted`, and ended when it was last seen."""
    records = runs.read_newest(gallery.path, _MAX_RUNS)
    seen = _find_last_signs(gallery, records)
    return [_describe_run(record, gallery, seen.get(record.run, "")) for record in records]


def _find_last_signs(gallery: Gallery, records: list[RunRecord]) -> dict[str, str]:
    """Find when runs without an end were last seen: by a commit, or by the end of a run that they started."""
    unfinished = {record.run for record in records if record.ended is None}
    if not unfinished:
        return {}
    signs = [(record.parent, record.ended) for record in records if record.parent and record.ended]
    signs += [(commit.run, commit.time) for commit in gallery.read_commits(_MAX_COMMITS)]
    seen: dict[str, str] = {}
    for run, time in signs:
        if run in unfinished:
            seen[run] = max(time, seen.get(run, ""))
    return seen


def _describe_run(record: RunRecord, gallery: Gallery, seen: str) -> dict[str, Any]:
    """Return a run's record, with the figures that people look for beside its own.

    Args:
        record: the record.
        gallery: the gallery.
        seen: when the run was last seen, if it has no end.
    """
    counters = record.counters
    figures: dict[str, Any] = {name: counters[name] for name in ("images", "faces") if name in counters}
    # A night counts the failed images of all its sources itself.
    by_status = sum(counters.get(f"status.{status}", 0) for status in FAILED)
    figures["failed"] = max(by_status, counters.get("failed", 0))
    if record.ended is None and _was_killed(record, gallery):
        record = replace(record, state="interrupted", ended=max(seen, record.started))
    seconds = None if record.duration is None else round(record.duration, 1)
    values = asdict(record)
    del values["process"]
    return {**values, **figures, "seconds": seconds, "phases": record.seconds}


def _was_killed(record: RunRecord, gallery: Gallery) -> bool:
    """Tell whether a run that has no end is over, without having been able to write that."""
    has_ended = has_process_ended(record.process)
    if has_ended is not None:
        return has_ended
    # On another machine, only the leases tell. A run of an older version may hold none, and counts as one that goes on
    # for a day.
    places = ("", "reports", "index", runs.RUNS)
    if any(is_held(join(gallery.path, place) if place else gallery.path) for place in places):
        return False
    return bool(record.process) or runs.parse_time(runs.format_now()) - runs.parse_time(record.started) > _DAY


def iterate_failed(gallery: Gallery) -> Iterator[dict[str, Any]]:
    """Yield uri, status and error of each image that failed, in no order. Only their rows are read."""
    for batch in gallery.batches(["uri", "status", "error"], ds.field("status").isin(FAILED)):
        yield from batch.to_pylist()


def write_failed(gallery: Gallery, path: str) -> int:
    """Write a CSV file that lists the images that failed: path, status and error.

    Returns:
        Their number.

    Raises:
        ConfigError: there is a file that holds something else.
        StorageError: the file cannot be written.
    """
    require_own_list(path, _FAILED_COLUMNS)
    count = 0
    with write_output(path, "list") as unfinished, open(unfinished, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_FAILED_COLUMNS)
        for row in iterate_failed(gallery):
            writer.writerow((protect_cell(row["uri"]), row["status"], protect_cell(row["error"] or "")))
            count += 1
    return count


@dataclass(frozen=True)
class ErrorCounts:
    """Why images failed.

    Attributes:
        counts: Images by status and reason, most frequent first, of the files that were read.
        files_read: Files that were read.
        files: Files of the table with failed images.
    """

    counts: list[dict[str, Any]]
    files_read: int
    files: int


def count_errors(gallery: Gallery) -> ErrorCounts:
    """Count failed images by status and reason.

    Only files with failed images are read, and of very many only some, spread over the table.
    """
    counts: Counter[tuple[str, str]] = Counter()
    files = list_files_with(gallery, FAILED)
    chosen = files[:: -(-len(files) // _MAX_FILES)] if files else []
    for batch in PartialGallery(gallery, chosen).batches(["status", "error"], ds.field("status").isin(FAILED)):
        counts.update(zip(batch["status"].to_pylist(), batch["error"].to_pylist(), strict=True))
        # Reasons may quote sizes, so their number is not bounded: keep the most frequent ones only.
        if len(counts) > 50 * _MAX_ERRORS:
            counts = Counter(dict(counts.most_common(10 * _MAX_ERRORS)))
    rows = [
        {"status": status, "error": error, "images": images}
        for (status, error), images in counts.most_common(_MAX_ERRORS)
    ]
    return ErrorCounts(rows, len(chosen), len(files))
