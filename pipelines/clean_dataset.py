"""clean_dataset: a face dataset in, lists of the images fit for training out: embed, dedup, clean."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import Field

from facepipe import storage
from facepipe.curation.duplicates import DuplicateRule
from facepipe.errors import ConfigError
from facepipe.gallery import Gallery, suppressed
from facepipe.gallery.known import KnownImages
from facepipe.sources import SourceConfig, open_source
from facepipe.stages import Align, Decode, Detect, Embed, Read
from pipelines import clean, dedup, embed
from pipelines.clean import CleanConfig, CleanRules
from pipelines.dedup import DedupConfig
from pipelines.embed.config import EmbedConfig, RunConfig
from pipelines.embed.summary import Summary
from pipelines.graph import GraphConfig
from pipelines.runtime.listing import listed
from pipelines.runtime.run_record import follow, records
from pipelines.runtime.workspace import REPORTS

Progress = Callable[[str], None]
EmbedProgress = Callable[[Summary], None]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class DatasetConfig:
    """What the job does, and when it counts as failed.

    max_failed: share of the images read that may fail before the exit code is 3
    copies: a report of all copies as well (GALLERY/reports/dedup); the clean lists are without copies in any case,
        unless clean.duplicates is false
    against: another gallery, such as one of the test images: what both hold is named in GALLERY/reports/overlap
    """

    max_failed: Share = 0.01
    copies: bool = True
    against: str | None = None


@dataclass(frozen=True)
class CleanDatasetConfig:
    """Everything the job can be told: where the gallery is, what goes in, and the sections of its commands."""

    gallery: str = ""
    source: tuple[SourceConfig, ...] = ()
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    read: Read = field(default_factory=Read)
    decode: Decode = field(default_factory=Decode)
    detect: Detect = field(default_factory=Detect)
    align: Align = field(default_factory=Align)
    embed: Embed = field(default_factory=Embed)
    run: RunConfig = field(default_factory=RunConfig)
    dedup: DuplicateRule = field(default_factory=DuplicateRule)
    clean: CleanRules = field(default_factory=CleanRules)
    graph: GraphConfig = field(default_factory=GraphConfig)


@dataclass
class DatasetSummary:
    """What was done: the summary of each step, images that failed among those that were read, and the lists' folder."""

    gallery: str
    dry_run: bool = False
    images: int = 0
    failed: int = 0
    over_budget: bool = False
    lists: str = ""
    steps: dict[str, Any] = field(default_factory=dict)


def run(
    config: CleanDatasetConfig,
    *,
    dry_run: bool = False,
    progress: Progress = lambda line: None,
    embedded: EmbedProgress = lambda summary: None,
) -> DatasetSummary:
    """Embed what is new, then judge all of it. A job that died is run again, and goes on from what is finished.

    dry_run: only say what would be embedded. Raises GalleryError where no image has a label.
    """
    _check(config)
    if dry_run:
        return _planned(config)
    return _cleaned(config, config.gallery, progress, embedded)


@records("clean_dataset")
def _cleaned(config: CleanDatasetConfig, gallery: str, progress: Progress, embedded: EmbedProgress) -> DatasetSummary:
    summary = DatasetSummary(gallery)
    follow(summary)
    for source in config.source:
        name = open_source(source).name
        progress(f"embed {name}")
        found = embed.run(embed_config(config, source), gallery, embedded)
        summary.steps[f"embed {name}"] = found.to_dict()
        summary.images += found.images
        summary.failed += found.failed
    summary.over_budget = summary.failed > config.dataset.max_failed * summary.images
    if config.dataset.copies:
        progress("dedup")
        copies = DedupConfig(config.dedup, config.graph)
        summary.steps["dedup"] = asdict(dedup.run(copies, gallery, progress=progress))
    if config.dataset.against:
        progress("overlap")
        shared = dedup.run(DedupConfig(config.dedup, config.graph), gallery, config.dataset.against, progress)
        summary.steps["overlap"] = asdict(shared)
    progress("clean")
    rules = CleanConfig(config.clean, config.dedup, config.graph)
    summary.steps["clean"] = asdict(clean.run(rules, gallery, progress))
    summary.lists = storage.join(gallery, REPORTS, clean.NAME)
    return summary


def embed_config(config: CleanDatasetConfig, source: SourceConfig) -> EmbedConfig:
    """What `embed` is told about a source."""
    parts = {name: getattr(config, name) for name in ("read", "decode", "detect", "align", "embed", "run")}
    return EmbedConfig(source, **parts)


def _check(config: CleanDatasetConfig) -> None:
    if not config.gallery:
        raise ConfigError('the config names no gallery: gallery = "..."')
    if not config.source or not all(source.uri for source in config.source):
        raise ConfigError('the config names no source: [[source]] uri = "..."')
    names = [open_source(source).name for source in config.source]
    if len(set(names)) < len(names):
        raise ConfigError(f"two sources have one name ({', '.join(sorted(names))}): give each its own (source.name)")


def _planned(config: CleanDatasetConfig) -> DatasetSummary:
    """Listings are read, nothing else, and nothing is written."""
    summary = DatasetSummary(config.gallery, dry_run=True)
    held = Gallery(config.gallery) if Gallery.exists(config.gallery) else None
    erased = suppressed.uris(config.gallery) if held else None
    for chosen in config.source:
        source = open_source(chosen)
        known = KnownImages(held, source.name, erased)
        try:
            summary.steps[f"embed {source.name}"] = listed(source, known)
        finally:
            known.close()
    return summary
