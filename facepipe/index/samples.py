"""Faces of a gallery as queries, what is truly near them, and the share of it that a search finds."""

from dataclasses import dataclass

import numpy as np

from facepipe.index.exact import FoundPairs, find_within, read_live_blocks, search_exactly
from facepipe.index.manifest import CURVE_K
from facepipe.index.search import Index, SearchSetting
from facepipe.nearest.distances import VectorBlock
from facepipe.types import Float32, Float64, Int64

_MAX_DISTANCES = 500_000_000  # computed for the truth
# Bounds of the sample's size if none is requested.
_MIN_QUERIES = 200
_MAX_QUERIES = 1000
_MAX_RADIUS_TRUTH = 1000  # faces per query, drawn from all within the radius
_CONFIDENCE = 1.64  # standard errors: the requested recall is reached with 95 % certainty


@dataclass(frozen=True)
class RecallSample:
    """Faces of the gallery as queries, with their true neighbours.

    Attributes:
        queries: Vectors (m, dim).
        own: Their own face ids (m,).
        truth: Face ids (m, k) of the k nearest others.
        distances: Their distances (m, k).
    """

    queries: Float32
    own: Int64
    truth: Int64
    distances: Float32


def draw_sample(index: Index, seed: int, queries: int | None = None, k: int = CURVE_K) -> RecallSample:
    """Draw a seeded sample over all shards, with its k nearest others. Every query leaves itself out."""
    # A larger gallery gets fewer queries, because each is compared with every vector.
    by_work = int(np.clip(_MAX_DISTANCES / max(1, index.live), _MIN_QUERIES, _MAX_QUERIES))
    faces = draw_faces(index, seed, queries or by_work)
    truth = search_exactly(faces.vectors, read_live_blocks(index), k + 1).exclude_own(faces.ids, k)
    return RecallSample(faces.vectors, faces.ids, truth.ids, truth.distances)


def draw_faces(index: Index, seed: int, count: int) -> VectorBlock:
    """Draw a seeded sample of faces over all shards."""
    count = min(index.live, count)
    rng = np.random.default_rng(seed)
    parts = [np.empty(0, np.int64)]
    # Each shard contributes in proportion to its live faces.
    for shard in index.shards:
        ids = np.setdiff1d(shard.ids, shard.tombstones) if shard.tombstones.size else shard.ids
        share = round(count * len(ids) / index.live)
        rows = np.sort(rng.choice(len(ids), min(len(ids), share), replace=False))
        parts.append(np.asarray(ids[rows]))
    ids = np.concatenate(parts)
    return VectorBlock(ids, index.get_vectors(ids))


def compute_recall(results: Int64, truth: Int64) -> Float64:
    """Compute the share (n,) of the true neighbours (n, k) that are among the results (n, k).

    If there are fewer than k true neighbours, of those.
    """
    exists = truth >= 0
    is_found = np.array([np.isin(own, other) for own, other in zip(truth, results, strict=True)], bool)
    hits = (is_found.reshape(exists.shape) & exists).sum(axis=1)
    return np.asarray(hits / np.maximum(1, exists.sum(axis=1)), np.float64)


@dataclass(frozen=True)
class RadiusSample:
    """Faces of the gallery as queries, with those that are truly within a radius of each.

    Attributes:
        queries: Vectors (m, dim).
        own: Their own face ids (m,).
        truth: Per query face ids of others within the radius: all, or some drawn from all.
        counts: How many others are within the radius, (m,).
    """

    queries: Float32
    own: Int64
    truth: list[Int64]
    counts: Int64


def draw_radius_sample(index: Index, faces: VectorBlock, radius: float, seed: int) -> RadiusSample:
    """Find what is within a radius of each face. Queries that have nobody there are left out."""
    rng = np.random.default_rng(seed)
    pairs = FoundPairs.create_empty()
    keys = np.empty(0)
    counts = np.zeros(len(faces.ids), np.int64)
    for found in find_within(np.ascontiguousarray(faces.vectors), read_live_blocks(index), radius):
        other = found.take(found.ids != faces.ids[found.queries])
        counts += np.bincount(other.queries, minlength=len(counts))
        pairs = FoundPairs.concatenate([pairs, other])
        keys = np.concatenate([keys, rng.random(len(other.ids))])
        # Of each query the smallest random keys, which are a uniform sample.
        order = np.lexsort((keys, pairs.queries))
        queries = pairs.queries[order]
        order = order[np.arange(len(order)) - np.searchsorted(queries, queries) < _MAX_RADIUS_TRUTH]
        pairs = pairs.take(order)
        keys = keys[order]
    begins = np.searchsorted(pairs.queries, np.arange(len(faces.ids) + 1))
    chosen = np.flatnonzero(counts > 0)
    truth = [pairs.ids[begins[query] : begins[query + 1]] for query in chosen]
    return RadiusSample(faces.vectors[chosen], faces.ids[chosen], truth, counts[chosen])


def compute_radius_recall(index: Index, sample: RadiusSample, radius: float, setting: SearchSetting) -> Float64:
    """Compute per query (m,) the share of the faces within a radius that a search finds."""
    answers = index.search_within(sample.queries, radius, max(1, index.live), setting)
    shares = [np.isin(truth, ids).mean() for truth, (ids, _) in zip(sample.truth, answers, strict=True)]
    return np.array(shares, np.float64)


def compute_lower_bound(values: Float64) -> float:
    """Return what the mean is not below, with 95 % certainty."""
    if len(values) < 2:
        return float(values.mean()) if len(values) else 1.0
    return max(0.0, round(float(values.mean() - _CONFIDENCE * values.std(ddof=1) / len(values) ** 0.5), 4))
