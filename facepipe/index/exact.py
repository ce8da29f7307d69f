"""Exact search by scanning every vector: the reference for recall, and the faster way for few vectors or on a GPU."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from facepipe.index.rounds import Answer
from facepipe.index.shard import Shard
from facepipe.index.shard_set import HasShards
from facepipe.nearest.distances import Hits, VectorBlock, compute_pair_distances
from facepipe.nearest.faiss_engine import faiss
from facepipe.types import Bool, Float32, Int64

_BLOCK_ROWS = 65_536  # vectors scanned at a time
_DEVICE_BLOCK_ROWS = 262_144  # on a GPU: picking pairs out of a block costs the same for a large one
_QUERIES_PER_PRODUCT = 256  # of a search by radius: a block's product takes 64 MiB
_MAX_PENDING_PAIRS = 20_000_000
_ROUNDING = 1e-5  # of a cosine in single precision
_SPARE = 22  # neighbours beyond k that are re-scored, because matrix products round


def read_live_blocks(index: HasShards, rows: int = _BLOCK_ROWS) -> Iterator[VectorBlock]:
    """Read all vectors that a search can return, from the side files; memory is that of one block."""
    index.follow_erasures()
    yield from read_shard_blocks(index.shards, rows)


def read_shard_blocks(shards: Sequence[Shard], rows: int = _BLOCK_ROWS) -> Iterator[VectorBlock]:
    """Read all vectors of shards that a search can return; memory is that of one block."""
    for shard in shards:
        live = shard.find_live_rows()
        ids = shard.read_ids_by_row()
        for at in range(0, len(ids), rows):
            part = slice(at, at + rows)
            vectors = shard.read_vectors(at, at + rows)
            if live is None:
                yield VectorBlock(ids[part], vectors)
            else:
                yield VectorBlock(ids[part][live[part]], vectors[live[part]])


def search_exactly(queries: Float32, blocks: Iterable[VectorBlock], k: int, device: str = "cpu") -> Hits:
    """Find the k nearest vectors of all blocks to each query, by comparing all of them.

    The CPU's matrix products round, so that a few more than k are re-scored. On another device
    facepipe.nearest.knn_gpu searches, which rules out none wrongly.

    Args:
        queries: (n, dim).
        blocks: the vectors.
        k: neighbours per query.
        device: `cpu`, or a device of torch.

    Returns:
        Hits (n, k) with Euclidean distances.
    """
    hits = _find_squared(queries, blocks, k, device)
    return Hits(hits.ids, np.sqrt(hits.distances))


def find_exact(queries: Float32, shards: Sequence[Shard], k: int, device: str = "cpu") -> Hits:
    """Find the k nearest vectors of shards in blocks of a size that suits the device; their distances are squared."""
    block_rows = _BLOCK_ROWS if device == "cpu" else _DEVICE_BLOCK_ROWS
    return _find_squared(queries, read_shard_blocks(shards, block_rows), k, device)


def _find_squared(queries: Float32, blocks: Iterable[VectorBlock], k: int, device: str) -> Hits:
    queries = np.ascontiguousarray(queries, np.float32)
    return _scan_on_cpu(queries, blocks, k) if device == "cpu" else _scan_on_device(queries, blocks, k, device)


def scan_index(index: HasShards, queries: Float32, k: int, device: str = "cpu") -> Hits:
    """Search exactly among all that an index can return."""
    index.follow_erasures()
    return index.shard_set.scan_nearest(queries, k, device)


def scan_within(index: HasShards, queries: Float32, radius: float, max_faces: int = 100_000) -> list[Answer]:
    """Find all faces within a Euclidean distance of each query, by comparing with all that an index can return.

    Args:
        index: that is searched.
        queries: unit vectors (n, dim).
        radius: distance.
        max_faces: maximum faces per query, the nearest.

    Returns:
        Per query (ids, distances), nearest first, ties by id.
    """
    index.follow_erasures()
    return index.shard_set.scan_within(queries, radius, max_faces)


def find_within_exactly(queries: Float32, shards: Sequence[Shard], radius: float, max_faces: int) -> "FoundPairs":
    """Find the faces of shards within a Euclidean distance of queries (n, dim), the nearest `max_faces` of each."""
    queries = np.ascontiguousarray(queries, np.float32)
    pairs = FoundPairs.create_empty()
    pending: list[FoundPairs] = []
    for found in find_within(queries, read_shard_blocks(shards), radius):
        pending.append(found)
        # Now and then drop what is not among the nearest.
        if sum(len(part.ids) for part in pending) > _MAX_PENDING_PAIRS:
            pairs = FoundPairs.concatenate([pairs, *pending]).keep_nearest(max_faces)
            pending = []
    return FoundPairs.concatenate([pairs, *pending]).keep_nearest(max_faces)


def find_within(queries: Float32, blocks: Iterable[VectorBlock], radius: float) -> "Iterator[FoundPairs]":
    """Find the vectors of each block within a Euclidean distance of queries (n, dim)."""
    for block in blocks:
        vectors = np.ascontiguousarray(block.vectors)
        for at in range(0, len(queries), _QUERIES_PER_PRODUCT):
            part = queries[at : at + _QUERIES_PER_PRODUCT]
            # Products round: take a few more, and compute their distances one by one.
            rows, columns = np.nonzero(part @ vectors.T >= 1 - radius**2 / 2 - _ROUNDING)
            squared = compute_pair_distances(part, rows, vectors, columns)
            distances = np.sqrt(squared)
            inside = distances <= radius
            yield FoundPairs(rows[inside] + at, block.ids[columns[inside]], distances[inside])


@dataclass(frozen=True)
class FoundPairs:
    """Pairs of a query and a face within a distance.

    Attributes:
        queries: Row of the query, (m,).
        ids: Face ids (m,).
        distances: Distances (m,).
    """

    queries: Int64
    ids: Int64
    distances: Float32

    @classmethod
    def create_empty(cls) -> "FoundPairs":
        """Create no pairs."""
        return cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))

    @classmethod
    def concatenate(cls, parts: "list[FoundPairs]") -> "FoundPairs":
        """Put pairs one below the other."""
        return cls(
            np.concatenate([part.queries for part in parts]),
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.distances for part in parts]),
        )

    def take(self, chosen: Int64 | Bool) -> "FoundPairs":
        """Take some pairs, by position or by mask."""
        return FoundPairs(self.queries[chosen], self.ids[chosen], self.distances[chosen])

    def keep_nearest(self, count: int) -> "FoundPairs":
        """Sort by query, distance and id, and keep the nearest faces of each query."""
        order = np.lexsort((self.ids, self.distances, self.queries))
        queries = self.queries[order]
        rank = np.arange(len(order)) - np.searchsorted(queries, queries)
        return self.take(order[rank < count])

    def to_answers(self, queries: int) -> list[Answer]:
        """Split pairs that are sorted by query into (ids, distances) per query."""
        begins = np.searchsorted(self.queries, np.arange(queries + 1))
        return [(self.ids[begin:end], self.distances[begin:end]) for begin, end in pairwise(begins)]


def _scan_on_cpu(queries: Float32, blocks: Iterable[VectorBlock], k: int) -> Hits:
    hits = Hits.create_empty(len(queries), k)
    for block in blocks:
        if not len(block.ids):
            continue
        vectors = np.ascontiguousarray(block.vectors)
        # Rounded products find a few more than k; their distances are then computed exactly.
        count = min(k + _SPARE, len(block.ids))
        rows = faiss.knn(queries, vectors, count)[1]
        query_rows = np.repeat(np.arange(len(queries)), count)
        distances = compute_pair_distances(queries, query_rows, vectors, rows.ravel())
        hits = merge_hits(hits, Hits(block.ids[rows], distances.reshape(len(queries), count)), k)
    return hits


def _scan_on_device(queries: Float32, blocks: Iterable[VectorBlock], k: int, device: str) -> Hits:
    from facepipe.nearest.knn_gpu import find_neighbours  # loads torch

    return find_neighbours(queries, blocks, k, device)


def merge_hits(left: Hits, right: Hits, k: int) -> Hits:
    """Merge the hits of the same queries and keep the k nearest."""
    ids = np.concatenate([left.ids, right.ids], axis=1)
    distances = np.concatenate([left.distances, right.distances], axis=1)
    order = np.lexsort((ids, distances), axis=1)[:, :k]
    return Hits(np.take_along_axis(ids, order, axis=1), np.take_along_axis(distances, order, axis=1))
