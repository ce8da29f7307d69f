"""What the nightly job can be told: one TOML file, whose sections are those of the commands it is made of."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from facepipe.curation.duplicates import DuplicateRule
from facepipe.gallery.compact import CompactConfig
from facepipe.sources import Kind, SourceConfig, open_source
from facepipe.sources.identity import IdentityRule
from facepipe.stages import Align, Decode, Detect, Embed, Read
from pipelines.cluster.pipeline import ClusterRules
from pipelines.embed.config import RunConfig
from pipelines.graph import GraphConfig
from pipelines.index import BuildConfig

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class NightSource:
    """A corpus that is looked through every night: the keys of a source, and what becomes of its images in time.

    retention_days: images are erased this long after they were embedded, and do not come back
    missing: what happens to images that the source lists no more: keep, mark (`missing_since`), or erase
    """

    uri: str = ""
    kind: Kind = "auto"
    identity: IdentityRule = "auto"
    name: str | None = None
    root: str | None = None
    retention_days: Annotated[float, Field(gt=0)] | None = None
    missing: Literal["keep", "mark", "erase"] = "mark"

    @property
    def title(self) -> str:
        """Its name in the table's `source` column."""
        return self.name or open_source(self.to_source()).name

    def to_source(self) -> SourceConfig:
        """As `embed` is told."""
        return SourceConfig(self.uri, self.kind, self.identity, self.name, self.root)


@dataclass(frozen=True)
class NightConfig:
    """What a night does, and when it counts as failed.

    max_failed: share of the images read tonight that may fail before the exit code is 3
    few_failed: as many may fail whatever their share is, for nights that bring few images
    missing_at_most: share of a source's images that may be missing at once; where more are, none is touched and the
        exit code is 1
    clusters: assign (new faces to the clusters that `facepipe cluster` made), make (clusters as well, where there are
        none; [cluster] and [graph] say how), or no
    dedup: compare new images with all
    """

    max_failed: Share = 0.01
    few_failed: Annotated[int, Field(ge=0)] = 0
    missing_at_most: Share = 0.1
    clusters: Literal["assign", "make", "no"] = "assign"
    dedup: bool = True


@dataclass(frozen=True)
class NightlyConfig:
    """Everything the nightly job can be told: where the gallery is, what goes in, and the sections of its commands."""

    gallery: str = ""
    source: tuple[NightSource, ...] = ()
    night: NightConfig = field(default_factory=NightConfig)
    read: Read = field(default_factory=Read)
    decode: Decode = field(default_factory=Decode)
    detect: Detect = field(default_factory=Detect)
    align: Align = field(default_factory=Align)
    embed: Embed = field(default_factory=Embed)
    run: RunConfig = field(default_factory=RunConfig)
    index: BuildConfig = field(default_factory=BuildConfig)
    cluster: ClusterRules = field(default_factory=ClusterRules)
    graph: GraphConfig = field(default_factory=GraphConfig)
    dedup: DuplicateRule = field(default_factory=DuplicateRule)
    compact: CompactConfig = field(default_factory=CompactConfig)
