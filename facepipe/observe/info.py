"""What a gallery holds, as figures."""

from collections import Counter
from dataclasses import asdict
from typing import Any

import pyarrow.dataset as ds

from facepipe.gallery.table import Gallery
from facepipe.observe import runs
from facepipe.observe.runs import RunRecord
from facepipe.schema import FAILED

_MOST = 20
_RUNS = 10


def describe(gallery: Gallery) -> dict[str, Any]:
    """Counts by status, contract, files and bytes, the commonest errors, the last runs."""
    files = gallery.files()
    return {
        "path": gallery.path,
        "version": gallery.version,
        "counts": gallery.counts(),
        "files": len(files),
        "bytes": sum(file["size_bytes"] for file in files),
        "contract": asdict(gallery.contract),
        "errors": errors(gallery),
        "runs": [_shown(record) for record in runs.last(gallery.path, _RUNS)],
    }


def _shown(record: RunRecord) -> dict[str, Any]:
    """A run's record, with the figures that people look for beside its own."""
    counters = record.counters
    figures: dict[str, Any] = {name: counters[name] for name in ("images", "faces") if name in counters}
    failed = sum(counters.get(f"status.{status}", 0) for status in FAILED)
    seconds = None if record.duration is None else round(record.duration, 1)
    return {**asdict(record), **figures, "failed": failed, "seconds": seconds, "phases": record.seconds}


def errors(gallery: Gallery) -> list[dict[str, Any]]:
    """The commonest reasons for failed images, most frequent first."""
    counted: Counter[tuple[str, str]] = Counter()
    for batch in gallery.batches(["status", "error"], ds.field("status").isin(FAILED)):
        counted.update(zip(batch["status"].to_pylist(), batch["error"].to_pylist(), strict=True))
        if len(counted) > 50 * _MOST:  # reasons may quote sizes; keep the table of them bounded
            counted = Counter(dict(counted.most_common(10 * _MOST)))
    return [{"status": s, "error": e, "images": n} for (s, e), n in counted.most_common(_MOST)]
