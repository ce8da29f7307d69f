"""What comparing everything finds for a sample of faces: to choose the cells by, and to measure the edges against."""

from collections.abc import Iterable

import numpy as np

from facepipe.nearest.similarity import Pairs
from facepipe.types import Float32, Int64

_COLUMNS = 65536
_ROWS = 256


def draw(count: int, seed: int, budget: float = 1e9) -> Int64:
    """A seeded sample of positions: as many as give about `budget` comparisons with all n faces."""
    size = min(count, int(np.clip(budget / max(1, count), 200, 4096)))
    return np.sort(np.random.default_rng(seed).choice(count, size, replace=False))


def true_edges(vectors: Float32, densities: Float32, sample: Int64, threshold: float, most: int) -> tuple[Int64, Int64]:
    """(sampled face (m,), other face (m,)) of at least the threshold's similarity; of a face its `most` nearest."""
    left, own = np.ascontiguousarray(vectors[sample]), densities[sample]
    found: list[tuple[Int64, Int64, Float32]] = []
    for at in range(0, len(vectors), _COLUMNS):
        right, theirs = np.asarray(vectors[at : at + _COLUMNS]), densities[at : at + _COLUMNS]
        for row in range(0, len(left), _ROWS):
            part = slice(row, row + _ROWS)
            product = np.asarray(left[part] @ right.T - (own[part, None] + theirs) / 2, np.float32)
            inside = np.flatnonzero((sample[part] >= at) & (sample[part] < at + len(right)))
            product[inside, sample[part][inside] - at] = -np.inf
            i, j = _best(product, threshold, most)
            found.append((i + row, j + at, product[i, j]))
    rows, others, values = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((-values, rows))
    rows, others = rows[order], others[order]
    near = np.arange(len(rows)) - np.searchsorted(rows, rows) < most
    return sample[rows[near]], others[near]


def _best(product: Float32, threshold: float, most: int) -> tuple[Int64, Int64]:
    """(row (m,), column (m,)) of what reaches the threshold, of each row the `most` largest."""
    i, j = np.nonzero(product >= threshold)
    if len(i) <= most * len(product):
        return i, j
    near = np.argpartition(product, -min(most, product.shape[1]), axis=1)[:, -most:]
    kept = np.take_along_axis(product, near, axis=1) >= threshold
    return np.repeat(np.arange(len(product)), kept.sum(axis=1)), near[kept]


def recall(sample: Int64, truth: tuple[Int64, Int64], edges: Iterable[Pairs], count: int) -> float:
    """Share of the true edges of sampled faces that are among the edges; 1 where there are none."""
    wanted = np.zeros(count, bool)
    wanted[sample] = True
    held = [np.empty(0, np.int64)]
    for pairs in edges:
        near = wanted[pairs.u] | wanted[pairs.v]
        held.append(pairs.u[near] * count + pairs.v[near])
    keys = np.minimum(*truth) * count + np.maximum(*truth)
    return float(np.isin(keys, np.concatenate(held)).mean()) if len(keys) else 1.0
