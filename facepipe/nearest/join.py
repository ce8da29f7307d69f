"""All pairs of faces above a similarity: a matrix product block by block, so that what survives is all that is kept.

The similarity of two faces is their cosine less the mean of their densities (facepipe.curation.graph.cohort).
"""

import numpy as np

from facepipe.nearest.distances import pair_distances
from facepipe.nearest.faiss_engine import faiss
from facepipe.nearest.similarity import crowding, reaching
from facepipe.types import Float32, Int64

_ROWS = 384  # of a block: its product with some thousand vectors stays in the cache
_NONE = (np.empty(0, np.int64), np.empty(0, np.int64))
_SPARE = 22  # so many more than a crowded row keeps are compared exactly
_SLACK = 1e-5  # products round: what is near the threshold is computed again


def candidates(
    vectors: Float32, densities: Float32, threshold: float, most: int, device: str = "cpu"
) -> tuple[Int64, Int64]:
    """(u (m,), v (m,)), u < v, of rows (n, 128) whose product less their mean density reaches about the threshold.

    Of a row with more than `most` its nearest; a pair stays when it is among the nearest of either of its rows. Of what
    `refined` leaves of them, every device finds the same.
    """
    if device != "cpu":
        from facepipe.nearest.join_gpu import Rule, join  # loads torch

        return join(vectors, densities, Rule(threshold - _SLACK, most, _ROWS), device)
    left, right = _augmented(vectors, densities)
    found, crowd = [_NONE], None
    for at in range(0, len(left), _ROWS):
        # What is before a block's first row its earlier blocks have found, but where a crowd kept its own nearest only.
        begin = at if crowd is None else crowd
        u, v, crowded = _block(left, right, (at, begin), threshold - _SLACK, most)
        if crowded:
            u, v = _crowded(vectors, densities, (left, right), at, (threshold - _SLACK, most))
        crowd = at if crowded and crowd is None else crowd
        found.append((u, v))
    u, v = (np.concatenate(column) for column in zip(*found, strict=True))
    if crowd is None:
        return u, v
    key = np.unique(np.minimum(u, v) * len(left) + np.maximum(u, v))
    return key // len(left), key % len(left)


def _augmented(vectors: Float32, densities: Float32) -> tuple[Float32, Float32]:
    """Two more columns make the product of two rows their similarity."""
    left = np.zeros((len(vectors), vectors.shape[1] + 4), np.float32)  # 132 columns: rows begin at full registers
    left[:, : vectors.shape[1]] = vectors
    right = left.copy()
    left[:, -2], left[:, -1] = -densities / 2, 1
    right[:, -2], right[:, -1] = 1, -densities / 2
    return left, right


def _block(
    left: Float32, right: Float32, place: tuple[int, int], threshold: float, most: int
) -> tuple[Int64, Int64, bool]:
    at, begin = place
    rows = left[at : at + _ROWS]
    product = (rows @ right[begin:].T).ravel()
    hits = np.flatnonzero(product >= threshold)
    if len(hits) > most * len(rows):
        return *_NONE, True
    i, j = np.divmod(hits, len(right) - begin)
    i, j = i + at, j + begin
    new = (j > i) | (j < at)
    return i[new], j[new], False


def _crowded(
    vectors: Float32, densities: Float32, augmented: tuple[Float32, Float32], at: int, rule: tuple[float, int]
) -> tuple[Int64, Int64]:
    """The nearest of each row among all, before and behind it: more are found than meant, as products round."""
    (left, right), (threshold, most) = augmented, rule
    rows = np.ascontiguousarray(left[at : at + _ROWS])
    count = min(most + 1 + _SPARE, len(right))  # a row is its own nearest, or its equal is
    near = faiss.knn(rows, right, count, metric=faiss.METRIC_INNER_PRODUCT)[1].astype(np.int64)
    own, exact = np.arange(at, at + len(rows)), np.ascontiguousarray(vectors)
    squared = pair_distances(exact, np.repeat(own, count), exact, near.ravel()).reshape(near.shape)
    order = np.lexsort((near, squared + crowding(densities)[near]), axis=1)[:, : most + 1]
    near, squared = np.take_along_axis(near, order, axis=1), np.take_along_axis(squared, order, axis=1)
    return reaching(own, near, squared, densities, threshold)
