"""Distances between vectors, and the nearest of them: what exact and approximate searches share."""

from dataclasses import dataclass

import numpy as np

from facepipe.nearest.faiss_engine import faiss
from facepipe.schema import EMBEDDING_DIM
from facepipe.types import Float32, Int64


@dataclass(frozen=True)
class Hits:
    """Answers to n queries: ids (n, k) int64, nearest first, ties by id, -1 behind the last; distances (n, k)."""

    ids: Int64
    distances: Float32

    def without(self, own: Int64, k: int) -> "Hits":
        """The first k of each query's answers that are not the query's own face (n,)."""
        order = np.argsort(self.ids == own[:, None], axis=1, kind="stable")[:, :k]
        return Hits(np.take_along_axis(self.ids, order, axis=1), np.take_along_axis(self.distances, order, axis=1))


def smallest(values: Float32, k: int) -> Int64:
    """Positions (n, min(k, w)) of the smallest of non-negative values (n, w), in order, ties by position.

    Bits of non-negative floats rise with their values: with the position behind them they are one integer to sort.
    """
    keys = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(values.shape[1], dtype=np.uint64)
    if k < values.shape[1]:
        keys = np.partition(keys, k, axis=1)[:, :k]
    return (np.sort(keys, axis=1) & np.uint64(0xFFFFFFFF)).astype(np.int64)


def pair_distances(queries: Float32, asked: Int64, vectors: Float32, rows: Int64) -> Float32:
    """Squared Euclidean distances (m,) between queries[asked] and vectors[rows], without gathering either."""
    out = np.empty(len(rows), np.float32)
    if len(rows):
        arrays = [np.ascontiguousarray(queries), np.ascontiguousarray(asked), vectors, np.ascontiguousarray(rows), out]
        x, ix, y, iy, into = (faiss.swig_ptr(array) for array in arrays)
        faiss.pairwise_indexed_L2sqr(EMBEDDING_DIM, len(rows), x, ix, y, iy, into)
    return out
