"""Exact search by scanning every vector: the reference for recall, and the faster way for few vectors or on a GPU."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from facepipe.index.search import Index
from facepipe.nearest.distances import Hits, pair_distances
from facepipe.nearest.faiss_engine import faiss
from facepipe.types import Float32, Int64

_BLOCK = 65_536  # vectors scanned at a time
_DEVICE_BLOCK = 262_144  # on a GPU: what is picked out of a block costs the same for a large one
_SPARE = 22  # more than k are re-scored, since matrix products round


@dataclass(frozen=True)
class Block:
    """Vectors (n, 128) and their ids (n,)."""

    ids: Int64
    vectors: Float32


def live_blocks(index: Index, rows: int = _BLOCK) -> Iterator[Block]:
    """All vectors that a search can return, from the side files; memory is that of one block."""
    for shard in index.shards:
        alive, ids = shard.alive(), shard.ids_by_row()
        for at in range(0, len(ids), rows):
            part = slice(at, at + rows)
            vectors = shard.read_vectors(at, at + rows)
            if alive is None:
                yield Block(ids[part], vectors)
            else:
                yield Block(ids[part][alive[part]], vectors[alive[part]])


def exact_search(queries: Float32, blocks: Iterable[Block], k: int, device: str = "cpu") -> Hits:
    """The k nearest of all blocks' vectors to each query (n, 128), nearest first, ties by id.

    Distances are computed in single precision by the CPU, from the vectors. Which are the candidates faiss finds: more
    than k, since its products round; or, on another device, facepipe.nearest.knn_gpu, which leaves out none.
    """
    queries = np.ascontiguousarray(queries, np.float32)
    best = _on_cpu(queries, blocks, k) if device == "cpu" else _on_device(queries, blocks, k, device)
    return Hits(best.ids, np.sqrt(best.distances))


def scan(index: Index, queries: Float32, k: int, device: str = "cpu") -> Hits:
    """`exact_search` among all that an index can find, in blocks of a size that suits the device."""
    return exact_search(queries, live_blocks(index, _BLOCK if device == "cpu" else _DEVICE_BLOCK), k, device)


def _on_cpu(queries: Float32, blocks: Iterable[Block], k: int) -> Hits:
    best = Hits(np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), np.inf, np.float32))
    for block in blocks:
        if not len(block.ids):
            continue
        vectors = np.ascontiguousarray(block.vectors)
        count = min(k + _SPARE, len(block.ids))
        rows = faiss.knn(queries, vectors, count)[1]
        asked = np.repeat(np.arange(len(queries)), count)
        exact = pair_distances(queries, asked, vectors, rows.ravel()).reshape(len(queries), count)
        best = _better(best, Hits(block.ids[rows], exact), k)
    return best


def _on_device(queries: Float32, blocks: Iterable[Block], k: int, device: str) -> Hits:
    from facepipe.nearest.knn_gpu import knn  # loads torch

    return knn(queries, (((block.ids, None), block.vectors) for block in blocks), k, device)


def _better(a: Hits, b: Hits, k: int) -> Hits:
    ids = np.concatenate([a.ids, b.ids], axis=1)
    distances = np.concatenate([a.distances, b.distances], axis=1)
    order = np.lexsort((ids, distances), axis=1)[:, :k]
    return Hits(np.take_along_axis(ids, order, axis=1), np.take_along_axis(distances, order, axis=1))
