"""search: queries in, a Parquet table of their nearest faces out; in blocks, restartable, on this machine or on Ray."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from facepipe.errors import ConfigError, SourceError, StorageError
from facepipe.gallery import Contract, Gallery
from facepipe.index import manifest
from facepipe.index.answers import ANSWERS, Find, answers, joined
from facepipe.index.cost import Scan, device_is_cheaper, scan_is_cheaper
from facepipe.index.queries import Queries, QueryBlock, QuerySource, open_queries, read_block
from facepipe.index.search import Index
from facepipe.models.runtime.device import resolve_device
from facepipe.models.zoo.registry import resolve_model_name
from facepipe.storage import describe_error, replace_file
from pipelines import embed
from pipelines.embed.config import Count, EmbedConfig
from pipelines.runtime.run_record import records
from pipelines.runtime.runners import ray


@dataclass(frozen=True)
class SearchRunConfig:
    """How the work is run; none of it changes what comes out.

    runner: inline (this process, all its CPUs), ray (a task a block), or auto: ray where RAY_ADDRESS names a cluster
    block: queries of one block, which is done again if it was not finished; cpus: of a Ray task
    device: where queries are compared with every vector, if they are: auto (a GPU, where one is there and pays), cpu,
        cuda or cuda:N; all vectors are sent to a GPU once for each block, so that larger blocks pay there
    """

    runner: Literal["auto", "inline", "ray"] = "auto"
    block: Count = 20_000
    cpus: Count = 2
    device: str = "auto"


@dataclass(frozen=True)
class SearchConfig:
    """Everything `search` can be told; `embed` is for queries that are images, with the gallery's models."""

    search: Find = field(default_factory=Find)
    run: SearchRunConfig = field(default_factory=SearchRunConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)


@dataclass
class SearchSummary:
    """What a search did. queries: all; bad: those that could not be searched, by reason; skipped_blocks: were done."""

    queries: int = 0
    rows: int = 0
    identified: int = 0
    unknown: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)
    blocks: int = 0
    skipped_blocks: int = 0
    path: str = "lists"
    vectors: int = 0
    nprobe: int = 0
    rescore: int = 0
    recall_at_10: float | None = None
    threshold: float | None = None
    seconds: float = 0.0
    out: str = ""


Progress = Callable[[SearchSummary], None]


@records("search")
def run(
    config: SearchConfig, gallery: str, queries: str, out: str, progress: Progress = lambda summary: None
) -> SearchSummary:
    """Search a gallery's index for queries: images, a gallery, or Parquet files with an `embedding` column.

    Writes OUT.parquet, or a folder of parts where OUT has no such ending; it appears when it is complete. A search that
    was interrupted goes on from its last finished block. Raises ContractError where the queries were made with other
    models, SourceError where there is nothing to search for.
    """
    began = time.monotonic()
    table = Gallery(gallery)
    if os.path.exists(out) and not (os.path.isfile(out) and out.endswith(".parquet")):
        raise ConfigError(f"{out!r} exists: choose another name")
    manifest.load(table.path)  # before any image is read
    work = out.rstrip("/") + ".partial"
    summary = SearchSummary(out=out, threshold=config.search.threshold)
    try:
        os.makedirs(work, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {work!r}: {describe_error(error)}") from error
    source = open_queries(queries, table.contract) or _embedded(config, table.contract, queries, work, summary)
    _search_blocks(config, table, source, work, summary, began, progress)
    _finish(work, out, summary)
    summary.seconds = round(time.monotonic() - began, 3)
    return summary


def _embedded(config: SearchConfig, contract: Contract, images: str, work: str, summary: SearchSummary) -> QuerySource:
    """Images are embedded with the gallery's models first, into a gallery beside the output."""
    inner = config.embed
    chosen = replace(
        inner,
        source=replace(inner.source, uri=images),
        detect=replace(inner.detect, model=resolve_model_name(contract.detector, inner.detect.model, "detector")),
        embed=replace(
            inner.embed, model=resolve_model_name(contract.embedder, inner.embed.model, "embedder"), flip=contract.flip
        ),
        align=replace(inner.align, thumbs=False),
    )
    contract.require(chosen.contract, "the gallery that is searched")
    found = embed.run(chosen, os.path.join(work, "queries"))
    made = Gallery(os.path.join(work, "queries"))
    summary.images = {name: count for name, count in made.counts().items() if name not in ("images", "faces")}
    source = open_queries(made.path, contract)
    if source is None or found.version < 0:
        raise SourceError(f"no image in {images!r}")
    return source


def _search_blocks(
    config: SearchConfig,
    gallery: Gallery,
    source: QuerySource,
    work: str,
    summary: SearchSummary,
    began: float,
    progress: Progress,
) -> None:
    on_ray = config.run.runner == "ray" or (config.run.runner == "auto" and "RAY_ADDRESS" in os.environ)
    try:
        resources = ray.start() if on_ray else None
        asked = config.run.device
        device = ray.device(asked, resources) if resources else resolve_device(asked)
        threads = config.run.cpus if on_ray else None
        total = source.count()
        scan = Scan(
            queries=min(total, config.run.block),
            total=total,
            k=config.search.k,
            cores=threads or len(os.sched_getaffinity(0)),
            gpu=device != "cpu",
        )
        job = _Job.of(config, gallery, source, scan)
        found = manifest.load(gallery.path)
        summary.path, summary.vectors = job.path, found.live
        summary.nprobe, summary.rescore = found.setting(config.search.recall)
        exact = job.path == "scan" or not found.template.lists
        summary.recall_at_10 = 1.0 if exact else manifest.measured_recall(found, summary.nprobe, summary.rescore)
        if job.path == "lists" or (asked == "auto" and not device_is_cheaper(found.live, scan)):
            device = "cpu"
        _begin(work, job)
        left = _unfinished(source, config.run.block, work, summary)
        blocks = (_Task(job, block, work, threads, device) for block in left)
        done: Iterable[tuple[_Task, dict[str, Any]]] = ((task, _search_block(task)) for task in blocks)
        if on_ray:
            done = ray.tasks(_search_block, blocks, config.run.cpus, gpus=int(device != "cpu"))
        for _, counts in done:
            _count(summary, counts)
            summary.seconds = time.monotonic() - began
            progress(summary)
    finally:
        if on_ray:
            ray.stop()


def _unfinished(source: QuerySource, rows: int, work: str, summary: SearchSummary) -> Iterator[QueryBlock]:
    for block in source.blocks(rows):
        summary.blocks += 1
        path = _part(work, block.number)
        if os.path.exists(path):
            summary.skipped_blocks += 1
            _count(summary, json.loads(pq.read_schema(path).metadata[b"facepipe.counts"]))
        else:
            yield block


@dataclass(frozen=True)
class _Job:
    """What decides the answers: a part made for another job is not used."""

    gallery: str
    created: float
    queries: str
    fingerprint: str
    block: int
    find: Find
    path: str

    @classmethod
    def of(cls, config: SearchConfig, gallery: Gallery, source: QuerySource, scan: Scan) -> "_Job":
        found = manifest.load(gallery.path)
        find = config.search
        if find.leave_self_out is None:
            find = replace(
                find, leave_self_out=source.gallery and os.path.realpath(source.path) == os.path.realpath(gallery.path)
            )
        path = find.path
        if path == "auto":
            cheaper = not find.radius and scan_is_cheaper(found, *found.setting(find.recall), scan)
            path = "scan" if cheaper else "lists"
        if path == "scan" and find.radius:
            raise ConfigError("a search by radius visits lists: leave path=scan out, or give k")
        return cls(gallery.path, found.created, source.path, source.fingerprint, config.run.block, find, path)


@dataclass(frozen=True)
class _Task:
    job: _Job
    block: QueryBlock
    work: str
    threads: int | None
    device: str


def _begin(work: str, job: _Job) -> None:
    """Parts of an earlier, different search are of no use."""
    path, state = os.path.join(work, "job.json"), json.dumps(asdict(job), sort_keys=True)
    try:
        with open(path) as file:
            same = file.read() == state
    except OSError:
        same = False
    if not same:
        for name in os.listdir(work):
            if name.startswith("part-"):
                os.unlink(os.path.join(work, name))
        with open(path, "w") as file:
            file.write(state)


def _part(work: str, number: int) -> str:
    return os.path.join(work, f"part-{number:06d}.parquet")


def _search_block(task: _Task) -> dict[str, Any]:
    """Search one block and write its part under a temporary name first; its counts."""
    index = _opened(task.job.gallery, task.job.created, task.job.find.recall, task.threads)
    counts: dict[str, Any] = {"queries": 0, "rows": 0, "identified": 0, "unknown": 0, "bad": {}}
    parts: Iterable[Queries] = read_block(task.block)
    scan = task.device if task.job.path == "scan" else None
    if scan:
        parts = joined(list(parts))
    tables = [answers(index, queries, task.job.find, scan, counts) for queries in parts]
    table = pa.concat_tables(tables) if tables else ANSWERS.empty_table()
    table = table.replace_schema_metadata({"facepipe.counts": json.dumps(counts)})
    path = _part(task.work, task.block.number)
    with replace_file(path, unique=True) as unfinished:
        pq.write_table(table, unfinished, compression="zstd")
    return counts


@lru_cache(maxsize=1)
def _opened(gallery: str, created: float, recall: float | None, threads: int | None) -> Index:
    return Index(gallery, recall, threads, merge=True)


def _count(summary: SearchSummary, counts: dict[str, Any]) -> None:
    for name in ("queries", "rows", "identified", "unknown"):
        setattr(summary, name, getattr(summary, name) + counts[name])
    for reason, count in counts["bad"].items():
        summary.bad[reason] = summary.bad.get(reason, 0) + count


def _finish(work: str, out: str, summary: SearchSummary) -> None:
    """The parts as one file, or as a folder; the work folder goes."""
    parts = [_part(work, number) for number in range(summary.blocks)]
    try:
        if out.endswith(".parquet"):
            temporary = os.path.join(work, "joined")
            with pq.ParquetWriter(temporary, ANSWERS, compression="zstd") as writer:
                for part in parts:
                    writer.write_table(pq.read_table(part).replace_schema_metadata(None))
            os.replace(temporary, out)
        else:
            os.makedirs(work + "/parts")
            for part in parts:
                os.rename(part, os.path.join(work, "parts", os.path.basename(part)))
            os.rename(work + "/parts", out)
    except OSError as error:
        raise StorageError(f"cannot write {out!r}: {describe_error(error)}") from error
    shutil.rmtree(work, ignore_errors=True)
