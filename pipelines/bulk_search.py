"""bulk_search: a batch of queries in, their nearest faces and who they are out; the index is brought up first."""

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

from pydantic import Field

from facepipe import storage
from facepipe.errors import ConfigError
from facepipe.evaluation.identification import few, operating_point, probe
from facepipe.gallery import Gallery, mirror
from facepipe.hashing import hash64
from facepipe.index import manifest as manifests
from facepipe.index.answers import Find
from facepipe.index.queries import open_queries
from facepipe.index.search import Index
from facepipe.schema import FAILED
from facepipe.sources import open_source
from pipelines import index, search
from pipelines.embed.config import EmbedConfig
from pipelines.index import BuildConfig, IndexConfig
from pipelines.runtime.run_record import follow, records
from pipelines.search import SearchConfig, SearchRunConfig, SearchSummary

Progress = Callable[[str], None]
SearchProgress = Callable[[SearchSummary], None]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class BulkConfig:
    """What the job does around the search, and when it counts as failed.

    update_index: bring the index up to date with the gallery first; without, the faces that it holds are searched
    fpir: rate of false alarms that the threshold is chosen for, from searches in the gallery itself, which needs
        labels; instead of search.threshold
    max_failed: share of the queries that may be of no use (unreadable images, broken vectors) before the exit code is 3
    """

    update_index: bool = False
    fpir: Annotated[float, Field(gt=0, lt=1)] | None = None
    max_failed: Share = 0.01


@dataclass(frozen=True)
class BulkSearchConfig:
    """Everything the job can be told: what is searched for where, and the sections of its commands.

    queries: images (whatever embed takes), a gallery, or Parquet files with a column `embedding`
    output: a .parquet file, or a folder of parts; also in an object store
    """

    gallery: str = ""
    queries: str = ""
    output: str = ""
    bulk: BulkConfig = field(default_factory=BulkConfig)
    search: Find = field(default_factory=Find)
    run: SearchRunConfig = field(default_factory=SearchRunConfig)
    index: BuildConfig = field(default_factory=BuildConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)


@dataclass
class BulkSummary:
    """What was done: queries that were of no use among all, and the summary of each step (index, calibrate, search)."""

    gallery: str
    output: str
    dry_run: bool = False
    queries: int = 0
    failed: int = 0
    over_budget: bool = False
    steps: dict[str, Any] = field(default_factory=dict)


def run(
    config: BulkSearchConfig,
    *,
    dry_run: bool = False,
    progress: Progress = lambda line: None,
    searched: SearchProgress = lambda summary: None,
) -> BulkSummary:
    """Search. A job that died is run again, and goes on from its last finished block.

    dry_run: only say what would be searched. Raises EvaluationError where the gallery's labels do not show a threshold.
    """
    _check(config)
    if dry_run:
        return _planned(config)
    return _searched(config, config.gallery, progress, searched)


@records("bulk_search")
def _searched(config: BulkSearchConfig, gallery: str, progress: Progress, searched: SearchProgress) -> BulkSummary:
    summary = BulkSummary(gallery, config.output)
    follow(summary)
    if config.bulk.update_index and _behind(gallery):
        progress("index")
        summary.steps["index"] = asdict(index.run(IndexConfig(config.index), gallery, progress=progress))
    find = _calibrated(config, summary, progress)
    progress("search")
    with_settings = SearchConfig(find, config.run, config.embed)
    local = _local(config.output)
    found = search.run(with_settings, gallery, config.queries, local, searched)
    _deliver(local, config.output)
    summary.steps["search"] = {**asdict(found), "out": config.output}
    summary.queries = max(found.queries, sum(found.images.values()))
    summary.failed = sum(found.bad.values()) + sum(found.images.get(status, 0) for status in FAILED)
    summary.over_budget = summary.failed > config.bulk.max_failed * summary.queries
    return summary


def _behind(gallery: str) -> bool:
    """Whether the table has moved on. An index that is up to date stays untouched: a search that was broken off goes on
    only in the index that it began with."""
    return not manifests.exists(gallery) or manifests.load(gallery).table_version != Gallery(gallery).version


def _calibrated(config: BulkSearchConfig, summary: BulkSummary, progress: Progress) -> Find:
    """What is looked for, with the threshold for the rate of false alarms; the same one whenever it is asked for."""
    if config.bulk.fpir is None:
        return config.search
    progress(f"threshold for FPIR={config.bulk.fpir:g}")
    opened = Index(config.gallery, config.search.recall)
    point = operating_point(probe(Gallery(config.gallery), opened), config.bulk.fpir)
    summary.steps["calibrate"] = {**point.to_dict(), "few": few(point)}
    return replace(config.search, threshold=point.threshold)


def _local(output: str) -> str:
    """Where the answers are written: blocks that are finished stay there until all are."""
    if not storage.is_remote(output):
        return output
    name = f"{hash64(output):016x}" + (".parquet" if output.endswith(".parquet") else "")
    return os.path.join(mirror.cache(), "searches", name)


def _deliver(local: str, output: str) -> None:
    """Answers that go to an object store are uploaded when they are complete."""
    if local == output:
        return
    if os.path.isdir(local):
        for name in sorted(os.listdir(local)):
            storage.write_file(storage.join(output, name), os.path.join(local, name))
        shutil.rmtree(local)
    else:
        storage.write_file(output, local)
        os.unlink(local)


def _check(config: BulkSearchConfig) -> None:
    for name in ("gallery", "queries", "output"):
        if not getattr(config, name):
            raise ConfigError(f'the config names no {name}: {name} = "..."')
    if config.bulk.fpir is not None and config.search.threshold is not None:
        raise ConfigError("bulk.fpir and search.threshold both set the threshold: give one of them")
    if config.embed.source.uri:
        raise ConfigError("embed.source.uri is not for this job: queries says where the images are")


def _planned(config: BulkSearchConfig) -> BulkSummary:
    """Listings are read, nothing else, and nothing is written."""
    summary = BulkSummary(config.gallery, config.output, dry_run=True)
    held = Gallery(config.gallery)
    indexed = manifests.load(held.path).live if manifests.exists(held.path) else 0
    behind = _behind(held.path)
    summary.steps["index"] = {
        "faces": sum(file["faces"] for file in held.files()),
        "indexed": indexed,
        "update": behind and config.bulk.update_index,
    }
    queries = open_queries(config.queries, held.contract)
    if queries is not None:
        summary.steps["search"] = {"blocks": sum(1 for _ in queries.blocks(config.run.block))}
        return summary
    source = open_source(replace(config.embed.source, uri=config.queries))
    summary.steps["search"] = {"images": sum(1 for _ in source)}
    return summary
