"""embed: images in, a committed table of faces out. Runs inline, on a local pool of processes, or on Ray."""

import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from facepipe import storage
from facepipe.errors import AccountingError, SourceError
from facepipe.gallery import Contract, Gallery
from facepipe.gallery.commit import Committer
from facepipe.gallery.known import KnownImages
from facepipe.gallery.lock import writer_lock
from facepipe.gallery.parts import Record
from facepipe.schema import FAILED, WORK_ITEM
from facepipe.sources import SourceConfig, open_source
from facepipe.stages import Align, Decode, Detect, Embed, Read, check_chain
from facepipe.work.blocks import Block, BlockSize
from facepipe.work.blocks import blocks as cut_blocks
from pipelines.plan import Group, Layout, Plan, local_resources, make_plan
from pipelines.runners import inline, local, ray
from pipelines.worker import Job

Runner = Literal["auto", "inline", "local", "ray"]


@dataclass(frozen=True)
class RunConfig:
    """How the work is run; none of it changes what comes out.

    runner: local (processes on this machine), ray, inline (this process), or auto: local below auto_images, else ray
    workers: how many; by default one a CPU, or one a GPU where there are GPUs
    layout: fused (one worker runs all stages) or split (CPU workers decode, GPU workers run the models)
    batch: images a worker holds decoded at a time
    block_smallest, block_largest: images of one unit of work, which is one Parquet file
    commit_seconds: finished work becomes visible at least this often
    """

    runner: Runner = "auto"
    auto_images: int = 500
    workers: int | None = None
    layout: Layout = "fused"
    batch: int = 16
    block_smallest: int = 16
    block_largest: int = 512
    commit_seconds: float = 10.0

    def block_size(self, plan: Plan) -> BlockSize:
        """How to cut the work for a plan."""
        return BlockSize(self.block_smallest, self.block_largest, plan.workers)


@dataclass(frozen=True)
class EmbedConfig:
    """Everything `embed` can be told: one section a stage, one for the source and one for the run."""

    source: SourceConfig = field(default_factory=SourceConfig)
    read: Read = field(default_factory=Read)
    decode: Decode = field(default_factory=Decode)
    detect: Detect = field(default_factory=Detect)
    align: Align = field(default_factory=Align)
    embed: Embed = field(default_factory=Embed)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def contract(self) -> Contract:
        """What the embeddings depend on."""
        return Contract.of(self.detect.model, self.embed.model, self.embed.flip)

    def stages(self, group: Group) -> tuple[Any, ...]:
        """The stages of a group, set to the group's device and threads."""
        device = "cuda" if group.gpus else "cpu"
        chain = {
            "read": self.read,
            "decode": replace(self.decode, threads=max(self.decode.threads, group.threads)),
            "detect": replace(self.detect, device=device, threads=group.threads),
            "align": replace(self.align, embedder=self.embed.model),
            "embed": replace(self.embed, device=device, threads=group.threads),
        }
        return tuple(chain[name] for name in group.stages)


@dataclass
class Summary:
    """What a run did. images = the sum of statuses; listed = images + skipped + repeated."""

    run: str
    runner: str
    workers: int
    version: int = 0
    images: int = 0
    faces: int = 0
    rows: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    repeated: int = 0
    ignored: int = 0
    seconds: float = 0.0
    first_record_seconds: float = 0.0
    stage_seconds: Counter[str] = field(default_factory=Counter)
    listed_all: bool = False

    @property
    def listed(self) -> int:
        """Images the source named."""
        return self.images + self.skipped + self.repeated

    @property
    def failed(self) -> int:
        """Images that gave neither faces nor the certainty that there are none."""
        return sum(self.statuses[status] for status in FAILED)

    def add(self, record: Record) -> None:
        """Count a finished block."""
        self.images += record.images
        self.faces += record.faces
        self.rows += record.rows
        self.skipped += record.skipped
        self.repeated += record.repeated
        self.ignored += record.ignored
        self.statuses.update(record.statuses)
        self.stage_seconds.update(record.seconds)
        self.listed_all = self.listed_all or record.last

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **asdict(self),
            "statuses": dict(self.statuses),
            "stage_seconds": dict(self.stage_seconds),
            "listed": self.listed,
            "failed": self.failed,
        }


Progress = Callable[[Summary], None]
Blocks = Callable[[], Iterator[Block]]


@dataclass(frozen=True)
class Listing:
    """The blocks of a source that a gallery version does not hold; made afresh wherever it is called."""

    source: SourceConfig
    gallery: str
    version: int
    size: BlockSize

    def __call__(self) -> Iterator[Block]:
        known = KnownImages(Gallery(self.gallery, self.version))
        try:
            yield from cut_blocks(open_source(self.source), known, self.size)
        finally:
            known.close()


def run(config: EmbedConfig, gallery: str, progress: Progress = lambda summary: None) -> Summary:
    """Embed a source into a gallery, which is made if there is none.

    Raises SourceError for a source that is missing or holds no image, ContractError where the gallery was made with
    other models, AccountingError if an image got lost. Bad images raise nothing: they are rows with a status.
    """
    check_chain((config.read, config.decode, config.detect, config.align, config.embed), WORK_ITEM.names)
    config = replace(config, source=_absolute(config.source))
    source = open_source(config.source)
    if next(iter(source), None) is None:
        raise SourceError(f"no image in {config.source.uri!r} ({source.ignored} other files were passed over)")
    with writer_lock(gallery):
        return _run_locked(config, _open(gallery, config.contract), source.name, progress)


def _run_locked(config: EmbedConfig, gallery: Gallery, source: str, progress: Progress) -> Summary:
    identity = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
    runs = os.path.join(gallery.path, "runs")
    shutil.rmtree(runs, ignore_errors=True)  # crash marks of runs that died: the lock says that none is alive
    plan = make_plan(local_resources(), config.run.workers)
    listing = Listing(config.source, gallery.path, gallery.version, config.run.block_size(plan))
    runner, blocks = _choose(config.run, listing)
    try:
        if runner == "ray":
            plan = make_plan(ray.start(), config.run.workers, config.run.layout)
            blocks = replace(listing, size=config.run.block_size(plan))
        jobs = [
            _job(config, group, n == len(plan.groups) - 1, identity, source, gallery)
            for n, group in enumerate(plan.groups)
        ]
        summary = Summary(identity, runner, plan.workers)
        return _collect(_records(runner, blocks, jobs, plan), Committer(gallery, identity), summary, config, progress)
    finally:
        if runner == "ray":
            ray.stop()
        shutil.rmtree(runs, ignore_errors=True)


def _collect(
    records: Iterator[Record], commit: Committer, summary: Summary, config: EmbedConfig, progress: Progress
) -> Summary:
    """Count and commit records as they come; what is finished is committed even when the run is broken off."""
    began = committed = time.monotonic()
    pending: list[Record] = []
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
            if time.monotonic() - committed >= config.run.commit_seconds:
                commit(pending, _figures(summary))
                pending, committed = [], time.monotonic()
    finally:
        commit(pending, _figures(summary))
        getattr(records, "close", lambda: None)()
    # Blocks are numbered 0..last: their count and sum tell whether each came exactly once.
    if not summary.listed_all or blocks != last + 1 or numbers != last * (last + 1) // 2:
        raise AccountingError(f"{blocks} of {last + 1} blocks came back; run the same command again to go on")
    summary.seconds = time.monotonic() - began
    summary.version = Gallery(commit.gallery.path).version
    return summary


def _figures(summary: Summary) -> dict[str, Any]:
    """What goes into the log beside a commit: counts and times, no names."""
    return {
        "runner": summary.runner,
        "workers": summary.workers,
        "images": summary.images,
        "faces": summary.faces,
        "skipped": summary.skipped,
        "statuses": dict(summary.statuses),
        "seconds": round(summary.seconds, 3),
        "stage_seconds": {name: round(value, 3) for name, value in summary.stage_seconds.items()},
    }


def _records(runner: str, blocks: Blocks, jobs: list[Job], plan: Plan) -> Iterator[Record]:
    if runner == "ray":
        return ray.run(blocks, jobs, plan)
    return inline.run(blocks, jobs[0]) if runner == "inline" else local.run(blocks, jobs[0], plan.workers)


def _choose(config: RunConfig, listing: Listing) -> tuple[str, Blocks]:
    """(runner, blocks): Ray's start costs some ten seconds, which a small amount of work does not pay for."""
    if config.runner != "auto":
        return config.runner, listing
    images, ahead = 0, list[Block]()
    for block in listing():
        images += block.items.num_rows
        ahead.append(block)
        if images > config.auto_images:
            return "ray", listing
    return "local", lambda: iter(ahead)  # listed to its end: that need not be done twice


def _open(path: str, contract: Contract) -> Gallery:
    if not Gallery.exists(path):
        return Gallery.create(path, contract)
    gallery = Gallery(path)
    gallery.contract.require(contract, f"the gallery {path!r}")
    return gallery


def _job(config: EmbedConfig, group: Group, writes: bool, identity: str, source: str, gallery: Gallery) -> Job:
    folder = os.path.abspath(gallery.faces_folder)
    attempts = os.path.join(os.path.abspath(gallery.path), "runs", identity)
    return Job(config.stages(group), config.run.batch, writes, identity, source, folder, attempts)


def _absolute(source: SourceConfig) -> SourceConfig:
    """Workers may run in another folder than the user."""
    return (
        source if storage.is_remote(source.uri) or not source.uri else replace(source, uri=os.path.abspath(source.uri))
    )
