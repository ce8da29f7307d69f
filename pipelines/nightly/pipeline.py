"""nightly: everything a gallery needs every night, in order. Each step resumes where the night before stopped."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date

from facepipe import storage
from facepipe.erasure.foreign import describe_foreign
from facepipe.erasure.purges import describe_overdue
from facepipe.errors import (
    ErasureLimitError,
    GalleryBusyError,
    GalleryError,
    SourceError,
    StorageError,
)
from facepipe.gallery import Gallery
from facepipe.gallery.commits.missing import TOO_MANY_MISSING
from facepipe.gallery.table import RUNS
from facepipe.sources import open_source
from facepipe.storage.lease import hold_lease
from pipelines import cluster, compact, embed, erase, index
from pipelines.cluster import assign as cluster_assign
from pipelines.dedup import DedupConfig
from pipelines.dedup import incremental as dedup_new
from pipelines.embed.summary import EmbedSummary
from pipelines.erase import EraseSummary
from pipelines.index import IndexConfig
from pipelines.job import JobSummary, OnEmbed, OnLine, check_job
from pipelines.nightly.clusters import explain_no_clusters
from pipelines.nightly.config import NightlyConfig, NightSource, name_own_setting
from pipelines.nightly.guard import NightGuard, PlannedErasure, is_dated, list_dated_sources, plan_erasures
from pipelines.nightly.preview import preview_night
from pipelines.runtime.run_record import attach_summary, record_calls


@dataclass(frozen=True)
class NightConfirmation:
    """What somebody has confirmed after a night refused it.

    Attributes:
        images: numbers of images: an erasure of exactly so many is not refused.
        clock_date: date of this machine's clock (UTC), if it is right although the gallery holds later times.
    """

    images: tuple[int, ...] = ()
    clock_date: date | None = None


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
    confirmation: NightConfirmation | None = None,
    on_progress: OnLine = lambda line: None,
    on_embed: OnEmbed = lambda summary: None,
) -> NightSummary:
    """Bring a gallery up to date: embed, index, assign, erase, dedup, compact. Run it again to resume after a crash.

    Images are erased before copies are looked for, so that no image is reported as a copy of an erased one.

    Args:
        config: settings of the job.
        dry_run: only count what a night would do; write nothing.
        confirmation: what somebody has confirmed after an earlier night refused it.
        on_progress: receives the name of each step, and its messages.
        on_embed: receives the running figures of the step `embed`.

    Returns:
        The figures of the night.

    Raises:
        ConfigError: if the config names no gallery or no source.
        GalleryBusyError: if another night is at work on the gallery.
        SourceError: if there is no gallery yet and no source has an image.
        ModelError: if a model cannot be used.
        ContractError: if the gallery was made with other models.
    """
    check_job(config.gallery, config.source)
    if dry_run:
        preview = preview_night(config, on_progress)
        return NightSummary(
            config.gallery,
            dry_run=True,
            images=preview.images,
            failed=preview.failed,
            over_budget=config.is_over_budget(preview.failed, preview.images),
            version=preview.version,
            steps=preview.steps,
            problems=preview.problems,
            failures=preview.failures,
        )
    return _run_night(config, config.gallery, confirmation or NightConfirmation(), on_progress, on_embed)


@record_calls("nightly")
def _run_night(
    config: NightlyConfig, gallery: str, confirmation: NightConfirmation, on_progress: OnLine, on_embed: OnEmbed
) -> NightSummary:
    with hold_lease(storage.join(gallery, RUNS), "nightly job", on_progress) as lease:
        guard = NightGuard(gallery, confirmation.images, confirmation.clock_date)
        night = _Night(config, NightSummary(gallery), guard, on_progress)
        attach_summary(night.summary)
        night.check_clock()
        # Each step reads the table anew, and so sees what the steps before it committed.
        night.finish_erasures()
        for source in config.source:
            # A later attempt of this night may have taken over while this one was asleep.
            lease.check()
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
            lease.check()
            step()
            night.finish_erasures()
        night.check_purges()
        night.summary.version = Gallery(gallery).version
        return night.summary


class _Night:
    """The steps of a night. Each can be repeated, and then does what is left of its work."""

    def __init__(self, config: NightlyConfig, summary: NightSummary, guard: NightGuard, on_progress: OnLine):
        self.config = config
        self.summary = summary
        self.gallery = config.gallery
        self.guard = guard
        self.clock_problem = ""
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

    def check_purges(self) -> None:
        """Note hidden rows that are on disk although their time is over. The step `compact` removes them."""
        self.summary.failures += describe_overdue(self.gallery)

    def check_clock(self) -> None:
        """Note if the clock is wrong. Images with a retention are then neither embedded nor erased for their age."""
        if any(is_dated(source) for source in self.config.source) and Gallery.exists(self.gallery):
            self.clock_problem = self.guard.check_clock()
        if self.clock_problem:
            self.summary.failures.append(f"no image with a retention was embedded or erased: {self.clock_problem}")

    def embed_source(self, source: NightSource, on_embed: OnEmbed) -> None:
        """Embed new and changed images of a source, and mark those it no longer lists.

        A source that cannot be listed is noted as a failure, and the night continues without it.
        """
        name = source.title
        if is_dated(source) and self.clock_problem:
            return
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
            reason = name_own_setting(embedded.missing_ignored)
            notes.append(f"{name}: missing images were left alone: {reason}")
        summary.images += embedded.images
        summary.failed += embedded.failed
        summary.over_budget = self.config.is_over_budget(summary.failed, summary.images)

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
            obstacle = explain_no_clusters(self.gallery)
            if not obstacle:
                rules = self.config.cluster
                assigned = cluster_assign.run(self.gallery, rules.one_photo, self._on_progress, rules)
                self.summary.add_step("assign", assigned)
                if assigned.advice:
                    self.summary.problems.append(assigned.advice)
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
            for planned in plan_erasures(self.config, Gallery(self.gallery)):
                if planned.selection.older_than_days is None or not self.clock_problem:
                    self._erase_planned(planned)

    def _erase_planned(self, planned: PlannedErasure) -> None:
        """Erase images for one reason, unless they are more than a night may erase."""
        selection = planned.selection
        limit = self.guard.get_limit(planned)
        try:
            # Only images that are missing from their source may be embedded again when it lists them.
            erased = erase.run(
                selection,
                self.gallery,
                may_return=selection.missing,
                wait=False,
                limit=limit,
                purge_days=self.config.night.purge_days,
                progress=self._on_progress,
            )
        except ErasureLimitError as error:
            self.summary.failures.append(f"{planned.name}: {error}")
            return
        if erased.images:
            self.guard.note_erasure(planned, erased.rows)
        if erased.images or erased.receipts:
            self.summary.add_step(f"erase {planned.name}", erased)
        self.summary.failures += [f"{planned.name}: {doubt}" for doubt in erased.doubts]
        self._note_foreign(erased)
        if not erased.complete:
            self.summary.problems.append(
                f"the erasure {erased.request} ({planned.name}) is recorded, and not complete: another run is writing"
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
            dated = list_dated_sources(self.config, Gallery(self.gallery))
            self.summary.add_step("compact", compact.run(self.config.compact, self.gallery, dated=dated))
