"""bulk_search: search a batch of queries in a gallery, and identify them; update the index first if configured."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated

from pydantic import Field

from facepipe.decisions.gallery import DecidedGallery
from facepipe.errors import ConfigError
from facepipe.evaluation.identification import choose_threshold
from facepipe.gallery import Gallery
from facepipe.index import manifest as manifests
from facepipe.index.answers import SearchOptions
from facepipe.index.queries import open_queries
from facepipe.schema import FAILED
from facepipe.sources import open_source
from pipelines import index, search
from pipelines.embed.config import EmbedConfig
from pipelines.index import BuildConfig, IndexConfig
from pipelines.job import JobSummary, OnLine, Share, count_indexed
from pipelines.runtime.run_record import attach_summary, record_calls
from pipelines.search import SearchConfig, SearchRunConfig, SearchSummary
from pipelines.search.parts import check_output

OnSearch = Callable[[SearchSummary], None]


@dataclass(frozen=True)
class BulkConfig:
    """What the job does around the search, and when it counts as failed.

    Attributes:
        update_index: Whether to bring the index up to date with the gallery first. Otherwise the job searches the faces
            that the index holds.
        fpir: Rate of false alarms to choose the threshold for, from searches in the gallery itself. It needs labels,
            and replaces search.threshold.
        max_failed: Largest share of the queries that may fail (unreadable images, broken vectors); above it the exit
            code is 3.
    """

    update_index: bool = False
    fpir: Annotated[float, Field(gt=0, lt=1)] | None = None
    max_failed: Share = 0.01


@dataclass(frozen=True)
class BulkSearchConfig:
    """The settings of the job: gallery, queries, output, and the sections of its steps.

    Attributes:
        gallery: Folder of the gallery to search.
        queries: Images (whatever `embed` takes), a gallery, or Parquet files with a column `embedding`.
        output: A .parquet file, or a folder of parts; also in an object store.
        bulk: What the job does around the search, and when it counts as failed.
        search: What to search for, as in `search`.
        run: Distribution of the search, as in `search`.
        index: How to build the index, for bulk.update_index.
        embed: How to embed queries that are images: the sections of `embed`.
    """

    gallery: str = ""
    queries: str = ""
    output: str = ""
    bulk: BulkConfig = field(default_factory=BulkConfig)
    search: SearchOptions = field(default_factory=SearchOptions)
    run: SearchRunConfig = field(default_factory=SearchRunConfig)
    index: BuildConfig = field(default_factory=BuildConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)


@dataclass
class BulkSummary(JobSummary):
    """The figures of a run; its steps are index, calibrate and search.

    Attributes:
        output: where the answers are.
        queries: number of queries; `failed` counts those among them that could not be searched.
    """

    output: str = ""
    queries: int = 0


def run(
    config: BulkSearchConfig,
    *,
    dry_run: bool = False,
    on_progress: OnLine = lambda line: None,
    on_search: OnSearch = lambda summary: None,
) -> BulkSummary:
    """Search all queries. Run it again to resume from the last finished block.

    Args:
        config: settings of the job.
        dry_run: only count what would be searched; write nothing.
        on_progress: receives the name of each step, and its messages.
        on_search: receives the running figures of the search.

    Returns:
        The figures of the run.

    Raises:
        ConfigError: if the config lacks a path, or sets the threshold twice.
        EvaluationError: if the gallery's labels are too few to choose a threshold for bulk.fpir.
    """
    _check(config)
    if dry_run:
        return _preview(config)
    return _run_search(config, config.gallery, on_progress, on_search)


@record_calls("bulk_search")
def _run_search(config: BulkSearchConfig, gallery: str, on_progress: OnLine, on_search: OnSearch) -> BulkSummary:
    summary = BulkSummary(gallery, output=config.output)
    attach_summary(summary)
    if config.bulk.update_index and _is_index_outdated(gallery):
        on_progress("index")
        summary.add_step("index", index.run(IndexConfig(config.index), gallery, on_progress=on_progress))
    check_output(config.output)  # before anything is searched
    find = _set_threshold(config, summary, on_progress)

    on_progress("search")
    search_config = SearchConfig(find, config.run, config.embed)
    searched = search.run(search_config, gallery, config.queries, config.output, on_search)
    summary.steps["search"] = asdict(searched)
    # Queries made of images are faces. Images without a face are inputs too, so the larger count is taken.
    summary.queries = max(searched.queries, sum(searched.images.values()))
    failed_images = sum(searched.images.get(status, 0) for status in FAILED)
    summary.failed = sum(searched.bad.values()) + failed_images
    summary.over_budget = summary.failed > config.bulk.max_failed * summary.queries
    return summary


def _is_index_outdated(gallery: str) -> bool:
    """Tell whether the table is newer than the index.

    An index that is up to date stays untouched, because an interrupted search resumes only in the index it began with.
    """
    return not manifests.exists(gallery) or manifests.load(gallery).table_version != Gallery(gallery).version


def _set_threshold(config: BulkSearchConfig, summary: BulkSummary, on_progress: OnLine) -> SearchOptions:
    """Return what to search for, with the threshold for bulk.fpir. The same gallery gives the same threshold."""
    if config.bulk.fpir is None:
        return config.search
    on_progress(f"threshold for FPIR={config.bulk.fpir:g}")
    point = choose_threshold(DecidedGallery(config.gallery), config.bulk.fpir, config.search.recall)
    summary.steps["calibrate"] = {**point.to_dict(), "few": point.has_few_alarms}
    return replace(config.search, threshold=point.threshold)


def _check(config: BulkSearchConfig) -> None:
    for name in ("gallery", "queries", "output"):
        if not getattr(config, name):
            raise ConfigError(f'the config names no {name}: add {name} = "..."')
    if config.bulk.fpir is not None and config.search.threshold is not None:
        raise ConfigError("bulk.fpir and search.threshold both set the threshold: remove one of them")
    if config.embed.source.uri:
        raise ConfigError(
            f"embed.source.uri={config.embed.source.uri!r} has no effect in this job: set queries instead"
        )


def _preview(config: BulkSearchConfig) -> BulkSummary:
    """Count what would be searched. Only listings and the table are read, and nothing is written."""
    summary = BulkSummary(config.gallery, dry_run=True, output=config.output)
    gallery = Gallery(config.gallery)
    update = _is_index_outdated(gallery.path) and config.bulk.update_index
    summary.steps["index"] = {**count_indexed(gallery), "update": update}

    # Queries that have vectors are counted in blocks; images are only listed.
    queries = open_queries(config.queries, gallery.contract)
    if queries is not None:
        summary.steps["search"] = {"blocks": sum(1 for _ in queries.cut_blocks(config.run.block))}
        return summary
    images = open_source(replace(config.embed.source, uri=config.queries))
    summary.steps["search"] = {"images": sum(1 for _ in images)}
    return summary
