"""Dry run of a night: only listings and the table are read, and nothing is written."""

from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from facepipe.erasure import pending
from facepipe.erasure.clock import read_clock
from facepipe.erasure.limits import explain_excess
from facepipe.errors import SourceError, StorageError
from facepipe.gallery import Gallery
from facepipe.gallery.commits.missing import MissingGuard, describe_broken
from facepipe.gallery.commits.unlisted import ListingFigures
from facepipe.gallery.maintenance.compact import plan_compaction
from facepipe.hashing import hash64
from facepipe.moves.settle import SettledSource, settle_source
from facepipe.sources import open_source
from facepipe.sources.item import WatchedSource
from facepipe.types import Bool, UInt64
from pipelines.dedup.incremental import count_new_images
from pipelines.embed.checks import require_usable
from pipelines.job import count_indexed, load_known, open_gallery
from pipelines.nightly.clusters import count_clusters, explain_no_clusters
from pipelines.nightly.config import NightlyConfig, NightSource, name_own_setting
from pipelines.nightly.guard import MISSING, RETENTION, NightGuard, is_dated, plan_source_erasures
from pipelines.runtime.listing import VERDICTS, count_listed

_BATCH_ROWS = 65536
_COLUMNS = ("uri", "source", "face_index", "face_id", "ingested_at", "missing_since")


@dataclass
class NightPreview:
    """What a night would do.

    Attributes:
        version: version of the table, -1 if there is no gallery yet.
        steps: counts by step.
        images: images that would be read.
        failed: those among them that cannot be read, because their place cannot be listed.
        problems: what would be left undone although the night succeeds.
        failures: what would make the exit code 1.
    """

    version: int = -1
    steps: dict[str, Any] = field(default_factory=dict)
    images: int = 0
    failed: int = 0
    problems: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Unlisted:
    """Images of a source that its listing does not name.

    Attributes:
        uris: sorted hashes of their uris; None means all images of the source.
        is_marked: whether the night would mark them as missing.
    """

    uris: UInt64 | None = None
    is_marked: bool = False


def preview_night(config: NightlyConfig, on_progress: Callable[[str], None] = lambda line: None) -> NightPreview:
    """Count what a night would do, and refuse what a night refuses.

    Changed files are counted by their fingerprints. Whether they hold other images is known only after reading them.

    Args:
        config: settings of the job.
        on_progress: receives a line per source.

    Raises:
        ConfigError: a setting is wrong.
        ModelError: a model cannot be used.
        GalleryError: the gallery was made with other models, or its folder holds something else.
        SourceError: there is no gallery yet, and no source has an image.
    """
    # A night that has no image to embed needs no models.
    if any(_has_image(source) for source in config.source if not _is_held_back(config, source)):
        require_usable(config.build_source_config(config.source[0]), config.gallery)
    preview = NightPreview()
    gallery = open_gallery(config.gallery)
    if gallery:
        preview.version = gallery.version
        preview.steps["erase unfinished"] = {"erasures": len(pending.read_unfinished(gallery.path))}
    for source in config.source:
        on_progress(f"listing {source.title}")
        preview_source(config, source, gallery, preview)
    if gallery is None and not preview.images:
        raise SourceError("; ".join([*preview.failures, *preview.problems]) or "no source has an image")
    _preview_gallery_steps(config, gallery, preview)
    return preview


def _is_held_back(config: NightlyConfig, source: NightSource) -> bool:
    """Tell whether the images of a source are not embedded, because the time they would get may be wrong."""
    if not is_dated(source) or not Gallery.exists(config.gallery):
        return False
    ignored_until = NightGuard(config.gallery).ignored_until
    return bool(read_clock(Gallery(config.gallery), ignored_until=ignored_until, writes=False).problem)


def _has_image(source: NightSource) -> bool:
    """Tell whether a source can be opened and lists an image; nothing beyond the first is listed."""
    try:
        return open_source(source.to_source()).has_items()
    except (SourceError, StorageError):
        return False


def preview_source(config: NightlyConfig, source: NightSource, gallery: Gallery | None, preview: NightPreview) -> None:
    """Count what a night would do with the images of a source: embed, mark, and erase them."""
    settled = settle_source(gallery, source.to_source())
    unlisted = _list_source(config, source, settled, gallery, preview)
    if gallery:
        _count_missing_and_erased(config, gallery, source, settled, unlisted, preview)


def _preview_gallery_steps(config: NightlyConfig, gallery: Gallery | None, preview: NightPreview) -> None:
    """Count what the steps after embedding would do. What images to come bring is known only after reading them."""
    to_come = {"images_to_come": preview.images}

    # The index takes the faces that it lacks.
    indexed = count_indexed(gallery) if gallery else {"faces": 0, "indexed": 0}
    to_add = max(0, indexed["faces"] - indexed["indexed"])
    preview.steps["index"] = {**indexed, "to_add": to_add, **to_come}

    # New faces go to the clusters that there are, or into the first ones.
    obstacle = explain_no_clusters(gallery.path) if gallery else "no clusters"
    if config.night.clusters != "no" and not obstacle and gallery:
        preview.steps["assign"] = {"clusters": count_clusters(gallery.path), **to_come}
    elif config.night.clusters == "make":
        preview.steps["cluster"] = {"faces": indexed["faces"], **to_come}
    elif config.night.clusters == "assign" and gallery:
        preview.problems.append(obstacle)

    # Images since the last comparison are compared with all others.
    if config.night.dedup:
        preview.steps["dedup"] = {"to_compare": count_new_images(gallery) if gallery else 0, **to_come}
    groups = plan_compaction(gallery, config.compact) if gallery else []
    preview.steps["compact"] = {"joined": sum(map(len, groups)), "into": len(groups)}


def _list_source(
    config: NightlyConfig,
    source: NightSource,
    settled: SettledSource,
    gallery: Gallery | None,
    preview: NightPreview,
) -> _Unlisted:
    """List a source as a night does, count its images, and note what would be a failure."""
    name = settled.name
    is_watched = source.missing != "keep"
    try:
        # Count the listing by what `embed` would do, and collect the images of the source that it does not name.
        listing = WatchedSource(open_source(settled.config))
    except SourceError as error:
        preview.failures.append(f"{name}: {error}")
        return _Unlisted()
    with closing(load_known(gallery, settled.rows)) as known:
        try:
            counts = count_listed(listing, known)
        except (SourceError, StorageError) as error:
            preview.failures.append(f"{name}: {error}")
            return _Unlisted()
        missing, _ = known.count_unlisted()
        uris = np.concatenate([np.empty(0, np.uint64), *(keys for keys, _, _ in known.read_unlisted())])
        figures = ListingFigures(
            listed=known.listed_count,
            held=known.source_count,
            unlisted=missing,
            broken=listing.broken_count,
            broken_place=listing.broken_place,
            has_unlisted=len(uris) > 0,
            has_contents=False,
        )
    preview.steps[f"embed {name}"] = counts
    preview.images += counts["new"] + counts["changed"]
    preview.failed += listing.broken_count

    # An empty listing of a watched source is a fault of the source, not the deletion of all its images.
    if not any(counts[verdict] for verdict in VERDICTS):
        notes = preview.failures if is_watched else preview.problems
        notes.append(f"{name}: no image in {source.uri!r}")
        return _Unlisted()

    # No image is marked if too many are missing, or if a part of the source could not be listed. Missing images that
    # have moved are told by their content, which a dry run does not read.
    refusal = MissingGuard(settled.rows, figures, config.night.missing_at_most).explain_refusal(missing)
    if is_watched and refusal and not listing.broken_count:
        reason = name_own_setting(refusal)
        preview.failures.append(f"{name}: {reason}: they would be left alone, unless they have moved")
    if is_watched and listing.broken_count:
        preview.problems.append(f"{name}: missing images would be left alone: {describe_broken(figures)}")
    return _Unlisted(np.sort(uris), is_marked=is_watched and not refusal)


def _count_missing_and_erased(
    config: NightlyConfig,
    gallery: Gallery,
    source: NightSource,
    settled: SettledSource,
    unlisted: _Unlisted,
    preview: NightPreview,
) -> None:
    """Count the images that would be marked as missing, and those that would be erased for either reason."""
    marked = 0
    planned_erasures = plan_source_erasures(config, source, settled.rows.source, settled.register)
    reasons = {planned.reason: planned for planned in planned_erasures}
    erased = {reason: Counter[str](images=0, faces=0, rows=0) for reason in reasons}
    doubted = 0
    cutoffs = _find_cutoffs(gallery, source, preview)
    for rows in gallery.batches(list(_COLUMNS), ds.field("source") == settled.name, rows=_BATCH_ROWS):
        batch = rows.filter(pa.array(settled.rows.contains(rows)))
        # One row per image, and one row per face.
        is_image = _to_mask(pc.equal(batch["face_index"], 0), when_null=True)
        is_face = _to_mask(pc.is_valid(batch["face_id"]))

        # Missing images: those marked tonight, and those that an earlier night marked.
        is_unlisted = _is_among(batch["uri"], unlisted.uris)
        was_missing = _to_mask(pc.is_valid(batch["missing_since"]))
        is_new = is_unlisted & ~was_missing & unlisted.is_marked
        marked += int((is_new & is_image).sum())

        # Images past their time are erased for that reason, even if they are missing as well.
        is_old = _to_mask(pc.less(batch["ingested_at"], cutoffs.believed)) & (RETENTION in erased)
        is_missing = (is_new | (is_unlisted & was_missing)) & ~is_old
        for reason, mask in ((RETENTION, is_old), (MISSING, is_missing)):
            if reason in erased:
                masks = {"images": mask & is_image, "faces": mask & is_face, "rows": mask}
                erased[reason].update({name: int(chosen.sum()) for name, chosen in masks.items()})
        doubted += int((_to_mask(pc.less(batch["ingested_at"], cutoffs.claimed)) & ~is_old & is_image).sum())
    preview.steps.setdefault(f"embed {settled.name}", {})["missing"] = marked
    if doubted:
        preview.failures.append(f"{settled.name}: {doubted} images would stay, because the clock may be wrong")
    guard = NightGuard(gallery.path)
    for reason, planned in reasons.items():
        counts = erased[reason]
        excess = explain_excess(gallery, counts["images"], counts["rows"], guard.get_limit(planned))
        if excess:
            preview.failures.append(f"{planned.name}: {excess}")
            counts.clear()
        preview.steps[f"erase {planned.name}"] = {"images": counts["images"], "faces": counts["faces"]}


@dataclass(frozen=True)
class _Cutoffs:
    """Times before which images are past their retention: by this machine's clock, and as far as it is believed."""

    claimed: pa.Scalar
    believed: pa.Scalar


def _find_cutoffs(gallery: Gallery, source: NightSource, preview: NightPreview) -> _Cutoffs:
    """Find the times before which images are past their retention, and note what speaks against the clock."""
    kind = pa.timestamp("us", "UTC")
    if source.retention_days is None:
        return _Cutoffs(pa.scalar(None, kind), pa.scalar(None, kind))
    clock = read_clock(gallery, ignored_until=NightGuard(gallery.path).ignored_until, writes=False)
    if clock.problem:
        preview.failures.append(f"no image with a retention would be embedded or erased: {clock.problem}")
    claimed = clock.claimed - timedelta(days=source.retention_days)
    return _Cutoffs(pa.scalar(claimed, kind), pa.scalar(clock.find_time_before(source.retention_days), kind))


def _is_among(uris: pa.Array, hashes: UInt64 | None) -> Bool:
    if hashes is None:
        return np.ones(len(uris), bool)
    return np.isin(np.array([hash64(uri) for uri in uris.to_pylist()], np.uint64), hashes)


def _to_mask(values: pa.Array, when_null: bool = False) -> Bool:
    mask: Bool = pc.fill_null(values, when_null).to_numpy(zero_copy_only=False)
    return mask
