"""What a night would do: listings and rows are read, nothing else, and nothing is written."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from facepipe.erasure import pending
from facepipe.errors import SourceError
from facepipe.gallery import Gallery, suppressed
from facepipe.gallery.compact import due
from facepipe.gallery.known import KnownImages
from facepipe.hashing import hash64
from facepipe.index import manifest as manifests
from facepipe.sources import open_source
from facepipe.sources.item import Watched
from facepipe.types import UInt64
from pipelines.nightly.config import NightlyConfig, NightSource
from pipelines.runtime.listing import LISTED, listed


@dataclass
class Foreseen:
    """Counts by step, and what would make the exit code 1; version: of the table, -1 where there is none."""

    version: int = -1
    steps: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def foresee(config: NightlyConfig, progress: Callable[[str], None] = lambda line: None) -> Foreseen:
    """What tonight would bring. Which of the changed files hold other images, only reading them can tell."""
    night = Foreseen()
    held = Gallery(config.gallery) if Gallery.exists(config.gallery) else None
    if held:
        night.version = held.version
        night.steps["erase unfinished"] = {"erasures": len(pending.unfinished(held.path))}
    for source in config.source:
        progress(f"listing {source.title}")
        seen = _look(config, source, held, night)
        if held:
            _decide(held, source, seen, night)
    if held:
        indexed = manifests.load(held.path).live if manifests.exists(held.path) else 0
        night.steps["index"] = {"faces": sum(file["faces"] for file in held.files()), "indexed": indexed}
        groups = due(held, config.compact)
        night.steps["compact"] = {"joined": sum(map(len, groups)), "into": len(groups)}
    return night


@dataclass(frozen=True)
class _Seen:
    """unlisted: sorted hashes of the images that were not listed, None for all; marks: whether they would be marked."""

    unlisted: UInt64 | None = None
    marks: bool = False


def _look(config: NightlyConfig, source: NightSource, held: Gallery | None, night: Foreseen) -> _Seen:
    """List a source as a night does."""
    name, watches = source.title, source.missing != "keep"
    try:
        watched = Watched(open_source(source.to_source()))
    except SourceError as error:
        night.failures.append(f"{name}: {error}")
        return _Seen()
    known = KnownImages(held, name, suppressed.uris(config.gallery) if held else None)
    try:
        counts = listed(watched, known)
        count, unlisted = known.missing(known.of_source)
    finally:
        known.close()
    night.steps[f"embed {name}"] = counts
    if not any(counts[verdict] for verdict in LISTED):
        night.failures += [f"{name}: no image in {source.uri!r}"] if watches else []
        return _Seen()
    too_many = count > int(config.night.missing_at_most * known.of_source)
    if watches and too_many and not watched.broken:
        night.failures.append(f"{name}: {count} of {known.of_source} images are gone at once: they would be left alone")
    return _Seen(np.sort(unlisted), watches and not too_many and not watched.broken)


def _decide(held: Gallery, source: NightSource, seen: _Seen, night: Foreseen) -> None:
    """Which images would be marked as missing, and which erased, for either reason."""
    marked = 0
    erased = {reason: {"images": 0, "faces": 0} for reason in _reasons(source)}
    cutoff = pa.scalar(datetime.now(UTC) - timedelta(days=source.retention_days or 0), pa.timestamp("us", "UTC"))
    columns = ["uri", "face_index", "face_id", "ingested_at", "missing_since"]
    for batch in held.batches(columns, ds.field("source") == source.title, rows=65536):
        first, face = _mask(pc.equal(batch["face_index"], 0), True), _mask(pc.is_valid(batch["face_id"]))
        gone, before = _within(batch["uri"], seen.unlisted), _mask(pc.is_valid(batch["missing_since"]))
        new = gone & ~before & seen.marks
        marked += int((new & first).sum())
        old = _mask(pc.less(batch["ingested_at"], cutoff)) & ("retention" in erased)
        for reason, chosen in (("retention", old), ("missing", (new | (gone & before)) & ~old)):
            if reason in erased:
                erased[reason]["images"] += int((chosen & first).sum())
                erased[reason]["faces"] += int((chosen & face).sum())
    night.steps.setdefault(f"embed {source.title}", {})["missing"] = marked
    night.steps |= {f"erase {reason} {source.title}": found for reason, found in erased.items()}


def _reasons(source: NightSource) -> list[str]:
    asked = (("retention", source.retention_days is not None), ("missing", source.missing == "erase"))
    return [reason for reason, given in asked if given]


def _within(uris: pa.Array, hashes: UInt64 | None) -> Any:
    if hashes is None:
        return np.ones(len(uris), bool)
    return np.isin(np.array([hash64(uri) for uri in uris.to_pylist()], np.uint64), hashes)


def _mask(values: pa.Array, absent: bool = False) -> Any:
    return pc.fill_null(values, absent).to_numpy(zero_copy_only=False)
