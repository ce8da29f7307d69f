"""Distances between vectors and the nearest of them: shared by exact and approximate searches, on CPUs and GPUs."""

from dataclasses import dataclass

import numpy as np

from facepipe.deprecation import warn_renamed
from facepipe.nearest.faiss_engine import faiss
from facepipe.types import Float32, Int64


@dataclass(frozen=True)
class Hits:
    """The nearest faces of n queries.

    Attributes:
        ids: Face ids (n, k), nearest first, ties by id; -1 behind the last one.
        distances: Their distances (n, k); infinite behind the last one.
    """

    ids: Int64
    distances: Float32

    def __repr__(self) -> str:
        queries, k = self.ids.shape
        return f"Hits({queries} queries, the {k} nearest faces of each: .ids and .distances)"

    @classmethod
    def create_empty(cls, queries: int, k: int) -> "Hits":
        """Create hits without a face in them."""
        return cls(np.full((queries, k), -1, np.int64), np.full((queries, k), np.inf, np.float32))

    def exclude_own(self, own: Int64, k: int) -> "Hits":
        """Return the first k hits of each query that are not the query's own face (n,)."""
        # Sort each query's own face to the end; a stable sort keeps the order of the others.
        order = np.argsort(self.ids == own[:, None], axis=1, kind="stable")[:, :k]
        return Hits(np.take_along_axis(self.ids, order, axis=1), np.take_along_axis(self.distances, order, axis=1))

    def without(self, own: Int64, k: int) -> "Hits":
        """Call `exclude_own`. This name is deprecated."""
        warn_renamed("Hits.without", "Hits.exclude_own")
        return self.exclude_own(own, k)


@dataclass(frozen=True)
class VectorBlock:
    """Some of the vectors that queries are compared with.

    Attributes:
        ids: Face ids (m,), none negative.
        vectors: Vectors (m, d).
        penalties: Terms (m,), none negative, that are added to the squared distance from every query; None for zero.
    """

    ids: Int64
    vectors: Float32
    penalties: Float32 | None = None


def compute_pair_distances(queries: Float32, query_rows: Int64, vectors: Float32, vector_rows: Int64) -> Float32:
    """Compute squared Euclidean distances of pairs of rows, without gathering the rows.

    Args:
        queries: vectors (n, d).
        query_rows: the row in `queries` of each pair, (m,).
        vectors: vectors (p, d).
        vector_rows: the row in `vectors` of each pair, (m,).

    Returns:
        Squared distances (m,).
    """
    distances = np.empty(len(vector_rows), np.float32)
    if len(vector_rows):
        # The contiguous copies must live until faiss has returned: it gets bare pointers.
        left = np.ascontiguousarray(queries)
        left_rows = np.ascontiguousarray(query_rows)
        right_rows = np.ascontiguousarray(vector_rows)
        faiss.pairwise_indexed_L2sqr(
            left.shape[1],
            len(vector_rows),
            faiss.swig_ptr(left),
            faiss.swig_ptr(left_rows),
            faiss.swig_ptr(vectors),
            faiss.swig_ptr(right_rows),
            faiss.swig_ptr(distances),
        )
    return distances


def find_smallest(values: Float32, k: int) -> Int64:
    """Find the columns of the k smallest values per row, in order, ties by column.

    The bits of non-negative floats rise with their values. With the column behind them they are one integer to sort by.

    Args:
        values: non-negative values (n, w).
        k: columns per row.

    Returns:
        Columns (n, min(k, w)).
    """
    # One key per value: its bits in the upper half, its column in the lower.
    keys = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(values.shape[1], dtype=np.uint64)
    # Partition first, so that only k keys per row are sorted.
    if k < values.shape[1]:
        keys = np.partition(keys, k, axis=1)[:, :k]
    return (np.sort(keys, axis=1) & np.uint64(0xFFFFFFFF)).astype(np.int64)
