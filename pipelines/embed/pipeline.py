"""embed: images in, a committed table of faces out. Runs inline, on a local pool of processes, or on Ray."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import facepipe
from facepipe import storage
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
from facepipe.sources import SourceConfig, open_source
from facepipe.sources.blocks import Block, BlockSize
from facepipe.sources.blocks import cut_blocks as cut_blocks
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

_BETWEEN_COMMITS = 20  # times a commit's own duration

Progress = Callable[[EmbedSummary], None]
Blocks = Callable[[], Iterator[Block]]


@dataclass(frozen=True)
class EmbedListing:
    """The blocks of a source that a gallery version does not hold; made afresh wherever it is called.

    missing: where to write which images of the source were not listed; empty where nobody wants to know.
    """

    source: SourceConfig
    gallery: str
    version: int
    size: BlockSize
    missing: str = ""
    at_most: float = 1.0

    def __call__(self) -> Iterator[Block]:
        source = open_source(self.source)
        known = KnownImages(Gallery(self.gallery, self.version), source.name, suppressed.read_uris(self.gallery))
        watched = WatchedSource(source)
        try:
            yield from cut_blocks(watched, known, self.size)
            if self.missing:
                most = int(self.at_most * known.source_count)
                count, uris = (0, None) if watched.broken_count else known.find_missing(most)
                write_missing(self.missing, MissingUris(count, known.source_count, watched.broken_count, uris))
        finally:
            known.close()


@record_calls("embed")
def run(config: EmbedConfig, gallery: str, progress: Progress = lambda summary: None) -> EmbedSummary:
    """Embed a source into a gallery, which is made if there is none.

    Raises SourceError for a source that is missing or holds no image, ContractError where the gallery was made with
    other models, AccountingError if an image got lost; ModelError or ConfigError for a model that cannot be used, which
    leaves no gallery behind where there was none. Bad images raise nothing: they are rows with a status.
    """
    check_chain((config.read, config.decode, config.detect, config.align, config.embed), WORK_ITEM.names)
    config = make_paths_absolute(config)
    contract = config.contract
    source = open_source(config.source)
    if next(iter(source), None) is None:
        raise SourceError(f"no image in {config.source.uri!r} ({source.ignored} other files were passed over)")
    _try_files(config, gallery)
    with hold_lease(gallery) as lease:
        return _run_locked(config, Gallery.open_or_create(gallery, contract), source.name, lease, progress)


def _try_files(config: EmbedConfig, gallery: str) -> None:
    """Load models of TOML files before a gallery is made: the corrected file would have another contract."""
    detector, embedder = (find_card_file(stage.model) for stage in (config.detect, config.embed))
    if not (detector or embedder) or Gallery.exists(gallery):
        return
    if detector:
        _ = replace(config.detect, device="cpu").detector
    if embedder:
        _ = replace(config.embed, device="cpu").embedder


def _run_locked(config: EmbedConfig, gallery: Gallery, source: str, lease: Lease, progress: Progress) -> EmbedSummary:
    record = get_current_run()
    identity = record.id if record else new_run_id()
    if record:
        record.set_versions(before=gallery.version)
        record.save()  # there may have been no gallery when the run began
    runs = storage.join(gallery.path, RUNS)
    crash_marks.inherit_crash_marks(runs, identity)  # the lease says that no other run is alive
    plan = make_plan(detect_local_resources(), config.run.workers)
    missing = storage.join(runs, identity, "missing") if config.missing.policy == "mark" else ""
    listing = EmbedListing(
        *(
            config.source,
            gallery.path,
            gallery.version,
            config.run.choose_block_size(plan),
            missing,
            config.missing.at_most,
        )
    )
    runner, blocks = _choose(config.run, listing)
    finished = False
    try:
        if runner == "ray":
            plan = make_plan(ray.start(), config.run.workers, config.run.layout)
            blocks = replace(listing, size=config.run.choose_block_size(plan))
        jobs = [
            _job(config, group, n == len(plan.groups) - 1, identity, source, gallery)
            for n, group in enumerate(plan.groups)
        ]
        summary = EmbedSummary(identity, runner, plan.workers)
        attach_summary(summary)
        commit = Committer(gallery, identity, lease)
        with _sampled(summary, plan):
            _collect(_records(runner, blocks, jobs, plan), commit, summary, config, progress)
        if missing:
            summary.missing, summary.missing_ignored = mark_missing(gallery, source, missing, commit)
            summary.version = Gallery(gallery.path).version
        finished = True
        return summary
    finally:
        if runner == "ray":
            ray.stop()
        with suppress(StorageError):  # left-over marks cost little, and must not hide why the run ended
            crash_marks.delete_crash_marks(runs, inherited="" if finished else identity)


@contextmanager
def _sampled(summary: EmbedSummary, plan: WorkerPlan) -> Iterator[None]:
    """Writes into the summary how busy the GPUs were meanwhile, where the plan has any."""
    if not any(group.gpus for group in plan.groups):
        yield
        return
    with GpuSampler() as sampler:
        yield
    summary.gpu = sampler.summarise().to_dict()


def _collect(
    records: Iterator[PartRecord], commit: Committer, summary: EmbedSummary, config: EmbedConfig, progress: Progress
) -> None:
    """Count and commit records as they come; what is finished is committed even when the run is broken off."""
    began = committed = time.monotonic()
    interval = config.run.commit_seconds
    pending: list[PartRecord] = []
    numbers = blocks = last = 0
    try:
        for record in records:
            pending.append(record)
            summary.add(record)
            summary.seconds = time.monotonic() - began
            summary.first_record_seconds = summary.first_record_seconds or summary.seconds
            numbers, blocks = numbers + record.block, blocks + 1
            last = record.block if record.last else last
            progress(summary)
            if time.monotonic() - committed >= interval:
                # Emptied first: an interruption between commit and emptying must not commit them twice.
                batch, pending, committed = pending, [], time.monotonic()
                commit(batch, _figures(summary))
                # A commit costs what the table has files: of 10M images a fifth of a second, of a billion many.
                interval = max(interval, _BETWEEN_COMMITS * (time.monotonic() - committed))
    finally:
        try:
            commit(pending, _figures(summary))
        finally:
            getattr(records, "close", lambda: None)()
    # Blocks are numbered 0..last: their count and sum tell whether each came exactly once.
    if not summary.listed_all or blocks != last + 1 or numbers != last * (last + 1) // 2:
        raise AccountingError(f"{blocks} of {last + 1} blocks came back; run the same command again to go on")
    summary.seconds = time.monotonic() - began
    summary.version = Gallery(commit.gallery.path).version


def _figures(summary: EmbedSummary) -> dict[str, Any]:
    """What goes into the log beside a commit: counts and times, no names."""
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
        "statuses": dict(summary.statuses),
        "seconds": round(summary.seconds, 3),
        "stage_seconds": {name: round(value, 3) for name, value in summary.stage_seconds.items()},
    }


def _records(runner: str, blocks: Blocks, jobs: list[WorkerJob], plan: WorkerPlan) -> Iterator[PartRecord]:
    if runner == "ray":
        return ray.run(blocks, jobs, plan)
    return inline.run(blocks, jobs[0]) if runner == "inline" else local.run(blocks, jobs[0], plan.groups[0])


def _choose(config: RunConfig, listing: EmbedListing) -> tuple[str, Blocks]:
    """(runner, blocks): Ray's start costs some ten seconds, and on one machine it is no faster than processes are."""
    if config.runner != "auto":
        return config.runner, listing
    if "RAY_ADDRESS" not in os.environ and config.layout == "fused":
        return "local", listing
    images, ahead = 0, list[Block]()
    for block in listing():
        images += block.items.num_rows
        ahead.append(block)
        if images > config.auto_images:
            return "ray", listing
    return "local", lambda: iter(ahead)  # listed to its end: that need not be done twice


def _job(
    config: EmbedConfig, group: WorkerGroup, writes: bool, identity: str, source: str, gallery: Gallery
) -> WorkerJob:
    stages = list(config.build_stages(group))
    if "read" in group.stages and suppressed.read_contents(gallery.path).size:
        stages.insert(1, Suppress(gallery.path))
    marks = storage.join(gallery.path, RUNS, identity)
    ahead, batch = config.count_stages_ahead(group, tuple(stages)), config.run.batch or group.batch
    return WorkerJob(tuple(stages), batch, writes, identity, source, gallery.faces_folder, marks, ahead)


def make_paths_absolute(config: EmbedConfig) -> EmbedConfig:
    """Paths made absolute: workers may run in another folder than the user."""
    uri = config.source.uri
    stays = not uri or is_web_url(uri)
    return replace(
        config,
        source=config.source if stays else replace(config.source, uri=storage.to_absolute(uri)),
        detect=replace(config.detect, model=_model(config.detect.model)),
        embed=replace(config.embed, model=_model(config.embed.model)),
    )


def _model(name: str) -> str:
    """A model's TOML file; registered names stay."""
    return os.path.abspath(name) if name.endswith((".toml", ".safetensors")) else name
