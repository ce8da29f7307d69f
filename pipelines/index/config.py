"""Settings of `index`, and the summary of a run."""

import time
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from pipelines.embed.config import Count

Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class BuildConfig:
    """What index is built, and when it is rebuilt.

    Attributes:
        memory: Memory budget of a process that builds.
        recall: recall@10 to reach; sets how many lists a search visits. By default 0.97 for a new index.
        factory: Factory string of faiss instead of the planned one (Flat, or IVF… with any code).
        shard_vectors: Maximum vectors per shard; by default what the memory allows, up to 8 million.
        max_dead: Share of deleted vectors above which a shard is rewritten without them.
        keep_hours: Hours for which replaced shards are kept, so that searches that began before can finish. A shard
            that holds erased faces is never kept.
        max_imbalance: Growth of the lists' imbalance since training above which the index is trained again.
        seed: Random seed of the training sample, and of the sample that recall is measured on.
    """

    memory: str = "4GiB"
    recall: Share | None = None
    factory: str | None = None
    shard_vectors: Count | None = None
    max_dead: Share = 0.2
    keep_hours: Annotated[float, Field(ge=0)] = 12.0
    max_imbalance: Annotated[float, Field(ge=1)] = 1.5
    seed: int = 0


@dataclass(frozen=True)
class IndexRunConfig:
    """How the work is run. None of it changes the result.

    Attributes:
        runner: inline (this process, all its CPUs), ray (one task per shard), or auto: ray if RAY_ADDRESS names a
            cluster.
        cpus: CPUs per Ray task.
    """

    runner: Literal["auto", "inline", "ray"] = "auto"
    cpus: Count = 2


@dataclass(frozen=True)
class IndexConfig:
    """All settings of `index`.

    Attributes:
        index: What is built.
        run: How the work is run.
    """

    index: BuildConfig = field(default_factory=BuildConfig)
    run: IndexRunConfig = field(default_factory=IndexRunConfig)


@dataclass
class IndexSummary:
    """What a run did, and the index that it left.

    Attributes:
        action: built, updated, unchanged or repaired.
        reason: Why it was built or repaired.
        table_version: Version of the table that the index covers.
        vectors: Vectors that a search can return.
        added: Faces added.
        removed: Faces deleted.
        unusable: Rows without a usable vector.
        shards: Shards of the index.
        dead: Deleted vectors that are still in shards.
        merged: Shards that were merged.
        factory: Factory string of faiss.
        nprobe: Lists visited per query.
        rescore: Candidates re-scored per query.
        recall_at_10: Measured recall, a lower bound; None if it was not measured.
        imbalance: Of the lists' lengths; 1 is perfect.
        bytes: Size of the shards on disk.
        seconds: Wall clock by phase.
    """

    action: str = "unchanged"
    reason: str = ""
    table_version: int = -1
    vectors: int = 0
    added: int = 0
    removed: int = 0
    unusable: int = 0
    shards: int = 0
    dead: int = 0
    merged: int = 0
    factory: str = ""
    nprobe: int = 1
    rescore: int = 0
    recall_at_10: float | None = None
    imbalance: float = 1.0
    bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def add_time(self, phase: str, began: float) -> None:
        """Add the seconds since `began`, of the monotonic clock, to a phase."""
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + time.monotonic() - began, 3)
