"""Recall of an index against exact search, on faces of the gallery, and the setting that reaches what was asked."""

from dataclasses import dataclass

import numpy as np

from facepipe.index.cost import of_lists
from facepipe.index.exact import read_live_blocks, search_exactly
from facepipe.index.manifest import Point
from facepipe.index.search import Index, Setting
from facepipe.types import Float32, Float64, Int64

K = 10
_WORK = 500_000_000  # distances computed for the truth
_FEWEST, _MOST = 200, 1000
_RESCORED = (100, 200)
_NEAR = 0.85  # recall from which steps are small
_SURE = 1.64  # standard errors: the recall asked for is reached with 95 % certainty


@dataclass(frozen=True)
class Sample:
    """Faces of the gallery as queries (m, 128), their own ids (m,), and the k true nearest others (m, k)."""

    queries: Float32
    own: Int64
    truth: Int64


def draw(index: Index, seed: int, queries: int | None = None) -> Sample:
    """A seeded sample over all shards with its truth; every query leaves itself out."""
    count = min(index.live, queries or int(np.clip(_WORK / max(1, index.live), _FEWEST, _MOST)))
    rng = np.random.default_rng(seed)
    own = []
    for shard in index.shards:
        ids = np.setdiff1d(shard.ids, shard.dead) if shard.dead.size else shard.ids
        share = count * len(ids) / index.live
        own.append(np.asarray(ids[np.sort(rng.choice(len(ids), min(len(ids), round(share)), replace=False))]))
    chosen = np.concatenate(own) if own else np.empty(0, np.int64)
    vectors = index.vectors(chosen)
    truth = search_exactly(vectors, read_live_blocks(index), K + 1).exclude_own(chosen, K)
    return Sample(vectors, chosen, truth.ids)


def recall(found: Int64, truth: Int64) -> Float64:
    """Share (n,) of the true neighbours (n, k) that were found (n, k); where there are fewer than k, of those."""
    hit = ((truth[:, :, None] == found[:, None, :]) & (truth >= 0)[:, :, None]).any(axis=2).sum(axis=1)
    return np.asarray(hit / np.maximum(1, (truth >= 0).sum(axis=1)), np.float64)


def measure(index: Index, sample: Sample, asked: float) -> tuple[Point, ...]:
    """The curve: for rising recall the cheapest setting that reaches it; ends a little above what is asked for.

    Lists double until the goal is near, then rise by a factor of 1.19, and beyond it of 1.5. Recalls are lower bounds
    of 95 % one-sided intervals.
    """
    if not index.lists:
        return (_point(index, sample, Setting(1, _RESCORED[0])),)
    points: list[Point] = []
    nprobe, goal = min(8, index.lists), max(0.99, asked)
    while True:
        near = bool(points) and points[-1].recall_at_10 > _NEAR
        row = [_point(index, sample, Setting(nprobe, count)) for count in (_RESCORED if near else _RESCORED[:1])]
        points += row
        if nprobe == index.lists or row[-1].recall_at_10 >= goal:
            return _pareto(points, index)
        reached = row[-1].recall_at_10
        nprobe = min(index.lists, round(nprobe * (1.5 if reached >= asked else 2**0.25 if reached > _NEAR else 2)) + 1)


def _point(index: Index, sample: Sample, setting: Setting) -> Point:
    found = index.search(sample.queries, K + 1, setting).exclude_own(sample.own, K).ids
    at_1, at_10 = recall(found[:, :1], sample.truth[:, :1]), recall(found, sample.truth)
    return Point(setting.nprobe, setting.rescore, _lower(at_1), _lower(at_10))


def _lower(values: Float64) -> float:
    """What the mean is not below, with 95 % certainty."""
    if len(values) < 2:
        return float(values.mean()) if len(values) else 1.0
    return max(0.0, round(float(values.mean() - _SURE * values.std(ddof=1) / len(values) ** 0.5), 4))


def _pareto(points: list[Point], index: Index) -> tuple[Point, ...]:
    def cost(point: Point) -> float:
        return of_lists(index.live, index.lists, len(index.shards), point.nprobe, point.rescore)

    kept: list[Point] = []
    for point in sorted(points, key=cost):
        if not kept or point.recall_at_10 > kept[-1].recall_at_10:
            kept.append(point)
    return tuple(kept)
