"""Embed a source into a gallery, in this process, in a local pool of processes, or on Ray."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import facepipe
from facepipe import storage
from facepipe.erasure.takeup import RequestTaker
from facepipe.errors import AccountingError, SourceError, StorageError
from facepipe.gallery import Gallery, suppressed
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.missing import MissingUris, mark_missing, write_missing
from facepipe.gallery.commits.parts import PartRecord
from facepipe.gallery.known import KnownImages
from facepipe.gallery.table import RUNS
from facepipe.models.zoo.registry import find_card_file
from facepipe.observe.gpu_usage import GpuSampler
from facepipe.observe.runs import new_run_id
from facepipe.schema import WORK_ITEM
from facepipe.sources import Source, SourceConfig, open_source
from facepipe.sources.blocks import Block, BlockSize, cut_blocks
from facepipe.sources.extensions import is_web_url
from facepipe.sources.item import WatchedSource
from facepipe.stages import check_chain
from facepipe.stages.suppress import Suppress
from facepipe.storage.lease import Lease, hold_lease
from pipelines.embed.config import EmbedConfig, RunConfig
from pipelines.embed.summary import EmbedSummary
from pipelines.runtime import crash_marks
from pipelines.runtime.plan import WorkerGroup, WorkerPlan, detect_local_resources, make_plan
from pipelines.runtime.run_record import attach_summary, get_current_run, record_calls
from pipelines.runtime.runners import inline, local, ray
from pipelines.runtime.worker import WorkerJob

__all__ = ["EmbedConfig", "EmbedSummary", "RunConfig", "run"]

_COMMIT_PAUSE = 20  # minimum time between commits, in durations of a commit
# New labels and fingerprints that wait for a commit at most: they lie in memory.
_MAX_PENDING_CHANGES = 500_000

Progress = Callable[[EmbedSummary], None]
Blocks = Callable[[], Iterator[Block]]


@dataclass(frozen=True)
class EmbedListing:
    """Blocks of a source that a gallery version does not hold. Each call lists again, on any machine.

    Attributes:
        source: the source
        gallery: folder or URL of the gallery
        version: version of the gallery's table
        size: number of images per block
        missing: folder for the images of the source that were not listed; empty: do not look for them
        at_most: maximum share of missing images that are written
        secret: secret of the hashes of erased images, for a machine without the key
    """

    source: SourceConfig
    gallery: str
    version: int
    size: BlockSize
    missing: str = ""
    at_most: float = 1.0
    secret: bytes | None = field(default=None, repr=False)

    def __call__(self) -> Iterator[Block]:
        """List the images in blocks."""
        source = open_source(self.source)
        # Erased images count as known, so that they are not embedded again.
        erased = suppressed.read_uris(self.gallery, self.secret)
        known = KnownImages(Gallery(self.gallery, self.version), source.name, erased)
        watched = WatchedSource(source)
        try:
            yield from cut_blocks(watched, known, self.size)
            if self.missing:
                write_missing(self.missing, self._find_missing(known, watched.broken_count))
        finally:
            known.close()

    def _find_missing(self, known: KnownImages, broken: int) -> MissingUris:
        """Find images that were not listed. If a part of the source could not be listed, none counts as missing."""
        if broken:
            return MissingUris(0, known.source_count, broken, None)
        count, uris = known.find_missing(int(self.at_most * known.source_count))
        return MissingUris(count, known.source_count, broken, uris)


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
    check_chain((config.read, config.decode, config.detect, config.align, config.embed), WORK_ITEM.names)
    config = make_paths_absolute(config)
    contract = config.contract
    source = open_source(config.source)
    if next(iter(source), None) is None:
        raise SourceError(_describe_empty_source(config.source.uri, source))
    _try_model_files(config, gallery)
    with hold_lease(gallery) as lease:
        embed_run = _EmbedRun(config, Gallery.open_or_create(gallery, contract), source.name, lease)
        return embed_run.run(progress)


def _describe_empty_source(uri: str, source: Source) -> str:
    """Describe that a source holds no image, and what it holds instead."""
    parts = [f"no image in {uri!r} ({source.ignored} other files were ignored)", *source.notes]
    if storage.is_remote(uri):
        parts.append("if it holds Parquet files, add --set source.kind=parquet")
    return "; ".join(parts)


def _try_model_files(config: EmbedConfig, gallery: str) -> None:
    """Load models of TOML files before a gallery is created: the corrected file would have another contract."""
    # Loading on the CPU is enough to find an error in a file.
    detector_file = find_card_file(config.detect.model)
    embedder_file = find_card_file(config.embed.model)
    if not (detector_file or embedder_file) or Gallery.exists(gallery):
        return
    if detector_file:
        _ = replace(config.detect, device="cpu").detector
    if embedder_file:
        _ = replace(config.embed, device="cpu").embedder


class _EmbedRun:
    """A run on a gallery whose lease it holds."""

    def __init__(self, config: EmbedConfig, gallery: Gallery, source: str, lease: Lease):
        self._config = config
        self._gallery = gallery
        self._source = source
        self._lease = lease
        record = get_current_run()
        self._id = record.id if record else new_run_id()
        self._runs_folder = storage.join(gallery.path, RUNS)
        self._marks_folder = storage.join(gallery.path, RUNS, self._id)
        self._missing_folder = ""
        if config.missing.policy == "mark":
            self._missing_folder = storage.join(self._runs_folder, self._id, "missing")

    def run(self, progress: Progress) -> EmbedSummary:
        """Embed the source, and return the summary."""
        record = get_current_run()
        if record:
            record.set_versions(before=self._gallery.version)
            record.save()  # there may have been no gallery when the run began
        # The lease guarantees that no other run is going on.
        crash_marks.inherit_crash_marks(self._runs_folder, self._id)
        plan = make_plan(detect_local_resources(), self._config.run.workers)
        listing = EmbedListing(
            self._config.source,
            self._gallery.path,
            self._gallery.version,
            self._config.run.choose_block_size(plan),
            self._missing_folder,
            self._config.missing.at_most,
            suppressed.read_secret(),
        )
        # The plan is made for this machine first. On a cluster it is made again for the cluster's resources.
        runner, blocks = _choose_runner(self._config.run, listing)
        is_finished = False
        try:
            if runner == "ray":
                plan = make_plan(ray.start(), self._config.run.workers, self._config.run.layout)
                blocks = replace(listing, size=self._config.run.choose_block_size(plan))
            summary = self._process(runner, blocks, plan, progress)
            is_finished = True
            return summary
        finally:
            if runner == "ray":
                ray.stop()
            # Marks that stay cost little, and must not hide why the run ended.
            with suppress(StorageError):
                crash_marks.delete_crash_marks(self._runs_folder, inherited="" if is_finished else self._id)

    def _process(self, runner: str, blocks: Blocks, plan: WorkerPlan, progress: Progress) -> EmbedSummary:
        """Run the workers, commit what they write, and mark missing images."""
        # Only the last group of the chain writes parts.
        jobs = [self._make_job(group, writes=group is plan.groups[-1]) for group in plan.groups]
        summary = EmbedSummary(self._id, runner, plan.workers)
        attach_summary(summary)
        commit = Committer(self._gallery, self._id, self._lease)
        # Requests are taken up from the first record on: the listing has then read what it reads of the table.
        with RequestTaker(commit, self._lease) as taker:
            with _measure_gpus(summary, plan):
                records = taker.follow(_run_workers(runner, blocks, jobs, plan))
                _commit_records(records, commit, summary, self._config.run.commit_seconds, progress, taker)
            if self._missing_folder:
                summary.missing, summary.missing_ignored = mark_missing(
                    self._gallery, self._source, self._missing_folder, commit
                )
        summary.version = Gallery(self._gallery.path).version
        return summary

    def _make_job(self, group: WorkerGroup, *, writes: bool) -> WorkerJob:
        """Make the job of a group's workers."""
        # If images were erased by content, a stage after reading recognises copies under other names.
        stages = list(self._config.build_stages(group))
        if "read" in group.stages and suppressed.read_contents(self._gallery.path).size:
            stages.insert(1, Suppress(self._gallery.path, suppressed.read_secret()))
        return WorkerJob(
            stages=tuple(stages),
            batch=self._config.run.batch or group.batch,
            writes=writes,
            run=self._id,
            source=self._source,
            faces_folder=self._gallery.faces_folder,
            marks_folder=self._marks_folder,
            ahead=self._config.count_stages_ahead(group, tuple(stages)),
        )


@contextmanager
def _measure_gpus(summary: EmbedSummary, plan: WorkerPlan) -> Iterator[None]:
    """Measure how busy the GPUs are inside the `with` block, if the plan has any, and add it to the summary."""
    if not any(group.gpus for group in plan.groups):
        yield
        return
    with GpuSampler() as sampler:
        yield
    summary.gpu = sampler.summarise().to_dict()


def _commit_records(
    records: Iterator[PartRecord],
    commit: Committer,
    summary: EmbedSummary,
    commit_seconds: float,
    progress: Progress,
    taker: RequestTaker,
) -> None:
    """Count and commit records as they come. Finished work is committed even if the run is interrupted.

    Args:
        records: records of finished blocks, in any order.
        commit: commits records.
        summary: counts the records.
        commit_seconds: minimum time between commits.
        progress: called with the summary after each record.
        taker: takes up erase requests, and may want finished blocks to be committed soon.

    Raises:
        AccountingError: A block is missing, or came twice.
    """
    start = time.monotonic()
    last_commit = start
    interval = commit_seconds
    pending: list[PartRecord] = []
    # Blocks come back in any order, so they are counted and their numbers are added up.
    pending_changes = 0
    count = 0
    number_sum = 0
    last_number = 0
    try:
        for record in records:
            pending.append(record)
            summary.add(record)
            summary.seconds = time.monotonic() - start
            summary.first_record_seconds = summary.first_record_seconds or summary.seconds
            count += 1
            number_sum += record.block
            if record.last:
                last_number = record.block
            progress(summary)
            pending_changes += len(record.relabelled) + len(record.touched)
            is_due = time.monotonic() - last_commit >= interval or pending_changes >= _MAX_PENDING_CHANGES
            if is_due or taker.wants_commit:
                # Empty the list first: if the run is interrupted in between, the records must not be committed twice.
                batch = pending
                pending = []
                pending_changes = 0
                last_commit = time.monotonic()
                commit(batch, _describe_commit(summary))
                # A commit takes longer the more files the table has: of 10M images 0.2 seconds, of a billion many.
                interval = max(interval, _COMMIT_PAUSE * (time.monotonic() - last_commit))
    finally:
        try:
            commit(pending, _describe_commit(summary))
        finally:
            getattr(records, "close", lambda: None)()
    # Blocks are numbered from 0 to the last: their count and sum tell whether each came exactly once.
    if not summary.listed_all or count != last_number + 1 or number_sum != last_number * (last_number + 1) // 2:
        raise AccountingError(f"{count} of {last_number + 1} blocks came back: run the same command again to resume")
    summary.seconds = time.monotonic() - start


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
        "skipped": summary.skipped,
        "repeated": summary.repeated,
        "erased": summary.erased,
        "relabelled": summary.relabelled,
        "statuses": dict(summary.statuses),
        "seconds": round(summary.seconds, 3),
        "stage_seconds": {name: round(value, 3) for name, value in summary.stage_seconds.items()},
    }


def _run_workers(runner: str, blocks: Blocks, jobs: list[WorkerJob], plan: WorkerPlan) -> Iterator[PartRecord]:
    if runner == "ray":
        return ray.run(blocks, jobs, plan)
    if runner == "inline":
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
    if "RAY_ADDRESS" not in os.environ and config.layout == "fused":
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
    return replace(
        config,
        source=source,
        detect=replace(config.detect, model=_make_model_path_absolute(config.detect.model)),
        embed=replace(config.embed, model=_make_model_path_absolute(config.embed.model)),
    )


def _make_model_path_absolute(model: str) -> str:
    """Make the path of a model's file absolute; a registered name stays."""
    return os.path.abspath(model) if model.endswith((".toml", ".safetensors")) else model
