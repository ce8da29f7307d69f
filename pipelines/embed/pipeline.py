"""Embed a source into a gallery, in this process, in a local pool of processes, or on Ray."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import numpy as np

import facepipe
from facepipe import storage
from facepipe.erasure.takeup import RequestTaker
from facepipe.errors import AccountingError, GalleryBusyError, SourceError, StorageError
from facepipe.gallery import Contract, Gallery, suppressed
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.missing import MissingGuard, mark_missing
from facepipe.gallery.commits.parts import PartRecord
from facepipe.gallery.commits.unlisted import ListingFigures, read_figures, write_listing
from facepipe.gallery.failures import RetryRule
from facepipe.gallery.file_counts import refresh_counts
from facepipe.gallery.known import KnownImages
from facepipe.gallery.sources import SOURCES_PROPERTY, SourceRows, write_source
from facepipe.gallery.table import RUNS
from facepipe.given.lists import copy_lists, digest_lists, read_lists
from facepipe.given.source import GivenFacesSource, require_named
from facepipe.given.table import GivenFaces
from facepipe.hashing import hash64, hash64_each
from facepipe.models.zoo.registry import GIVEN
from facepipe.moves.moved_images import MoveCounts, MovedImages
from facepipe.moves.settle import SettledSource, describe_settling, register_source, settle_source
from facepipe.observe.gpu_usage import GpuSampler
from facepipe.observe.runs import new_run_id
from facepipe.sources import Source, SourceConfig, open_source
from facepipe.sources.blocks import Block, BlockSize, add_digests, cut_blocks
from facepipe.sources.extensions import is_web_url
from facepipe.sources.folder_times import FolderTimes
from facepipe.sources.item import WatchedSource
from facepipe.stages import Align, Detect
from facepipe.stages.find_moved import FindMoved
from facepipe.stages.given import DetectGiven, LabelGiven
from facepipe.stages.suppress import Suppress
from facepipe.storage.lease import Lease, hold_lease
from pipelines.embed.aligned_crops import suggest_aligned
from pipelines.embed.checks import check_settings, load_models
from pipelines.embed.config import EmbedConfig, RunConfig
from pipelines.embed.summary import EmbedSummary
from pipelines.runtime import crash_marks
from pipelines.runtime.plan import WorkerGroup, WorkerPlan, detect_local_resources, make_plan
from pipelines.runtime.run_record import attach_summary, get_current_run, record_calls
from pipelines.runtime.runners import inline, local, ray
from pipelines.runtime.worker import WorkerJob

__all__ = ["EmbedConfig", "EmbedSummary", "RunConfig", "run"]

_GIVEN = "given"  # folder of a run for the faces that lists give
_LISTING = "listing"  # folder of a run for what its listing finds out
_RETRIED = "retried"  # file of a run with the images that are listed once more
_COMMIT_PAUSE = 20  # minimum time between commits, in durations of a commit
# Time between two looks for the end of the listing.
_TOTAL_SECONDS = 2.0
# New labels and fingerprints that wait for a commit at most: they lie in memory.
_MAX_PENDING_CHANGES = 500_000

Progress = Callable[[EmbedSummary], None]
Blocks = Callable[[], Iterator[Block]]


@dataclass(frozen=True)
class EmbedListing:
    """Blocks of a source that a gallery version does not hold. Each call lists again, on any machine.

    Attributes:
        source: the source
        rows: which rows of the gallery are of the source
        gallery: folder or URL of the gallery
        version: version of the gallery's table
        size: number of images per block
        folder: folder of the run for what the listing finds out
        marks: whether missing images are marked
        only: file with sorted hashes of uris; the other images are passed over. Empty: all images
        secret: secret of the hashes of erased images, for a machine without the key
        retry: decides which failed images are tried again
        given: folder with the faces that lists give; empty without lists
    """

    source: SourceConfig
    rows: SourceRows
    gallery: str
    version: int
    size: BlockSize
    folder: str
    marks: bool
    only: str = ""
    secret: bytes | None = field(default=None, repr=False)
    retry: RetryRule = field(default_factory=RetryRule)
    given: str = ""

    def __call__(self) -> Iterator[Block]:
        """List the images in blocks."""
        times = self._load_times()
        source = WatchedSource(self._open_source(times))
        only = np.frombuffer(storage.read(self.only), "<u8") if self.only else None
        # Erased images count as known, so that they are not embedded again.
        erased = suppressed.read_uris(self.gallery, self.secret)
        known = KnownImages(Gallery(self.gallery, self.version), self.rows, erased, only, self.retry, times)
        try:
            # If the gallery has images of the source, some of the listed ones may be those under other uris. Which uris
            # are given up is known when everything is listed.
            for block in cut_blocks(
                source,
                known,
                self.size,
                # Whether a list of faces fits the source is known when everything is listed.
                list_first=known.may_have_moved or bool(self.given),
                on_listed=lambda is_read: self._write_figures(source, known, times, is_read=is_read),
                find_erased=known.find_erased,
            ):
                # Images in folders that were passed over count with the last block.
                passed = times.passed_images if times is not None and block.last else 0
                yield replace(block, skipped=block.skipped + passed)
        finally:
            known.close()

    def _open_source(self, times: FolderTimes | None) -> Source:
        """Open the source, with the faces that lists give."""
        source = open_source(self.source)
        if times is not None:
            source.pass_over(times)
        if not self.given:
            return source
        no_detection = "they get no face. To find their faces add --set source.boxes_unlisted=detect"
        detection = "the detector finds their faces. If they are to have none, add --set source.boxes_unlisted=none"
        return GivenFacesSource(
            source,
            GivenFaces(self.given),
            takes_labels=self.source.identity in ("auto", "label"),
            prefix=self.source.label_prefix or "",
            other_faces=detection if self.source.boxes_unlisted == "detect" else no_detection,
        )

    def _load_times(self) -> FolderTimes | None:
        """Load the times of the source's folders; None if every listing looks at every file."""
        every = self.source.full_listing_every
        # A list of faces may have changed although no folder has.
        if every == 1 or self.only or self.given:
            return None
        place = self.rows.source
        name = f"folders-{hash64(place.name, place.root, place.glob):016x}.parquet"
        # What is listed, and with which labels, depends on the settings.
        settings = repr(replace(self.source, full_listing_every=1))
        return FolderTimes(storage.join(self.gallery, RUNS, name), f"{hash64(settings):016x}", every)

    def _write_figures(
        self, source: WatchedSource, known: KnownImages, times: FolderTimes | None, *, is_read: bool
    ) -> None:
        """Write what the listing found out, for the workers and for the driver.

        Args:
            source: the source, listed to its end.
            known: what the gallery has.
            times: times of its folders.
            is_read: whether any image is read, which may have moved.
        """
        # If a part of the source could not be listed, nobody knows what is there.
        is_complete = source.broken_count == 0
        missing, unlisted = known.count_unlisted() if is_complete else (0, 0)
        has_contents = any(len(contents) for contents in known.read_moved_contents(with_unlisted=is_complete))
        figures = ListingFigures(
            listed=known.listed_count + (times.passed_images if times is not None else 0),
            held=known.source_count,
            unlisted=missing,
            broken=source.broken_count,
            broken_place=source.broken_place,
            has_unlisted=unlisted > 0 and (is_read or self.marks),
            has_contents=has_contents and is_read,
            gives_labels=source.gives_labels,
        )
        contents = known.read_moved_contents(with_unlisted=is_complete)
        write_listing(self.folder, figures, known.read_unlisted(), contents)
        if times is not None and is_complete:
            times.save()


@record_calls("embed")
def run(config: EmbedConfig, gallery: str, progress: Progress = lambda summary: None) -> EmbedSummary:
    """Embed a source into a gallery. The gallery is created if there is none.

    A failed image is recorded with a status and a reason; it does not stop the run.

    Args:
        config: settings.
        gallery: folder or URL of the gallery.
        progress: called with the summary after each finished block.

    Raises:
        SourceError: The source is missing or holds no image.
        ContractError: The gallery was made with other models.
        ModelError: A model cannot be used. No gallery is created then.
        ConfigError: The settings are wrong. No gallery is created then.
        AccountingError: An image was lost.
    """
    # Find what is wrong with settings, source and models before a gallery is created.
    config = make_paths_absolute(config)
    contract = check_settings(config)
    source = open_source(config.source)
    if not source.has_items():
        raise SourceError(_describe_empty_source(config.source.uri, source))
    # With other models, or with a corrected file, a new gallery has another contract.
    if not Gallery.exists(gallery):
        Gallery.require_free(gallery)  # before the lease leaves a file in a folder of somebody else
        load_models(config)
    record = get_current_run()
    run_id = record.id if record else new_run_id()
    with _read_given_faces(config.source) as given, hold_lease(gallery) as lease:
        opened = _open_gallery(config.source, gallery, contract, run_id, lease)
        table = opened.gallery
        settled = opened.settled
        run = _EmbedRun(replace(config, source=settled.config), table, settled, run_id, lease)
        if given:
            run.take_given_faces(given)
        summary = run.run(progress)
        # Last of all, so that they never take the room that the rest needs: without these counts `info` is slower.
        with suppress(StorageError):
            refresh_counts(Gallery(gallery))
        summary.relocated = opened.relocated
        summary.notes = [*describe_settling(settled, opened.relocated), *summary.notes]
        if opened.other_lists and summary.skipped:
            summary.notes.append(
                f"{summary.skipped} images were in the gallery already and keep their faces, {opened.other_lists}: "
                "embed into a new gallery to take all faces from the list"
            )
        if not summary.skipped:  # a gallery that is growing has been told
            summary.notes += suggest_aligned(Gallery(gallery))
        return summary


@contextmanager
def _read_given_faces(source: SourceConfig) -> Iterator[str]:
    """Read the lists of faces of a source, and yield the folder of what they say; an empty text without lists.

    Raises:
        SourceError: The lists cannot be used, or name no image of the source.
    """
    if not source.lists_of_faces:
        yield ""
        return
    with read_lists(source.lists_of_faces) as folder:
        require_named(open_source(source), GivenFaces(folder))
        yield folder


@dataclass(frozen=True)
class _OpenedGallery:
    """A gallery as it is before a run.

    Attributes:
        gallery: the gallery
        settled: what it knows of the source
        relocated: how many images have new uris, because the source is at another place
        other_lists: what is known of the lists that gave faces before, if they are not those of this run
    """

    gallery: Gallery
    settled: SettledSource
    relocated: int = 0
    other_lists: str = ""


def _open_gallery(source: SourceConfig, path: str, contract: Contract, run: str, lease: Lease) -> _OpenedGallery:
    """Open or create the gallery, and find out what it knows of the source."""
    lists = digest_lists(source.lists_of_faces) if source.lists_of_faces else ""
    if not Gallery.exists(path):
        settled = settle_source(None, source).with_boxes(lists)
        properties = {SOURCES_PROPERTY: settled.register.to_json()}
        return _OpenedGallery(Gallery.open_or_create(path, contract, properties), settled)
    gallery = Gallery.open_or_create(path, contract)
    settled = settle_source(gallery, source)
    other_lists = ""
    if lists and lists != settled.rows.source.boxes:
        is_known = bool(settled.rows.source.boxes)
        other_lists = "which another list gave" if is_known else "which this list may not have given"
        settled = settled.with_boxes(lists)
    gallery, relocated = register_source(gallery, settled, run, lease)
    return _OpenedGallery(gallery, settled, relocated, other_lists)


def _describe_empty_source(uri: str, source: Source) -> str:
    """Describe that a source holds no image, and what it holds instead."""
    parts = [f"no image in {uri!r} ({source.ignored} other files were ignored)", *source.notes]
    if storage.is_remote(uri) or os.path.isdir(uri):
        parts.append("if it holds Parquet files, add --set source.kind=parquet")
    return "; ".join(parts)


class _EmbedRun:
    """A run on a gallery whose lease it holds."""

    def __init__(self, config: EmbedConfig, gallery: Gallery, settled: SettledSource, run: str, lease: Lease):
        self._config = config
        self._gallery = gallery
        self._settled = settled
        self._rows = settled.rows
        self._lease = lease
        self._id = run
        self._runs_folder = storage.join(gallery.path, RUNS)
        self._marks_folder = storage.join(gallery.path, RUNS, self._id)
        self._given = ""

    def take_given_faces(self, folder: str) -> None:
        """Take the faces of lists into the run's folder, where workers on other machines find them.

        Args:
            folder: folder that `read_lists` made.
        """
        self._given = storage.join(self._marks_folder, _GIVEN)
        copy_lists(folder, self._given)

    def run(self, progress: Progress) -> EmbedSummary:
        """Embed the source, and return the summary."""
        record = get_current_run()
        if record:
            record.set_versions(before=self._gallery.version)
            record.save()  # there may have been no gallery when the run began
        # The lease guarantees that no other run is going on.
        crash_marks.inherit_crash_marks(self._runs_folder, self._id, self._lease.renew)
        run = self._config.run
        models = self._config.gpu_models
        plan = make_plan(detect_local_resources(), run.workers, "fused", models, run.gpus_per_worker)
        listing = EmbedListing(
            self._config.source,
            self._rows,
            self._gallery.path,
            self._gallery.version,
            run.choose_block_size(plan),
            storage.join(self._marks_folder, _LISTING),
            self._config.missing.policy == "mark",
            secret=suppressed.read_secret(),
            retry=self._config.make_retry_rule(),
            given=self._given,
        )
        # The plan is made for this machine first. On a cluster it is made again for the cluster's resources.
        runner, blocks = _choose_runner(run, listing)
        is_finished = False
        try:
            if runner == "ray":
                plan = make_plan(ray.start(), run.workers, run.layout, models, run.gpus_per_worker)
                # A worker without the folder would take every image for one that cannot be read. A list is read here.
                uri = self._config.source.uri
                if os.path.isdir(uri):
                    ray.require_visible(uri, "the source")
                plan = run.limit_workers(plan)
                listing = replace(listing, size=run.choose_block_size(plan))
                blocks = listing
            summary = self._process(runner, listing, blocks, plan, progress)
            is_finished = True
            return summary
        finally:
            if runner == "ray":
                ray.stop()
            # Marks that stay cost little, and must not hide why the run ended.
            with suppress(StorageError, GalleryBusyError):
                inherited = "" if is_finished else self._id
                crash_marks.delete_crash_marks(self._runs_folder, inherited=inherited, claim=self._lease.renew)

    def _process(
        self, runner: str, listing: EmbedListing, blocks: Blocks, plan: WorkerPlan, progress: Progress
    ) -> EmbedSummary:
        """Run the workers, commit what they write, and mark missing images."""
        workers = 1 if runner == "inline" else plan.workers
        summary = EmbedSummary(self._id, runner, workers, source=self._rows.source.name)
        attach_summary(summary)
        commit = Committer(self._gallery, self._id, self._lease)
        # Requests are taken up from the first record on: the listing has then read what it reads of the table.
        with RequestTaker(commit, self._lease) as taker:
            with _measure_gpus(summary, plan):
                counts, unread = self._run_once(listing, blocks, plan, taker, summary, progress)
                # What was replaced while it was read, or gave its rows up too early, is listed once more.
                again = [*counts.unresolved, *unread]
                if again:
                    self._retry(listing, again, plan, taker, summary)
            figures = read_figures(listing.folder)
            if self._config.missing.policy == "mark":
                self._mark_missing(listing.folder, figures, figures.unlisted - counts.vanished, commit, summary)
        summary.version = Gallery(self._gallery.path).version
        return summary

    def _run_once(
        self,
        listing: EmbedListing,
        blocks: Blocks,
        plan: WorkerPlan,
        taker: RequestTaker,
        summary: EmbedSummary,
        progress: Progress,
    ) -> tuple[MoveCounts, list[str]]:
        """Run the workers over a listing, and commit what they write.

        Args:
            listing: the listing.
            blocks: its blocks.
            plan: the workers.
            taker: takes up erase requests, and commits.
            summary: counts the images.
            progress: called with the summary after each finished block.

        Returns:
            What became of moved images, and the uris of images whose containers were replaced meanwhile.
        """
        # Only the last group of the chain writes parts.
        jobs = [self._make_job(group, listing.folder, writes=group is plan.groups[-1]) for group in plan.groups]
        with MovedImages(self._gallery, self._rows, f"{self._id}-{taker.committer.commits}") as moved:
            records = taker.follow(_run_workers(summary, blocks, jobs, plan))
            batches = RecordBatches(taker, summary, moved, listing.folder, self._config.run.commit_seconds)
            batches.commit_all(records, progress)
            return batches.counts, batches.unread

    def _retry(
        self, listing: EmbedListing, uris: list[str], plan: WorkerPlan, taker: RequestTaker, summary: EmbedSummary
    ) -> None:
        """List once more, and read only some images."""
        gallery = Gallery(self._gallery.path)
        only = storage.join(self._marks_folder, _RETRIED)
        storage.write(only, np.unique(hash64_each(uris)).astype("<u8").tobytes())
        folder = storage.join(self._marks_folder, f"{_LISTING}-again")
        # What failed in this run is not tried a third time.
        rule = RetryRule(self._config.describe_attempt())
        listing = replace(listing, version=gallery.version, folder=folder, only=only, retry=rule)
        again = EmbedSummary(self._id, summary.runner, summary.workers)
        self._run_once(listing, listing, plan, taker, again, lambda figures: None)
        summary.add_retried(again)

    def _mark_missing(
        self, folder: str, figures: ListingFigures, missing: int, commit: Committer, summary: EmbedSummary
    ) -> None:
        """Mark what was not listed, unless it is too much, and note how many images the source listed."""
        at_most = self._config.missing.at_most
        refusal = MissingGuard(self._rows, figures, at_most).explain_refusal(missing)
        if refusal:
            summary.missing_ignored = refusal
            return
        if missing:
            summary.missing = mark_missing(self._gallery, self._rows, folder, figures, commit)
        source = self._rows.source.add_listing(figures.listed, at_most, datetime.now(UTC))
        write_source(Gallery(self._gallery.path), source)

    def _make_job(self, group: WorkerGroup, listing: str, *, writes: bool) -> WorkerJob:
        """Make the job of a group's workers.

        Args:
            group: the group.
            listing: folder of the run that holds what the listing finds out.
            writes: whether the workers write parts.
        """
        stages = list(self._config.build_stages(group))
        if self._given:
            stages = self._give_faces(stages)
        if "read" in group.stages:
            # Images that the gallery has under another uri are recognised by their content. So are copies of images
            # that were erased by content.
            stages.insert(1, FindMoved(listing))
            if suppressed.read_contents(self._gallery.path).size:
                stages.insert(1, Suppress(self._gallery.path, suppressed.read_secret()))
        return WorkerJob(
            stages=tuple(stages),
            batch=self._config.run.batch or group.batch,
            batch_bytes=self._config.run.batch_bytes or group.batch_bytes,
            writes=writes,
            run=self._id,
            source=self._rows.source.name,
            faces_folder=self._gallery.faces_folder,
            marks_folder=self._marks_folder,
            ahead=self._config.count_stages_ahead(group, tuple(stages)),
            parallel=group.parallel,
            failed_with=self._config.describe_attempt(),
            devices=group.devices,
        )

    def _give_faces(self, stages: list[Any]) -> list[Any]:
        """Put the faces of lists in place of the detector's, and their labels in place of the source's."""
        source = self._config.source
        replaced: list[Any] = []
        for stage in stages:
            if isinstance(stage, Detect):
                settings = {key.name: getattr(stage, key.name) for key in fields(Detect)}
                given = DetectGiven(
                    **settings, folder=self._given, unlisted=source.boxes_unlisted, frame=source.boxes_frame
                )
                replaced.append(given)
                continue
            replaced.append(stage)
            if isinstance(stage, Align) and source.identity in ("auto", "label"):
                replaced.append(LabelGiven(self._given, source.label_prefix or ""))
        return replaced


@contextmanager
def _measure_gpus(summary: EmbedSummary, plan: WorkerPlan) -> Iterator[None]:
    """Measure how busy the GPUs are inside the `with` block, if the plan has any, and add it to the summary."""
    if not any(group.gpus for group in plan.groups):
        yield
        return
    with GpuSampler() as sampler:
        yield
    summary.gpu = sampler.summarise().to_dict()


class Accounts:
    """Compares what the listing handed out with what came back, however a runner has cut the work meanwhile."""

    def __init__(self) -> None:
        self._images = 0
        self._digest = 0
        self._reports = 0
        self._report_sum = 0
        self._last: PartRecord | None = None
        self._last_number = 0

    def add(self, record: PartRecord) -> None:
        """Count a record."""
        self._images += record.images
        self._digest = add_digests(self._digest, record.digest)
        numbers = [record.block] if record.reports is None else record.reports
        self._reports += len(numbers)
        self._report_sum += sum(numbers)
        if record.last:
            self._last = record
            self._last_number = max(numbers)

    def check(self) -> None:
        """Check that each block's report, and each image, came back exactly once.

        Raises:
            AccountingError: A report or an image is missing, or came twice.
        """
        # Reports are numbered from 0 to the last: their count and sum tell whether each came once.
        last = self._last
        count = self._last_number + 1
        if last is None or self._reports != count or self._report_sum != count * (count - 1) // 2:
            raise AccountingError(f"{self._reports} of {count} blocks came back: run the same command again to resume")
        # The digest of the images depends neither on their order nor on the blocks that they came in.
        if self._images != last.handed_out or self._digest != last.handed_out_digest:
            raise AccountingError(
                f"{self._images} of {last.handed_out} images came back, or one came for another: run the same command "
                "again to resume"
            )


class RecordBatches:
    """Counts the records of a run, and commits them in batches.

    Attributes:
        counts: What became of moved images.
        unread: Uris of images whose containers were replaced after they were listed.
    """

    def __init__(
        self, taker: RequestTaker, summary: EmbedSummary, moved: MovedImages, listing: str, commit_seconds: float
    ):
        """Begin with no record.

        Args:
            taker: takes up erase requests, and may want finished blocks to be committed soon.
            summary: counts the records.
            moved: collects images that may have moved.
            listing: folder of the run that holds what the listing finds out.
            commit_seconds: minimum time between commits.
        """
        self.counts = MoveCounts()
        self.unread: list[str] = []
        self._taker = taker
        self._commit = taker.committer
        self._summary = summary
        self._moved = moved
        self._listing = listing
        self._commit_seconds = commit_seconds
        self._start = time.monotonic()
        self._next_look = self._start

    def commit_all(self, records: Iterator[PartRecord], progress: Progress) -> None:
        """Count and commit records as they come. Finished work is committed even if the run is interrupted.

        Args:
            records: records of finished blocks, in any order.
            progress: called with the summary after each record.

        Raises:
            AccountingError: A block is missing, or came twice.
        """
        last_commit = self._start
        interval = self._commit_seconds
        pending: list[PartRecord] = []
        pending_changes = 0
        accounts = Accounts()
        summary = self._summary
        try:
            for record in records:
                pending += self._take(record)
                summary.add(record)
                summary.seconds = time.monotonic() - self._start
                summary.first_record_seconds = summary.first_record_seconds or summary.seconds
                accounts.add(record)
                summary.total = summary.total or self._read_total()
                progress(summary)
                pending_changes += len(record.relabelled) + len(record.touched)
                is_due = time.monotonic() - last_commit >= interval or pending_changes >= _MAX_PENDING_CHANGES
                if is_due or self._taker.wants_commit:
                    # Empty the list first: if the run is interrupted in between, no record is committed twice.
                    batch = pending
                    pending = []
                    pending_changes = 0
                    last_commit = time.monotonic()
                    self._commit(batch, _describe_commit(summary))
                    # A commit takes longer the more files the table has: of 10M images 0.2 seconds, of a billion many.
                    interval = max(interval, _COMMIT_PAUSE * (time.monotonic() - last_commit))
        finally:
            try:
                self._commit(pending, _describe_commit(summary))
                self._resolve_moves()
            finally:
                getattr(records, "close", lambda: None)()
        accounts.check()
        summary.seconds = time.monotonic() - self._start
        summary.version = Gallery(self._commit.gallery.path).version

    def _read_total(self) -> int:
        """Read how many images the source holds, a few seconds apart. 0: it is still being listed."""
        if time.monotonic() < self._next_look:
            return 0
        self._next_look = time.monotonic() + _TOTAL_SECONDS
        try:
            return read_figures(self._listing).listed
        except StorageError:
            return 0

    def _take(self, record: PartRecord) -> list[PartRecord]:
        """Set aside what waits for the end of the run, and return what can be committed now."""
        self.unread += record.unread
        # Only if everything is listed can an image be replaced whose rows another one needs.
        return self._moved.add(record, may_move=bool(record.replaced) and self._has_contents)

    @cached_property
    def _has_contents(self) -> bool:
        """Whether images may have moved. If any may, the listing was complete before the first one was read."""
        try:
            return read_figures(self._listing).has_contents
        except StorageError:
            return False

    def _resolve_moves(self) -> None:
        """Give moved images their rows, and commit what waited for them."""
        if self._moved.is_empty:
            self._commit(self._moved.take_waiting(), _describe_commit(self._summary))
            return
        figures = read_figures(self._listing)
        self.counts = self._moved.resolve(
            self._listing,
            figures,
            lambda records, make_actions: self._commit(records, _describe_commit(self._summary), make_actions),
        )
        self._summary.add_moves(self.counts)


def _describe_commit(summary: EmbedSummary) -> dict[str, Any]:
    """Describe a commit for the table's log: counts and times, no names."""
    return {
        "job": "embed",
        "facepipe": facepipe.__version__,
        "runner": summary.runner,
        "workers": summary.workers,
        "images": summary.images,
        "faces": summary.faces,
        "rows": summary.rows,
        "retried": summary.retried,
        "skipped": summary.skipped,
        "repeated": summary.repeated,
        "erased": summary.erased,
        "relabelled": summary.relabelled,
        "statuses": dict(summary.statuses),
        "seconds": round(summary.seconds, 3),
        "stage_seconds": {name: round(value, 3) for name, value in summary.stage_seconds.items()},
    }


def _run_workers(
    summary: EmbedSummary, blocks: Blocks, jobs: list[WorkerJob], plan: WorkerPlan
) -> Iterator[PartRecord]:
    """Run the workers that the summary names; on Ray, it gets the figures of the operators."""
    if summary.runner == "ray":

        def measure(data: Any) -> None:
            summary.operators = ray.measure_operators(data)

        return ray.run(blocks, jobs, plan, measure)
    if summary.runner == "inline":
        return inline.run(blocks, jobs[0])
    return local.run(blocks, jobs[0], plan.groups[0])


def _choose_runner(config: RunConfig, listing: EmbedListing) -> tuple[str, Blocks]:
    """Resolve the runner `auto`.

    Ray takes some ten seconds to start, and is no faster than processes on one machine.

    Returns:
        The runner, and what lists its blocks.
    """
    if config.runner != "auto":
        return config.runner, listing
    if "RAY_ADDRESS" not in os.environ and config.layout != "split":
        return "local", listing
    # Keep the listed blocks, so that a small source is listed once only.
    images = 0
    listed: list[Block] = []
    for block in listing():
        images += block.items.num_rows
        listed.append(block)
        if images > config.auto_images:
            return "ray", listing
    # The source is listed to its end, which need not be done twice.
    return "local", lambda: iter(listed)


def make_paths_absolute(config: EmbedConfig) -> EmbedConfig:
    """Make the paths of a config absolute: workers may run in another folder than the user."""
    source = config.source
    if source.uri and not is_web_url(source.uri):
        source = replace(source, uri=storage.to_absolute(source.uri))
    if source.root is not None:
        source = replace(source, root=storage.to_absolute(source.root))
    if source.lists_of_faces:
        source = replace(source, boxes=tuple(storage.to_absolute(path) for path in source.lists_of_faces))
    return replace(
        config,
        source=source,
        detect=replace(config.detect, model=_make_model_path_absolute(config.detect.model)),
        embed=replace(config.embed, model=_make_model_path_absolute(config.embed.model)),
    )


def _make_model_path_absolute(model: str) -> str:
    """Make the path of a model's file absolute; a registered name stays."""
    if model.startswith(GIVEN):
        return GIVEN + _make_model_path_absolute(model.removeprefix(GIVEN))
    return os.path.abspath(model) if model.endswith((".toml", ".safetensors")) else model
