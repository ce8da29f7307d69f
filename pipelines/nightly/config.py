"""Settings of the nightly job: one TOML file, with the sections of the commands that the job runs."""

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from pydantic import Field

from facepipe.curation.duplicates import DuplicateRule
from facepipe.erasure.purges import MOST_DAYS
from facepipe.gallery.maintenance.compact import CompactConfig
from facepipe.sources import BoxesFrame, SourceConfig, SourceKind, UnlistedBoxes, locate_source
from facepipe.sources.identity import IdentityRule
from pipelines.cluster.pipeline import ClusterRules
from pipelines.embed.config import EmbedConfig, MissingConfig
from pipelines.graph import GraphConfig
from pipelines.index import BuildConfig
from pipelines.job import EmbedSections, Share


@dataclass(frozen=True)
class NightSource:
    """A corpus that every night lists: the keys of a source, and what happens to its images over time.

    Attributes:
        uri: Where the images are: a folder, a glob, an s3:// prefix, a .parquet file or folder, a .tar, or a list file.
        kind: How to read it; auto decides from the uri.
        identity: Where labels come from, as in `embed`.
        label_column: Column of a list or a table that holds the label, by its name; in a list without a header by its
            number from 1.
        label_prefix: Put before each label, so that number 7 of this source is not number 7 of another.
        include: Patterns of what is listed; everything by default.
        exclude: Patterns of what is not listed.
        name: Name of the corpus in the table's column `source`; by default the last part of the uri, and more of it if
            another source of the gallery has that name.
        root: Folder that a list's paths are relative to; by default the list's own.
        boxes: Lists of the faces of images, which no detector then searches, as in `embed`.
        boxes_frame: Frame of their coordinates: displayed (EXIF applied), stored, or auto.
        boxes_unlisted: Images that no list names: detect (find their faces), or none (a row without a face).
        full_listing_every: Nights among which one looks at every file of a folder. The others pass over folders whose
            modification time is the same, and do not see a file that was written in its place.
        retention_days: Age after which images are erased, counted from when they were embedded. They do not come back.
        missing: What happens to images that the source no longer lists: keep, mark (in `missing_since`), or erase.
    """

    uri: str = ""
    kind: SourceKind = "auto"
    identity: IdentityRule = "auto"
    label_column: str | int | None = None
    label_prefix: str | None = None
    include: str | tuple[str, ...] = ()
    exclude: str | tuple[str, ...] = ()
    name: str | None = None
    root: str | None = None
    boxes: str | tuple[str, ...] = ()
    boxes_frame: BoxesFrame = "auto"
    boxes_unlisted: UnlistedBoxes = "detect"
    full_listing_every: Annotated[int, Field(ge=1)] = 1
    retention_days: Annotated[float, Field(gt=0)] | None = None
    missing: Literal["keep", "mark", "erase"] = "mark"

    @property
    def title(self) -> str:
        """Name of the source for the user; the gallery may have given it another one."""
        return self.name or locate_source(self.to_source()).name

    def to_source(self) -> SourceConfig:
        """Return the keys that `embed` takes."""
        return SourceConfig(**{key.name: getattr(self, key.name) for key in fields(SourceConfig)})


@dataclass(frozen=True)
class NightConfig:
    """What a night does, and when it counts as failed.

    Attributes:
        max_failed: Largest share of the images read tonight that may fail; above it the exit code is 3.
        few_failed: Number of images that may fail whatever their share is, for nights with few new images.
        missing_at_most: Largest share of a source's images that may be missing at once. Above it no image is marked or
            erased as missing, and the exit code is 1.
        retention_at_most: Largest share of a source's rows that may be past its retention at once. Above it none is
            erased, and the exit code is 1. By default three nights' worth, but at least 0.1 and at most 0.5.
        purge_days: Days that erased rows may stay on disk in large files, hidden from all readers, so that the erasures
            of several nights write each file once. 0 removes them at once.
        clusters: assign (new faces to the clusters that `facepipe cluster` made), make (also the first clusters, as
            [cluster] and [graph] say), or no.
        dedup: Whether to compare new images with all images.
    """

    max_failed: Share = 0.01
    few_failed: Annotated[int, Field(ge=0)] = 0
    missing_at_most: Share = 0.1
    retention_at_most: Share | None = None
    purge_days: Annotated[float, Field(ge=0, le=MOST_DAYS)] = 0.0
    clusters: Literal["assign", "make", "no"] = "assign"
    dedup: bool = True


@dataclass(frozen=True)
class NightlyConfig(EmbedSections):
    """The settings of the nightly job: its gallery, its sources, and the sections of its steps.

    Attributes:
        gallery: Folder of the gallery; the first night creates it.
        source: Corpora that every night lists.
        night: What a night does, and when it counts as failed.
        index: How to build the index, as in `index`.
        cluster: How to make the first clusters, as in `cluster`.
        graph: Which faces are compared for the first clusters, as in `cluster`.
        dedup: Rules for copies, as in `dedup`.
        compact: When to join small files of the table, as in `compact`.
    """

    gallery: str = ""
    source: tuple[NightSource, ...] = ()
    night: NightConfig = field(default_factory=NightConfig)
    index: BuildConfig = field(default_factory=BuildConfig)
    cluster: ClusterRules = field(default_factory=ClusterRules)
    graph: GraphConfig = field(default_factory=GraphConfig)
    dedup: DuplicateRule = field(default_factory=DuplicateRule)
    compact: CompactConfig = field(default_factory=CompactConfig)

    def build_source_config(self, source: NightSource) -> EmbedConfig:
        """Build the config of the step `embed` for one source.

        A source with `missing = "erase"` is marked by this step; a later step erases what is marked.
        """
        missing = MissingConfig("keep" if source.missing == "keep" else "mark", self.night.missing_at_most)
        return self.build_embed_config(source.to_source(), missing)

    def is_over_budget(self, failed: int, images: int) -> bool:
        """Tell whether more images failed than a night allows; those of all sources are counted together."""
        return failed > max(self.night.few_failed, self.night.max_failed * images)


def name_own_setting(refusal: str) -> str:
    """Return what `embed` says of missing images with the name that its setting has in a nightly config."""
    return refusal.replace("missing.at_most", "night.missing_at_most")
