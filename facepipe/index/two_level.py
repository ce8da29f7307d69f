"""k-means for many centroids in two levels: coarse cells first, then each cell on its own, then all together.

Lloyd's algorithm compares every vector with every centroid, ten times. In two levels a vector is compared with the
centroids of its own cell, which are the square root of all. The lists that result are a little worse at the borders of
cells; a few rounds with all centroids mend most of that.
"""

from typing import Any

import numpy as np

from facepipe.nearest.faiss_engine import faiss
from facepipe.types import Float32, Int64

MIN_CENTROIDS = 2048
"""Fewer centroids are found as fast by plain k-means, and better."""
_ITERATIONS = 10  # in the cells, as in faiss's inverted files
_FINAL_ITERATIONS = 3
_COARSE_POINTS = 256  # vectors per coarse cell
_POINTS = 1 << 30  # faiss leaves no vector out


def train_centroids(
    vectors: Float32, count: int, seed: int = 1234, *, final_iterations: int = _FINAL_ITERATIONS
) -> Float32:
    """Find centroids.

    Args:
        vectors: (n, d), at least `count`.
        count: number of centroids.
        seed: random seed.
        final_iterations: rounds with all centroids, which cost most; with none the borders of cells stay.

    Returns:
        Centroids (count, d).
    """
    rng = np.random.default_rng(seed)
    cells = max(1, round(count**0.5))
    chosen = np.sort(rng.choice(len(vectors), min(len(vectors), cells * _COARSE_POINTS), replace=False))
    coarse = _run_kmeans(vectors[chosen], cells, _ITERATIONS, seed)
    index = faiss.IndexFlatL2(vectors.shape[1])
    index.add(coarse)
    cell = index.search(vectors, 1)[1][:, 0]
    sizes = np.bincount(cell, minlength=cells)
    shares = share_out(sizes, count)
    order = np.argsort(cell, kind="stable")
    begins = np.concatenate([[0], np.cumsum(sizes)])
    parts = []
    for number in np.flatnonzero(shares):
        members = vectors[order[begins[number] : begins[number + 1]]]
        parts.append(_run_kmeans(members, int(shares[number]), _ITERATIONS, seed))
    centroids = np.concatenate(parts)
    if not final_iterations:
        return centroids
    return _run_kmeans(vectors, count, final_iterations, seed, start=centroids)


def share_out(sizes: Int64, count: int) -> Int64:
    """Share centroids out among cells by their numbers of vectors; no cell gets more than it has vectors.

    Args:
        sizes: vectors per cell, (m,).
        count: centroids, at most as many as vectors.
    """
    shares = np.zeros(len(sizes), np.int64)
    while (left := count - int(shares.sum())) > 0:
        room = sizes - shares
        # What each cell should have besides, rounded down; then one each for the largest remainders.
        wanted = left * room / room.sum()
        shares += np.minimum(np.floor(wanted).astype(np.int64), room)
        rest = min(count - int(shares.sum()), len(sizes))
        largest = np.argsort(-(wanted - np.floor(wanted)), kind="stable")
        largest = largest[(sizes - shares)[largest] > 0][:rest]
        shares[largest] += 1
    return shares


def _run_kmeans(vectors: Float32, count: int, iterations: int, seed: int, start: Float32 | None = None) -> Float32:
    """Run Lloyd's algorithm, from given centroids or from vectors drawn at random."""
    if len(vectors) == count:
        return np.ascontiguousarray(vectors)
    clustering: Any = faiss.Clustering(vectors.shape[1], count)
    clustering.niter = iterations
    clustering.seed = seed
    clustering.min_points_per_centroid = 1
    clustering.max_points_per_centroid = _POINTS // count
    if start is not None:
        faiss.copy_array_to_vector(np.ascontiguousarray(start).ravel(), clustering.centroids)
    clustering.train(np.ascontiguousarray(vectors), faiss.IndexFlatL2(vectors.shape[1]))
    return np.asarray(faiss.vector_to_array(clustering.centroids).reshape(count, -1), np.float32)
