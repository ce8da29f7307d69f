"""Exact search by scanning every vector: the reference for recall, and the faster way for few vectors or on a GPU."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from facepipe.index.engine import faiss
from facepipe.index.search import Hits, Index, pair_distances

Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
_BLOCK = 65_536  # vectors scanned at a time
_TILE = 4096  # queries of a product on a GPU
_SPARE = 22  # more than k are re-scored, since matrix products round


@dataclass(frozen=True)
class Block:
    """Vectors (n, 128) and their ids (n,)."""

    ids: Ids
    vectors: Vectors


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


def exact_search(queries: Vectors, blocks: Iterable[Block], k: int, device: str = "cpu") -> Hits:
    """The k nearest of all blocks' vectors to each query (n, 128), nearest first, ties by id.

    On a CPU by faiss; on a GPU by a tiled product in half precision. Both find more than k and compute the distances of
    those again in single precision, from the vectors.
    """
    queries = np.ascontiguousarray(queries, np.float32)
    scan = _scan_cpu if device == "cpu" else _GpuScan(queries, device)
    best = Hits(np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), np.inf, np.float32))
    for block in blocks:
        if not len(block.ids):
            continue
        vectors = np.ascontiguousarray(block.vectors)
        count = min(k + _SPARE, len(block.ids)) if device == "cpu" else min(2 * k + _SPARE, len(block.ids))
        rows = scan(queries, vectors, count)
        asked = np.repeat(np.arange(len(queries)), count)
        exact = pair_distances(queries, asked, vectors, rows.ravel()).reshape(len(queries), count)
        best = _better(best, Hits(block.ids[rows], exact), k)
    return Hits(best.ids, np.sqrt(best.distances))


def _scan_cpu(queries: Vectors, vectors: Vectors, count: int) -> Ids:
    rows: Ids = faiss.knn(queries, vectors, count)[1]
    return rows


class _GpuScan:
    """Row numbers of the nearest by torch: the queries stay on the device, the vectors pass through."""

    def __init__(self, queries: Vectors, device: str):
        import torch

        self._torch, self._device = torch, torch.device(device)
        self._queries: Any = torch.from_numpy(queries).to(self._device)

    def __call__(self, queries: Vectors, vectors: Vectors, count: int) -> Ids:
        torch = self._torch
        part: Any = torch.tensor(vectors).to(self._device, non_blocking=True)  # copies: a mapped file is read-only
        half = part.to(torch.bfloat16)
        # On unit vectors the nearest is the one of the largest product.
        queries_on = [self._queries[at : at + _TILE] for at in range(0, len(self._queries), _TILE)]
        tiles = [(tile.to(torch.bfloat16) @ half.T).topk(count, dim=1).indices for tile in queries_on]
        rows: Ids = torch.cat(tiles).cpu().numpy()
        return rows


def _better(a: Hits, b: Hits, k: int) -> Hits:
    ids = np.concatenate([a.ids, b.ids], axis=1)
    distances = np.concatenate([a.distances, b.distances], axis=1)
    order = np.lexsort((ids, distances), axis=1)[:, :k]
    return Hits(np.take_along_axis(ids, order, axis=1), np.take_along_axis(distances, order, axis=1))
