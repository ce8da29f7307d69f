"""Settings of `search`, and the summary of a run."""

from dataclasses import dataclass, field
from typing import Literal

from facepipe.index.answers import SearchCounts, SearchOptions
from pipelines.embed.config import Count, EmbedConfig


@dataclass(frozen=True)
class SearchRunConfig:
    """How the work is run. None of it changes the result.

    Attributes:
        runner: inline (this process, all its CPUs), ray (one task per block), or auto: ray if RAY_ADDRESS names a
            cluster.
        block: Queries per block, which is repeated if it was interrupted.
        cpus: CPUs per Ray task.
        device: Device that compares queries with every vector, if that is done: auto (a GPU if there is one and it
            pays), cpu, cuda or cuda:N. All vectors are sent to a GPU once per block, so that larger blocks pay there.
        placement: Where shards are opened on Ray: copies (every worker opens all), owners (each shard is opened once in
            the cluster, by one of its owners), or auto: by the shards' bytes, the nodes' memory and the queries.
        owners: Owners of shards; by default one per node.
    """

    runner: Literal["auto", "inline", "ray"] = "auto"
    block: Count = 20_000
    cpus: Count = 2
    device: str = "auto"
    placement: Literal["auto", "copies", "owners"] = "auto"
    owners: Count | None = None


@dataclass(frozen=True)
class SearchConfig:
    """All settings of `search`.

    Attributes:
        search: What to look for.
        run: How the work is run.
        embed: Settings for queries that are images; the models are those of the gallery.
    """

    search: SearchOptions = field(default_factory=SearchOptions)
    run: SearchRunConfig = field(default_factory=SearchRunConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)


@dataclass
class SearchSummary:
    """What a search did.

    Attributes:
        queries: All queries.
        rows: Faces found.
        identified: Queries with an identity.
        unknown: Queries without one.
        bad: Queries that could not be searched, by reason.
        images: Query images by status.
        blocks: Blocks of queries.
        skipped_blocks: Blocks that an earlier run had finished.
        path: lists (visited the nearest lists) or scan (compared with every vector).
        vectors: Vectors in the index.
        nprobe: Lists visited per query.
        rescore: Candidates re-scored per query.
        recall: Measured share of the true faces that are found, of the k nearest or within the radius; a lower bound.
            None if it was not measured.
        recall_of: What it is the recall of: recall@K, or recall within a radius.
        recall_at_10: The same, if up to ten neighbours are asked for.
        threshold: Maximum distance of a match.
        notes: What a user may want to know of how the queries were read, and of the index.
        placement: Where the shards were opened: copies or owners.
        placement_reason: Why there; empty if nothing was to be chosen.
        lacking: Faces of the gallery that the index lacks, and the search could not find.
        seconds: Wall clock.
        out: Path of the results.
    """

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
    recall: float | None = None
    recall_of: str = ""
    recall_at_10: float | None = None
    threshold: float | None = None
    notes: tuple[str, ...] = ()
    placement: str = "copies"
    placement_reason: str = ""
    lacking: int = 0
    seconds: float = 0.0
    out: str = ""

    def add_counts(self, counts: SearchCounts) -> None:
        """Add the counts of a block."""
        self.queries += counts.queries
        self.rows += counts.rows
        self.identified += counts.identified
        self.unknown += counts.unknown
        for reason, count in counts.bad.items():
            self.bad[reason] = self.bad.get(reason, 0) + count
