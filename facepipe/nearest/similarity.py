"""Similarities of pairs of faces: their cosine less the mean of their densities (facepipe.curation.graph.cohort)."""

from dataclasses import dataclass

import numpy as np

from facepipe.nearest.distances import pair_distances
from facepipe.types import Bool, Float32, Int64


@dataclass(frozen=True)
class Pairs:
    """m pairs: u < v (m,) int64 positions, distance (m,) float32 Euclidean."""

    u: Int64
    v: Int64
    distance: Float32

    def __len__(self) -> int:
        return len(self.u)

    def take(self, chosen: Bool | Int64) -> "Pairs":
        """Some of the pairs."""
        return Pairs(self.u[chosen], self.v[chosen], self.distance[chosen])


def similarity(distance: Float32, left: Float32, right: Float32) -> Float32:
    """(m,) similarity of pairs from Euclidean distances (m,) and the densities of both faces (m,)."""
    return np.asarray(1 - distance * distance / 2 - (left + right) / 2, np.float32)


def refined(vectors: Float32, densities: Float32, u: Int64, v: Int64, threshold: float) -> Pairs:
    """Candidates of unit vectors with their distances, computed pair by pair; those below the threshold are gone."""
    rows = np.ascontiguousarray(vectors)
    distance = np.sqrt(pair_distances(rows, u, rows, v))
    return Pairs(u, v, distance).take(similarity(distance, densities[u], densities[v]) >= threshold)


def crowding(densities: Float32) -> Float32:
    """(n,), at least 0: squared distances plus these of the other face rise as the similarity to it falls."""
    return np.asarray(densities - densities.min(initial=0), np.float32)


def reaching(own: Int64, near: Int64, squared: Float32, densities: Float32, threshold: float) -> tuple[Int64, Int64]:
    """(row (m,), other (m,)): of faces (r, c) at squared distances (r, c) of rows (r,) those of enough similarity."""
    value = 1 - squared / 2 - (densities[own][:, None] + densities[near]) / 2
    kept = (value >= threshold) & (near != own[:, None])
    return np.repeat(own, kept.sum(axis=1)), near[kept]
