"""All pairs of faces above a similarity: a matrix product block by block, so that what survives is all that is kept.

The similarity of two faces is their cosine less the mean of their densities (facepipe.graph.cohort).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from facepipe.index.engine import faiss
from facepipe.index.search import pair_distances

Vectors = npt.NDArray[np.float32]
Densities = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
_ROWS = 384  # of a block: its product with some thousand vectors stays in the cache
_NONE = (np.empty(0, np.int64), np.empty(0, np.int64))
_SLACK = 1e-5  # products round: what is near the threshold is computed again


@dataclass(frozen=True)
class Pairs:
    """m pairs: u < v (m,) int64 positions, distance (m,) float32 Euclidean."""

    u: Ids
    v: Ids
    distance: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.u)

    def take(self, chosen: npt.NDArray[np.bool_] | Ids) -> "Pairs":
        """Some of the pairs."""
        return Pairs(self.u[chosen], self.v[chosen], self.distance[chosen])


def similarity(distance: npt.NDArray[np.float32], left: Densities, right: Densities) -> npt.NDArray[np.float32]:
    """(m,) similarity of pairs from Euclidean distances (m,) and the densities of both faces (m,)."""
    return np.asarray(1 - distance * distance / 2 - (left + right) / 2, np.float32)


def candidates(vectors: Vectors, densities: Densities, threshold: float, most: int) -> tuple[Ids, Ids]:
    """(u (m,), v (m,)), u < v, of rows (n, 128) whose product less their mean density reaches about the threshold.

    Of a row with more than `most` its nearest; a pair stays when it is among the nearest of either of its rows.
    """
    left, right = _augmented(vectors, densities)
    found, crowd = [_NONE], None
    for at in range(0, len(left), _ROWS):
        # What is before a block's first row its earlier blocks have found, but where a crowd kept its own nearest only.
        begin = at if crowd is None else crowd
        u, v, crowded = _block(left, right, (at, begin), threshold - _SLACK, most)
        crowd = at if crowded and crowd is None else crowd
        found.append((u, v))
    u, v = (np.concatenate(column) for column in zip(*found, strict=True))
    if crowd is None:
        return u, v
    key = np.unique(np.minimum(u, v) * len(left) + np.maximum(u, v))
    return key // len(left), key % len(left)


def refined(vectors: Vectors, densities: Densities, u: Ids, v: Ids, threshold: float) -> Pairs:
    """Candidates of unit vectors with their distances, computed pair by pair; those below the threshold are gone."""
    rows = np.ascontiguousarray(vectors)
    distance = np.sqrt(pair_distances(rows, u, rows, v))
    return Pairs(u, v, distance).take(similarity(distance, densities[u], densities[v]) >= threshold)


def _augmented(vectors: Vectors, densities: Densities) -> tuple[Vectors, Vectors]:
    """Two more columns make the product of two rows their similarity."""
    left = np.zeros((len(vectors), vectors.shape[1] + 4), np.float32)  # 132 columns: rows begin at full registers
    left[:, : vectors.shape[1]] = vectors
    right = left.copy()
    left[:, -2], left[:, -1] = -densities / 2, 1
    right[:, -2], right[:, -1] = 1, -densities / 2
    return left, right


def _block(left: Vectors, right: Vectors, place: tuple[int, int], threshold: float, most: int) -> tuple[Ids, Ids, bool]:
    at, begin = place
    rows = left[at : at + _ROWS]
    product = (rows @ right[begin:].T).ravel()
    hits = np.flatnonzero(product >= threshold)
    if len(hits) > most * len(rows):
        return *_crowded(rows, right, at, threshold, most), True
    i, j = np.divmod(hits, len(right) - begin)
    i, j = i + at, j + begin
    new = (j > i) | (j < at)
    return i[new], j[new], False


def _crowded(rows: Vectors, right: Vectors, at: int, threshold: float, most: int) -> tuple[Ids, Ids]:
    """The nearest of each row among all, before and behind it."""
    count = min(most + 1, len(right))  # a row is its own nearest, or its equal is
    value, near = faiss.knn(np.ascontiguousarray(rows), right, count, metric=faiss.METRIC_INNER_PRODUCT)
    own = np.arange(at, at + len(rows))[:, None]
    kept = (value >= threshold) & (near != own)
    return np.repeat(own.ravel(), kept.sum(axis=1)), near[kept].astype(np.int64)
