"""What comparing everything finds for a sample of faces: to choose the cells by, and to measure the edges against."""

from collections.abc import Iterable

import numpy as np

from facepipe.nearest.similarity import Pairs
from facepipe.types import Float32, Int64

_BLOCK_COLUMNS = 8192
_BLOCK_ROWS = 256
# Bounds of the size of a sample.
_MIN_SAMPLE = 200
_MAX_SAMPLE = 4096


def draw_sample(count: int, seed: int, budget: float = 1e9) -> Int64:
    """Draw a seeded sample of positions, as many as give about `budget` comparisons with all n faces."""
    size = min(count, int(np.clip(budget / max(1, count), _MIN_SAMPLE, _MAX_SAMPLE)))
    return np.sort(np.random.default_rng(seed).choice(count, size, replace=False))


def find_true_edges(
    vectors: Float32, densities: Float32, sample: Int64, threshold: float, max_neighbours: int
) -> tuple[Int64, Int64]:
    """Find the edges of sampled faces by comparing them with all faces.

    Args:
        vectors: unit vectors (n, dim).
        densities: densities (n,).
        sample: positions (s,), sorted.
        threshold: similarity of an edge.
        max_neighbours: edges per face, the most similar ones.

    Returns:
        Positions (sampled face (m,), other face (m,)).
    """
    left = np.ascontiguousarray(vectors[sample])
    left_density = densities[sample]
    rows: list[Int64] = [np.empty(0, np.int64)]
    columns: list[Int64] = [np.empty(0, np.int64)]
    values: list[Float32] = [np.empty(0, np.float32)]
    for at in range(0, len(vectors), _BLOCK_COLUMNS):
        right = np.asarray(vectors[at : at + _BLOCK_COLUMNS])
        right_density = densities[at : at + _BLOCK_COLUMNS]
        for row in range(0, len(left), _BLOCK_ROWS):
            part = slice(row, row + _BLOCK_ROWS)
            product = left[part] @ right.T - (left_density[part, None] + right_density) / 2
            similarities = np.asarray(product, np.float32)
            # A face is not compared with itself.
            inside = np.flatnonzero((sample[part] >= at) & (sample[part] < at + len(right)))
            similarities[inside, sample[part][inside] - at] = -np.inf
            i, j = _select_similar(similarities, threshold, max_neighbours)
            rows.append(i + row)
            columns.append(j + at)
            values.append(similarities[i, j])
    # Of each row the most similar ones of all blocks.
    all_rows = np.concatenate(rows)
    order = np.lexsort((-np.concatenate(values), all_rows))
    all_rows = all_rows[order]
    rank = np.arange(len(all_rows)) - np.searchsorted(all_rows, all_rows)
    nearest = rank < max_neighbours
    return sample[all_rows[nearest]], np.concatenate(columns)[order][nearest]


def _select_similar(similarities: Float32, threshold: float, max_neighbours: int) -> tuple[Int64, Int64]:
    """Select what reaches the threshold, at most `max_neighbours` per row, as (row (m,), column (m,))."""
    i, j = np.nonzero(similarities >= threshold)
    if len(i) <= max_neighbours * len(similarities):
        return i, j
    # Too many edges: keep the most similar ones of each row.
    kth = min(max_neighbours, similarities.shape[1])
    largest = np.argpartition(similarities, -kth, axis=1)[:, -max_neighbours:]
    selected = np.take_along_axis(similarities, largest, axis=1) >= threshold
    return np.repeat(np.arange(len(similarities)), selected.sum(axis=1)), largest[selected]


def measure_recall(sample: Int64, u: Int64, v: Int64, edges: Iterable[Pairs], count: int) -> float:
    """Measure the share of true edges that a graph holds; 1 if there are none.

    Args:
        sample: positions of the sampled faces.
        u: one position per true edge, (m,).
        v: the other position, (m,).
        edges: all edges of the graph.
        count: number of faces.
    """
    # Only edges of sampled faces matter.
    is_sampled = np.zeros(count, bool)
    is_sampled[sample] = True
    edge_keys = [np.empty(0, np.int64)]
    for pairs in edges:
        near = is_sampled[pairs.u] | is_sampled[pairs.v]
        edge_keys.append(pairs.u[near] * count + pairs.v[near])
    true_keys = np.minimum(u, v) * count + np.maximum(u, v)
    return float(np.isin(true_keys, np.concatenate(edge_keys)).mean()) if len(true_keys) else 1.0
