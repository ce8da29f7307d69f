"""What settings reach for more neighbours than ten, and within radii.

A face is found if its list is visited, and if its code makes it a candidate. The first is counted for any number of
lists at once: after how many others does a query visit the list of each of its true neighbours? The second is measured
by searches with enough lists, and changes little with fewer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from facepipe.index.cost import estimate_lists
from facepipe.index.manifest import TargetCurve, TargetPoint
from facepipe.index.samples import (
    RadiusSample,
    RecallSample,
    compute_lower_bound,
    draw_radius_sample,
    draw_sample,
)
from facepipe.index.search import Index, SearchSetting
from facepipe.nearest.distances import VectorBlock
from facepipe.types import Int64

_KS = (100, 1000)
_QUERIES = 200
_MAX_SHARE = 0.2  # of the gallery's faces: whoever asks for more neighbours visits all lists
# Radii within which so many of the queries have a first, tenth, ... neighbour.
_RADII = ((1, 0.05), (1, 0.5), (10, 0.5), (100, 0.5), (1000, 0.5))
_RADIUS_STEP = 0.01
_MIN_RADIUS_QUERIES = 20  # that have a face within a radius, for its recall to be known
_MAX_FULL_SHARE = 0.02  # of the queries that have more faces within a radius than nearest ones are known
_MAX_TRUTH = 100  # true faces per query, drawn from all
_LEVELS = (0.9, 0.95, 0.97, 0.98, 0.985, 0.99, 0.995)  # of recall
_GRID = 80  # numbers of lists that are looked at
# Candidates re-scored per neighbour.
_RESCORED = (2, 4, 8)
_RESCORED_WITHIN = (100, 400)  # of a search by radius, at first
_MOST_LISTS = 0.995  # share of the true faces in the visited lists when codes are measured
_CODE_QUERIES = 50
_GOOD_CODES = 0.998  # share of what is in the lists, from which more candidates are not worth trying
_MAX_CODE_ANSWERS = 100_000  # of all queries of a search by radius


@dataclass(frozen=True)
class _Target:
    """What is asked for, and some of what is truly there.

    Attributes:
        k: Neighbours per query; None for a radius.
        radius: Euclidean distance; None for neighbours.
        rows: Queries of the sample that have a true face, (m,).
        truth: Face ids (m, w) drawn from all true ones; -1 behind the last one.
        counts: True faces per query, (m,).
    """

    k: int | None
    radius: float | None
    rows: Int64
    truth: Int64
    counts: Int64


def measure_targets(index: Index, seed: int, recall: float) -> tuple[TargetCurve, ...]:
    """Measure which settings reach a recall for more neighbours than ten, and within radii.

    Args:
        index: an index.
        seed: of the sample.
        recall: requested recall.
    """
    most = min(max(_KS), int(_MAX_SHARE * index.live))
    if not index.lists or most < 1:
        return ()
    sample = draw_sample(index, seed, _QUERIES, most)
    targets = [_ask_neighbours(sample, k, seed) for k in _KS if k <= most]
    targets += _ask_radii(index, sample, seed)
    levels = sorted({*_LEVELS, recall})
    return tuple(TargetCurve(target.k, target.radius, _measure(index, sample, target, levels)) for target in targets)


def _ask_neighbours(sample: RecallSample, k: int, seed: int) -> _Target:
    columns = np.sort(np.random.default_rng(seed).choice(k, min(k, _MAX_TRUTH), replace=False))
    rows = np.arange(len(sample.own))
    return _Target(k, None, rows, sample.truth[:, columns], np.full(len(rows), k))


def _ask_radii(index: Index, sample: RecallSample, seed: int) -> list[_Target]:
    """Choose radii, rising, and find what is within them."""
    radii = set()
    for rank, share in _RADII:
        if rank <= sample.distances.shape[1]:
            distance = float(np.quantile(sample.distances[:, rank - 1], share))
            radii.add(float(round(np.ceil(distance / _RADIUS_STEP) * _RADIUS_STEP, 2)))
    targets = []
    for radius in sorted(radius for radius in radii if 0 < radius < np.inf):
        inside = _find_inside(index, sample, radius, seed)
        if len(inside.own) < _MIN_RADIUS_QUERIES:
            continue
        truth = np.full((len(inside.own), _MAX_TRUTH), -1)
        for row, ids in enumerate(inside.truth):
            truth[row, : len(ids)] = ids[:_MAX_TRUTH]
        rows = np.flatnonzero(np.isin(sample.own, inside.own))
        targets.append(_Target(None, radius, rows, truth, inside.counts))
    return targets


def _find_inside(index: Index, sample: RecallSample, radius: float, seed: int) -> RadiusSample:
    """Find what is within a radius of each query, in random order: among its nearest, if these reach beyond it."""
    is_full = (sample.distances[:, -1] <= radius) & (sample.truth[:, -1] >= 0)
    if is_full.mean() > _MAX_FULL_SHARE:
        return draw_radius_sample(index, VectorBlock(sample.own, sample.queries), radius, seed)
    is_inside = (sample.distances <= radius) & (sample.truth >= 0)
    rng = np.random.default_rng(seed)
    chosen = np.flatnonzero(is_inside.any(axis=1))
    truth = [rng.permutation(sample.truth[row, is_inside[row]]) for row in chosen]
    return RadiusSample(sample.queries[chosen], sample.own[chosen], truth, is_inside[chosen].sum(axis=1))


def _measure(index: Index, sample: RecallSample, target: _Target, levels: Sequence[float]) -> tuple[TargetPoint, ...]:
    """Measure which settings reach the levels of recall, cheapest first."""
    ranks = index.rank_lists(sample.queries[target.rows], target.truth)
    exists = target.truth >= 0
    # Share of each query's true faces in the first lists, by their number: (m, lists).
    numbers = np.unique(np.rint(np.geomspace(1, index.lists, _GRID)).astype(np.int64))
    shares = (
        np.stack([((ranks < number) & exists).sum(axis=1) for number in numbers], axis=1) / exists.sum(axis=1)[:, None]
    )
    listed = np.maximum.accumulate([compute_lower_bound(column) for column in shares.T])
    enough = np.flatnonzero(shares.mean(axis=0) >= _MOST_LISTS)
    most = int(numbers[enough[0]]) if len(enough) else index.lists
    points = []
    rescored = _RESCORED_WITHIN if target.k is None else [count * target.k for count in _RESCORED]
    for rescore in rescored:
        coded = _measure_codes(index, sample, target, ranks, SearchSetting(most, rescore))
        reached = listed * coded
        for level in levels:
            at = int(np.argmax(reached >= level))
            if reached[at] >= level:
                points.append(TargetPoint(int(numbers[at]), rescore, round(float(reached[at]), 4)))
        points.append(TargetPoint(index.lists, rescore, round(float(reached[-1]), 4)))
        if coded >= _GOOD_CODES:
            break
    return _select_pareto(index, points)


def _measure_codes(index: Index, sample: RecallSample, target: _Target, ranks: Int64, setting: SearchSetting) -> float:
    """Measure the share of the true faces in visited lists that a search finds."""
    # Few queries, if each has many answers.
    count = (
        int(np.searchsorted(np.cumsum(target.counts), _MAX_CODE_ANSWERS, side="right"))
        if target.k is None
        else len(ranks)
    )
    chosen = slice(0, max(1, min(count, _CODE_QUERIES)))
    queries = sample.queries[target.rows[chosen]]
    if target.k is None:
        answers = [ids for ids, _ in index.search_within(queries, target.radius or 0.0, index.live, setting)]
    else:
        own = sample.own[target.rows[chosen]]
        answers = list(index.search(queries, target.k + 1, setting).exclude_own(own, target.k).ids)
    is_listed = (ranks[chosen] < setting.nprobe) & (target.truth[chosen] >= 0)
    is_found = np.array([np.isin(truth, ids) for truth, ids in zip(target.truth[chosen], answers, strict=True)], bool)
    return float((is_found & is_listed).sum() / max(1, is_listed.sum()))


def _select_pareto(index: Index, points: Sequence[TargetPoint]) -> tuple[TargetPoint, ...]:
    """Select the points that no cheaper one reaches."""

    def estimate(point: TargetPoint) -> float:
        return estimate_lists(
            index.live,
            lists=index.lists,
            shards=len(index.shards),
            nprobe=point.nprobe,
            rescore=point.rescore,
            dim=index.dim,
        )

    selected: list[TargetPoint] = []
    for point in sorted(points, key=estimate):
        if not selected or point.recall > selected[-1].recall:
            selected.append(point)
    return tuple(selected)
