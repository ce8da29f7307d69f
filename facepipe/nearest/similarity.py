"""Similarities of pairs of faces: their cosine less the mean of their densities (facepipe.curation.graph.cohort)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from facepipe.nearest.distances import compute_pair_distances
from facepipe.types import Bool, Float32, Int64


@dataclass(frozen=True)
class Pairs:
    """Pairs of faces.

    Attributes:
        u: Positions (m,) of one face of each pair.
        v: Positions (m,) of the other; u < v.
        distance: Euclidean distances (m,).
    """

    u: Int64
    v: Int64
    distance: Float32

    def __len__(self) -> int:
        return len(self.u)

    @classmethod
    def concatenate(cls, parts: "Sequence[Pairs]") -> "Pairs":
        """Concatenate several lists of pairs."""
        return cls(
            np.concatenate([np.empty(0, np.int64), *(part.u for part in parts)]),
            np.concatenate([np.empty(0, np.int64), *(part.v for part in parts)]),
            np.concatenate([np.empty(0, np.float32), *(part.distance for part in parts)]),
        )

    def take(self, chosen: Bool | Int64) -> "Pairs":
        """Return some of the pairs, chosen by a mask or by position."""
        return Pairs(self.u[chosen], self.v[chosen], self.distance[chosen])


def compute_similarity(distance: Float32, left_density: Float32, right_density: Float32) -> Float32:
    """Compute similarities (m,) of pairs from Euclidean distances (m,) and the densities of both faces (m,)."""
    return np.asarray(1 - distance * distance / 2 - (left_density + right_density) / 2, np.float32)


def compute_penalties(densities: Float32) -> Float32:
    """Compute the terms (n,) that make squared distances rank faces by similarity.

    A squared distance plus the other face's term rises as the similarity to that face falls. No term is negative.
    """
    return np.asarray(densities - densities.min(initial=0), np.float32)


def refine_pairs(vectors: Float32, densities: Float32, u: Int64, v: Int64, threshold: float) -> Pairs:
    """Compute the distances of candidate pairs one by one, and keep the pairs that reach the threshold.

    Args:
        vectors: unit vectors (n, d).
        densities: densities (n,).
        u: one position per candidate, (m,).
        v: the other position, (m,).
        threshold: similarity.
    """
    rows = np.ascontiguousarray(vectors)
    distance = np.sqrt(compute_pair_distances(rows, u, rows, v))
    return Pairs(u, v, distance).take(compute_similarity(distance, densities[u], densities[v]) >= threshold)


def select_similar(
    rows: Int64, neighbours: Int64, squared_distances: Float32, densities: Float32, threshold: float
) -> tuple[Int64, Int64]:
    """Select the neighbours of each row that reach the threshold. A row is not its own neighbour.

    Args:
        rows: positions (r,).
        neighbours: positions (r, c) of each row's neighbours.
        squared_distances: squared Euclidean distances (r, c) to them.
        densities: densities (n,) by position.
        threshold: similarity.

    Returns:
        The pairs as (row (m,), neighbour (m,)).
    """
    # Similarities (r, c): cosine less the mean of both densities.
    similarities = 1 - squared_distances / 2 - (densities[rows][:, None] + densities[neighbours]) / 2
    selected = (similarities >= threshold) & (neighbours != rows[:, None])
    return np.repeat(rows, selected.sum(axis=1)), neighbours[selected]


def sort_pairs(u: Int64, v: Int64, count: int) -> tuple[Int64, Int64]:
    """Sort pairs of positions below `count` and keep each once, the smaller position first."""
    # One integer per pair sorts pairs and removes repeated ones in a single step.
    keys = np.unique(np.minimum(u, v) * count + np.maximum(u, v))
    return keys // count, keys % count
