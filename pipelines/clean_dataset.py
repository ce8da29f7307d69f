"""clean_dataset: embed a face dataset, find its copies, judge its labels, and list the images fit for training."""

from contextlib import closing
from dataclasses import dataclass, field

from facepipe import storage
from facepipe.curation.cleaning.judge import CleanRules
from facepipe.curation.duplicates import DuplicateRule
from facepipe.moves.settle import settle_source
from facepipe.sources import SourceConfig, locate_source, open_source
from pipelines import clean, dedup, embed
from pipelines.clean import CleanConfig
from pipelines.dedup import DedupConfig
from pipelines.embed.checks import require_usable
from pipelines.graph import GraphConfig
from pipelines.job import EmbedSections, JobSummary, OnEmbed, OnLine, Share, check_job, load_known, open_gallery
from pipelines.runtime.listing import count_listed
from pipelines.runtime.run_record import attach_summary, record_calls
from pipelines.runtime.workspace import REPORTS


@dataclass(frozen=True)
class DatasetConfig:
    """What the job does besides cleaning, and when it counts as failed.

    Attributes:
        max_failed: Largest share of the images read that may fail; above it the exit code is 3.
        copies: Whether to report all copies as well, in GALLERY/reports/dedup. The clean lists hold no copies in any
            case, unless clean.duplicates is false.
        against: Another gallery, such as one of the test images. Images and identities in both are listed in
            GALLERY/reports/overlap.
    """

    max_failed: Share = 0.01
    copies: bool = True
    against: str | None = None


@dataclass(frozen=True)
class CleanDatasetConfig(EmbedSections):
    """The settings of the job: its gallery, its sources, and the sections of its steps, those of `embed` among them.

    Attributes:
        gallery: Folder of the gallery; the first run creates it.
        source: Folders, lists or archives with the images.
        dataset: What the job does besides cleaning, and when it counts as failed.
        dedup: Rules for copies, as in `dedup`.
        clean: Rules for unfit faces, as in `clean`.
        graph: Which faces are compared, as in `cluster`.
    """

    gallery: str = ""
    source: tuple[SourceConfig, ...] = ()
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    dedup: DuplicateRule = field(default_factory=DuplicateRule)
    clean: CleanRules = field(default_factory=CleanRules)
    graph: GraphConfig = field(default_factory=GraphConfig)


@dataclass
class DatasetSummary(JobSummary):
    """The figures of a run.

    Attributes:
        images: number of images read; `failed` counts those among them that failed.
        lists: folder of the clean lists.
    """

    images: int = 0
    lists: str = ""


def run(
    config: CleanDatasetConfig,
    *,
    dry_run: bool = False,
    on_progress: OnLine = lambda line: None,
    on_embed: OnEmbed = lambda summary: None,
) -> DatasetSummary:
    """Embed new images, then judge the labels of the whole dataset. Run it again to resume after a crash.

    Args:
        config: settings of the job.
        dry_run: only count what would be embedded; write nothing.
        on_progress: receives the name of each step, and its messages.
        on_embed: receives the running figures of the step `embed`.

    Returns:
        The figures of the run.

    Raises:
        ConfigError: if the config names no gallery or no source.
        GalleryError: if no image has a label.
    """
    check_job(config.gallery, config.source)
    if dry_run:
        return _preview(config)
    return _clean_dataset(config, config.gallery, on_progress, on_embed)


@record_calls("clean_dataset")
def _clean_dataset(config: CleanDatasetConfig, gallery: str, on_progress: OnLine, on_embed: OnEmbed) -> DatasetSummary:
    summary = DatasetSummary(gallery)
    attach_summary(summary)

    # Embed what is new in each source.
    for source in config.source:
        on_progress(f"embed {source.name or locate_source(source).name}")
        embedded = embed.run(config.build_embed_config(source), gallery, on_embed)
        for note in embedded.notes:
            on_progress(f"embed {embedded.source}: {note}")
        summary.add_step(f"embed {embedded.source}", embedded)
        summary.images += embedded.images
        summary.failed += embedded.failed
    summary.over_budget = summary.failed > config.dataset.max_failed * summary.images

    # Report copies within the dataset, and images that another gallery holds as well.
    duplicates = DedupConfig(config.dedup, config.graph)
    if config.dataset.copies:
        on_progress("dedup")
        summary.add_step("dedup", dedup.run(duplicates, gallery, None, on_progress))
    if config.dataset.against:
        on_progress("overlap")
        summary.add_step("overlap", dedup.run(duplicates, gallery, config.dataset.against, on_progress))

    # Judge the labels and write the lists.
    on_progress("clean")
    summary.add_step("clean", clean.run(CleanConfig(config.clean, config.dedup, config.graph), gallery, on_progress))
    summary.lists = storage.join(gallery, REPORTS, clean.NAME)
    return summary


def _preview(config: CleanDatasetConfig) -> DatasetSummary:
    """Count what would be embedded, and refuse what a run refuses. Nothing is written."""
    require_usable(config.build_embed_config(config.source[0]), config.gallery)
    summary = DatasetSummary(config.gallery, dry_run=True)
    gallery = open_gallery(config.gallery)
    for source in config.source:
        # Each source is compared with what the gallery knows of it alone.
        settled = settle_source(gallery, source)
        with closing(load_known(gallery, settled.rows)) as known:
            summary.steps[f"embed {settled.name}"] = count_listed(open_source(settled.config), known)
    return summary
