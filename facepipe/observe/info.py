"""The figures that `facepipe info` shows of a gallery."""

import csv
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pyarrow.dataset as ds

from facepipe.gallery.table import Gallery
from facepipe.observe import runs
from facepipe.observe.runs import RunRecord
from facepipe.schema import FAILED
from facepipe.storage import replace_file
from facepipe.storage.owned import require_own_list
from facepipe.text import protect_cell

_MAX_ERRORS = 20
_MAX_RUNS = 10
# Columns of the list of images that failed.
_FAILED_COLUMNS = ("path", "status", "error")


def describe_gallery(gallery: Gallery) -> dict[str, Any]:
    """Collect counts by status, contract, files and bytes, the most frequent errors and the last runs."""
    files = gallery.files()
    return {
        "path": gallery.path,
        "version": gallery.version,
        "counts": gallery.counts(),
        "files": len(files),
        "bytes": sum(file["size_bytes"] for file in files),
        "contract": asdict(gallery.contract),
        "errors": count_errors(gallery),
        "runs": [_describe_run(record) for record in runs.read_newest(gallery.path, _MAX_RUNS)],
    }


def _describe_run(record: RunRecord) -> dict[str, Any]:
    """Return a run's record, with the figures that people look for beside its own."""
    counters = record.counters
    figures: dict[str, Any] = {name: counters[name] for name in ("images", "faces") if name in counters}
    failed = sum(counters.get(f"status.{status}", 0) for status in FAILED)
    seconds = None if record.duration is None else round(record.duration, 1)
    return {**asdict(record), **figures, "failed": failed, "seconds": seconds, "phases": record.seconds}


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
    with replace_file(path, what="list") as unfinished, open(unfinished, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_FAILED_COLUMNS)
        for row in iterate_failed(gallery):
            writer.writerow((protect_cell(row["uri"]), row["status"], protect_cell(row["error"] or "")))
            count += 1
    return count


def count_errors(gallery: Gallery) -> list[dict[str, Any]]:
    """Count failed images by status and reason, most frequent first."""
    counts: Counter[tuple[str, str]] = Counter()
    for batch in gallery.batches(["status", "error"], ds.field("status").isin(FAILED)):
        counts.update(zip(batch["status"].to_pylist(), batch["error"].to_pylist(), strict=True))
        # Reasons may quote sizes, so their number is not bounded: keep the most frequent ones only.
        if len(counts) > 50 * _MAX_ERRORS:
            counts = Counter(dict(counts.most_common(10 * _MAX_ERRORS)))
    return [
        {"status": status, "error": error, "images": images}
        for (status, error), images in counts.most_common(_MAX_ERRORS)
    ]
