"""All shards of an index, wherever they are open: in this process, or with owners on other machines."""

from typing import Protocol

import pyarrow as pa

from facepipe.index.manifest import Manifest
from facepipe.index.rounds import Answer, SearchSetting
from facepipe.index.shard import Shard
from facepipe.nearest.distances import Hits
from facepipe.types import Float32, Int64


class ShardSet(Protocol):
    """What an index asks of its shards. Queries are unit vectors (n, dim)."""

    @property
    def live(self) -> int:
        """Vectors that a search can return."""

    @property
    def lists(self) -> int:
        """Inverted lists; 0 for an exact index."""

    def find_nearest(self, queries: Float32, k: int, setting: SearchSetting) -> Hits:
        """Find the k nearest faces among those of the nearest lists."""

    def find_within(self, queries: Float32, radius: float, max_faces: int, setting: SearchSetting) -> list[Answer]:
        """Find the faces of the nearest lists within a Euclidean distance, nearest first."""

    def scan_nearest(self, queries: Float32, k: int, device: str = "cpu") -> Hits:
        """Find the k nearest faces by comparing with all vectors."""

    def scan_within(self, queries: Float32, radius: float, max_faces: int) -> list[Answer]:
        """Find all faces within a Euclidean distance by comparing with all vectors, nearest first."""

    def hide(self, ids: Int64) -> None:
        """Return some faces no more; nothing is written."""

    def find_unreturned(self, before: Manifest, now: Manifest) -> Int64:
        """Find the ids that these shards return of a manifest, and the index of a newer one does not."""

    def read_labels(self, ids: Int64) -> pa.Table:
        """Read uri and identity of face ids (n,), in their order; null for those that no shard holds."""

    def read_vectors(self, ids: Int64, dim: int) -> Float32:
        """Read the vectors (n, dim) of face ids (n,); zeros for those that no shard holds."""


class HasShards(Protocol):
    """An index, as far as a search asks for its shards."""

    @property
    def shard_set(self) -> ShardSet:
        """All shards, wherever they are open."""

    @property
    def shards(self) -> list[Shard]:
        """The shards that are open in this process, newest first."""

    def follow_erasures(self) -> None:
        """Stop returning what is being erased, and what was erased since the index was opened."""
