"""What the jobs that run from one TOML file have in common: summary, checks of sources, steps, dry runs."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, Protocol

from pydantic import Field

from facepipe.errors import ConfigError
from facepipe.gallery import Gallery, suppressed
from facepipe.gallery.known import KnownImages
from facepipe.gallery.sources import SourceRows
from facepipe.index import manifest as manifests
from facepipe.sources import SourceConfig
from facepipe.stages import Align, Decode, Detect, Embed, Read
from pipelines.embed.config import EmbedConfig, MissingConfig, RunConfig
from pipelines.embed.summary import EmbedSummary

Share = Annotated[float, Field(ge=0, le=1)]
OnLine = Callable[[str], None]
OnEmbed = Callable[[EmbedSummary], None]


class HasUri(Protocol):
    """A source in a job's config."""

    @property
    def uri(self) -> str:
        """Where the images are."""

    @property
    def name(self) -> str | None:
        """Name that the user gives the source."""


@dataclass(frozen=True)
class EmbedSections:
    """The sections of `embed` in a job's config, shared by all its sources.

    Attributes:
        read: Reading of files.
        decode: Decoding of images.
        detect: Detection of faces.
        align: Alignment of faces.
        embed: Embedding of faces.
        run: Distribution of the work.
    """

    read: Read = field(default_factory=Read)
    decode: Decode = field(default_factory=Decode)
    detect: Detect = field(default_factory=Detect)
    align: Align = field(default_factory=Align)
    embed: Embed = field(default_factory=Embed)
    run: RunConfig = field(default_factory=RunConfig)

    def build_embed_config(self, source: SourceConfig, missing: MissingConfig | None = None) -> EmbedConfig:
        """Build the config of the step `embed` for one source.

        Args:
            source: where the images are.
            missing: what to do with images that the source no longer lists; nothing by default.
        """
        # Sections of a subclass, such as its gallery, are no sections of `embed`.
        sections = {section.name: getattr(self, section.name) for section in fields(EmbedSections)}
        return EmbedConfig(source, missing=missing or MissingConfig(), **sections)


@dataclass
class JobSummary:
    """The figures of a job.

    Attributes:
        gallery: folder of the gallery.
        dry_run: whether the figures say what the job would do.
        failed: number of inputs that failed.
        over_budget: whether more inputs failed than the config allows.
        steps: the summary of each step, by the step's name.
    """

    gallery: str
    dry_run: bool = False
    failed: int = 0
    over_budget: bool = False
    steps: dict[str, Any] = field(default_factory=dict)

    def add_step(self, name: str, summary: Any) -> None:
        """Store the figures of a finished step.

        Args:
            name: name of the step.
            summary: the dataclass that the step's pipeline returned.
        """
        self.steps[name] = summary.to_dict() if hasattr(summary, "to_dict") else asdict(summary)


def check_job(gallery: str, sources: Sequence[HasUri]) -> None:
    """Check that a job has a gallery, and sources without the same name.

    Args:
        gallery: folder of the gallery.
        sources: the `[[source]]` sections of the config.

    Raises:
        ConfigError: if the gallery or a source is missing, or if two sources have the same name.
    """
    if not gallery:
        raise ConfigError('the config names no gallery: add gallery = "FOLDER"')
    if not sources or not all(source.uri for source in sources):
        raise ConfigError('the config names no source: add [[source]] with uri = "..."')
    # Sources without a name get different ones in the gallery.
    names = [source.name for source in sources if source.name is not None]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(f"two sources have the name {repeated[0]!r}: give each its own source.name")


def open_gallery(path: str) -> Gallery | None:
    """Open a gallery for a dry run, or return None if there is none yet."""
    return Gallery(path) if Gallery.exists(path) else None


def load_known(gallery: Gallery | None, source: SourceRows) -> KnownImages:
    """Load what a gallery knows of a source's images. The caller closes it.

    Args:
        gallery: the gallery, or None if there is none yet.
        source: tells which rows are of the source.
    """
    return KnownImages(gallery, source, suppressed.read_uris(gallery.path) if gallery else None)


def count_indexed(gallery: Gallery) -> dict[str, int]:
    """Count the faces of a gallery, and those that its search index holds."""
    indexed = manifests.load(gallery.path).live if manifests.exists(gallery.path) else 0
    return {"faces": gallery.count_totals().faces, "indexed": indexed}
