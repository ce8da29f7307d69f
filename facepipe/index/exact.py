"""Exact search by scanning every vector: the reference for recall, and the faster way for few vectors or on a GPU."""

from collections.abc import Iterable, Iterator

import numpy as np

from facepipe.index.search import Index
from facepipe.nearest.distances import Hits, VectorBlock, compute_pair_distances
from facepipe.nearest.faiss_engine import faiss
from facepipe.types import Float32

_BLOCK_ROWS = 65_536  # vectors scanned at a time
_DEVICE_BLOCK_ROWS = 262_144  # on a GPU: picking pairs out of a block costs the same for a large one
_SPARE = 22  # neighbours beyond k that are re-scored, because matrix products round


def read_live_blocks(index: Index, rows: int = _BLOCK_ROWS) -> Iterator[VectorBlock]:
    """Read all vectors that a search can return, from the side files; memory is that of one block."""
    index.follow_erasures()
    for shard in index.shards:
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
        queries: (n, 128).
        blocks: the vectors.
        k: neighbours per query.
        device: `cpu`, or a device of torch.

    Returns:
        Hits (n, k) with Euclidean distances.
    """
    queries = np.ascontiguousarray(queries, np.float32)
    hits = _scan_on_cpu(queries, blocks, k) if device == "cpu" else _scan_on_device(queries, blocks, k, device)
    return Hits(hits.ids, np.sqrt(hits.distances))


def scan_index(index: Index, queries: Float32, k: int, device: str = "cpu") -> Hits:
    """Search exactly among all that an index can return, in blocks of a size that suits the device."""
    block_rows = _BLOCK_ROWS if device == "cpu" else _DEVICE_BLOCK_ROWS
    return search_exactly(queries, read_live_blocks(index, block_rows), k, device)


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
        hits = _merge_hits(hits, Hits(block.ids[rows], distances.reshape(len(queries), count)), k)
    return hits


def _scan_on_device(queries: Float32, blocks: Iterable[VectorBlock], k: int, device: str) -> Hits:
    from facepipe.nearest.knn_gpu import find_neighbours  # loads torch

    return find_neighbours(queries, blocks, k, device)


def _merge_hits(left: Hits, right: Hits, k: int) -> Hits:
    """Merge the hits of the same queries and keep the k nearest."""
    ids = np.concatenate([left.ids, right.ids], axis=1)
    distances = np.concatenate([left.distances, right.distances], axis=1)
    order = np.lexsort((ids, distances), axis=1)[:, :k]
    return Hits(np.take_along_axis(ids, order, axis=1), np.take_along_axis(distances, order, axis=1))
