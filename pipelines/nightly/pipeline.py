"""nightly: everything a gallery needs every night, in order. Each step resumes where the night before stopped."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from facepipe import storage
from facepipe.curation.clusters import tables
from facepipe.erasure.foreign import describe_foreign
from facepipe.erasure.selection import Selection
from facepipe.errors import EvaluationError, GalleryBusyError, GalleryError, SourceError, StorageError
from facepipe.gallery import Gallery
from facepipe.gallery.commits.missing import TOO_MANY_MISSING
from facepipe.gallery.sources import SourceRegister
from facepipe.gallery.table import RUNS
from facepipe.sources import locate_source, open_source
from facepipe.storage.lease import hold_lease
from pipelines import cluster, compact, embed, erase, index
from pipelines.cluster import assign as cluster_assign
from pipelines.dedup import DedupConfig
from pipelines.dedup import incremental as dedup_new
from pipelines.embed.summary import EmbedSummary
from pipelines.erase import EraseSummary
from pipelines.index import IndexConfig
from pipelines.job import JobSummary, OnEmbed, OnLine, check_job
from pipelines.nightly.config import NightlyConfig, NightSource
from pipelines.nightly.preview import preview_night
from pipelines.runtime.run_record import attach_summary, record_calls
from pipelines.runtime.workspace import locate_reports


@dataclass
class NightSummary(JobSummary):
    """The figures of a night.

    Attributes:
        version: version of the table after the night.
        images: number of images read; `failed` counts those among them that failed.
        problems: what a step left undone although the night succeeded, such as a clustering that does not exist yet.
        failures: what needs attention although the other steps ran: a source that cannot be listed, or one that misses
            more images than it may.
        seconds: wall clock by step.
    """

    version: int = -1
    images: int = 0
    problems: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def run(
    config: NightlyConfig,
    *,
    dry_run: bool = False,
    on_progress: OnLine = lambda line: None,
    on_embed: OnEmbed = lambda summary: None,
) -> NightSummary:
    """Bring a gallery up to date: embed, index, assign, erase, dedup, compact. Run it again to resume after a crash.

    Images are erased before copies are looked for, so that no image is reported as a copy of an erased one.

    Args:
        config: settings of the job.
        dry_run: only count what a night would do; write nothing.
        on_progress: receives the name of each step, and its messages.
        on_embed: receives the running figures of the step `embed`.

    Returns:
        The figures of the night.

    Raises:
        ConfigError: if the config names no gallery or no source.
        GalleryBusyError: if another night is at work on the gallery.
        SourceError: if there is no gallery yet and no source has an image.
    """
    check_job(config.gallery, config.source)
    if dry_run:
        preview = preview_night(config, on_progress)
        return NightSummary(
            config.gallery, dry_run=True, version=preview.version, steps=preview.steps, failures=preview.failures
        )
    return _run_night(config, config.gallery, on_progress, on_embed)


@record_calls("nightly")
def _run_night(config: NightlyConfig, gallery: str, on_progress: OnLine, on_embed: OnEmbed) -> NightSummary:
    with hold_lease(storage.join(gallery, RUNS), "nightly job", on_progress):
        night = _Night(config, NightSummary(gallery), on_progress)
        attach_summary(night.summary)
        # Each step reads the table anew, and so sees what the steps before it committed.
        night.finish_erasures()
        for source in config.source:
            night.embed_source(source, on_embed)
        # Without a gallery no source had an image, and nothing else can be done.
        if not Gallery.exists(gallery):
            raise SourceError("; ".join([*night.summary.failures, *night.summary.problems]))
        # Erasures that are recorded during a step are finished after it, if the step has not done so.
        for step in (
            night.update_index,
            night.assign_clusters,
            night.erase_images,
            night.find_copies,
            night.compact_table,
        ):
            step()
            night.finish_erasures()
        night.summary.version = Gallery(gallery).version
        return night.summary


class _Night:
    """The steps of a night. Each can be repeated, and then does what is left of its work."""

    def __init__(self, config: NightlyConfig, summary: NightSummary, on_progress: OnLine):
        self.config = config
        self.summary = summary
        self.gallery = config.gallery
        self._on_progress = on_progress

    @contextmanager
    def _measure(self, step: str, source: str = "") -> Iterator[None]:
        """Report a step and add its wall clock. A source's name is printed, but kept out of the run's record."""
        self._on_progress(f"{step} {source}".rstrip())
        began = time.monotonic()
        try:
            yield
        finally:
            # Steps such as embed run once per source, and their times are added up.
            spent = self.summary.seconds.get(step, 0.0) + time.monotonic() - began
            self.summary.seconds[step] = round(spent, 3)

    def finish_erasures(self) -> None:
        """Finish erasures that a crash interrupted, or that were recorded while a step was running."""
        if not Gallery.exists(self.gallery) or not erase.list_unfinished(self.gallery):
            return
        with self._measure("erase"):
            finished = erase.resume(self.gallery, progress=self._on_progress)
        if finished.receipts:
            self.summary.add_step("erase unfinished", finished)
        self._note_foreign(finished)

    def _note_foreign(self, erased: EraseSummary) -> None:
        """Note files that hold erased data and are not ours to delete."""
        if erased.foreign:
            self.summary.failures.append(describe_foreign(erased.foreign))

    def embed_source(self, source: NightSource, on_embed: OnEmbed) -> None:
        """Embed new and changed images of a source, and mark those it no longer lists.

        A source that cannot be listed is noted as a failure, and the night continues without it.
        """
        name = source.title
        with self._measure("embed", name):
            try:
                # A source that cannot be opened is a failure in any case; one without images may not be.
                open_source(source.to_source())
            except SourceError as error:
                self.summary.failures.append(f"{name}: {error}")
                return
            try:
                embedded = embed.run(self.config.build_source_config(source), self.gallery, on_embed)
            except (SourceError, StorageError) as error:
                # An inbox, whose images come and go, may be empty. A source whose missing images are marked may not.
                may_be_empty = isinstance(error, SourceError) and source.missing == "keep"
                notes = self.summary.problems if may_be_empty else self.summary.failures
                notes.append(f"{name}: {error}")
                return
        for note in embedded.notes:
            self._on_progress(f"embed {embedded.source}: {note}")
        self.summary.add_step(f"embed {embedded.source}", embedded)
        self._add_counts(embedded.source, embedded)

    def _add_counts(self, name: str, embedded: EmbedSummary) -> None:
        """Add up images and failures over the sources, and note why missing images were left alone."""
        summary = self.summary
        # Too many missing images at once count as a failure, other reasons as a note.
        if embedded.missing_ignored:
            is_guarded = embedded.missing_ignored.endswith(TOO_MANY_MISSING)
            notes = summary.failures if is_guarded else summary.problems
            notes.append(f"{name}: missing images were left alone: {embedded.missing_ignored}")
        summary.images += embedded.images
        summary.failed += embedded.failed
        # The budget counts the images of all sources together.
        allowed = max(self.config.night.few_failed, self.config.night.max_failed * summary.images)
        summary.over_budget = summary.failed > allowed

    def update_index(self) -> None:
        """Bring the search index up to date; the work grows with what changed."""
        with self._measure("index"):
            updated = index.run(IndexConfig(self.config.index), self.gallery, on_progress=self._on_progress)
        self.summary.add_step("index", updated)

    def assign_clusters(self) -> None:
        """Assign new faces to the existing clusters, or make the first clusters if night.clusters is make."""
        if self.config.night.clusters == "no":
            return
        with self._measure("assign"):
            obstacle = _explain_no_clusters(self.gallery)
            if not obstacle:
                self.summary.add_step("assign", cluster_assign.run(self.gallery, progress=self._on_progress))
            elif self.config.night.clusters == "make":
                self._make_clusters()
            else:
                self.summary.problems.append(obstacle)

    def _make_clusters(self) -> None:
        config = cluster.ClusterConfig(self.config.cluster, self.config.graph)
        try:
            self.summary.add_step("cluster", cluster.run(config, self.gallery, self._on_progress))
        except GalleryBusyError:
            raise
        except GalleryError as error:  # no face yet, or too few faces to find the threshold from
            self.summary.problems.append(f"no clusters were made: {error}")

    def erase_images(self) -> None:
        """Erase images past their retention, and those missing from a source whose policy is erase."""
        with self._measure("erase"):
            # Only images that are missing from their source may be embedded again when it lists them.
            for name, selection in list_erasures(self.config, Gallery(self.gallery)):
                erased = erase.run(
                    selection,
                    self.gallery,
                    may_return=selection.missing,
                    wait=False,
                    progress=self._on_progress,
                )
                if erased.images or erased.receipts:
                    self.summary.add_step(f"erase {name}", erased)
                self._note_foreign(erased)
                if not erased.complete:
                    self.summary.problems.append(
                        f"the erasure {erased.request} ({name}) is recorded, and not complete: another run is writing"
                    )

    def find_copies(self) -> None:
        """Compare new images with all images."""
        if not self.config.night.dedup:
            return
        with self._measure("dedup"):
            copies = dedup_new.run(DedupConfig(self.config.dedup), self.gallery, self._on_progress)
        self.summary.add_step("dedup", copies)

    def compact_table(self) -> None:
        """Join small files of the table into large ones, if there are enough of them."""
        with self._measure("compact"):
            self.summary.add_step("compact", compact.run(self.config.compact, self.gallery))


def list_erasures(config: NightlyConfig, gallery: Gallery) -> list[tuple[str, Selection]]:
    """List what a night erases, with a name for each selection.

    Images past their retention do not come back. Missing ones may, if their source lists them again. A source that the
    gallery does not know has no images.
    """
    register = SourceRegister.read(gallery)
    erasures = []
    for source in config.source:
        known = register.find(locate_source(source.to_source()), source.name)
        if known is None:
            continue
        # Another source may have the same name: only what lies at the place of this one is its own.
        own = Selection(source=known.name, below=known.list_own_roots())
        if source.retention_days is not None:
            erasures.append((f"retention {known.name}", replace(own, older_than_days=source.retention_days)))
        if source.missing == "erase":
            erasures.append((f"missing {known.name}", replace(own, missing=True)))
    return erasures


def _explain_no_clusters(gallery: str) -> str:
    """Return why new faces cannot be assigned, or "" if they can.

    The night asks this first, so that no run of `assign` is recorded as failed.
    """
    table = Gallery(gallery)
    if os.path.isdir(os.path.join(locate_reports(table), f"{cluster.NAME}.old")):  # a run stopped between two renames
        return ""
    try:
        tables.read_cluster_table(table.path, tables.CLUSTERS, ["cluster"])
    except EvaluationError as error:
        return str(error)
    return ""
