"""Recall of an index against exact search, on faces of the gallery, and the setting that reaches what was requested."""

from dataclasses import dataclass, replace

import numpy as np

from facepipe.index.candidates import compute_imbalance
from facepipe.index.cost import estimate_lists
from facepipe.index.exact import read_live_blocks, search_exactly
from facepipe.index.manifest import Manifest, RecallPoint
from facepipe.index.search import Index, SearchSetting
from facepipe.types import Float32, Float64, Int64

K = 10
_MAX_DISTANCES = 500_000_000  # computed for the truth
# Bounds of the sample's size if none is requested.
_MIN_QUERIES = 200
_MAX_QUERIES = 1000
# Candidates re-scored per query: the first number alone while recall is low, then both.
_RESCORED = (100, 200)
_FINE_RECALL = 0.85  # recall from which steps are small
_CONFIDENCE = 1.64  # standard errors: the requested recall is reached with 95 % certainty


@dataclass(frozen=True)
class RecallSample:
    """Faces of the gallery as queries, with their true neighbours.

    Attributes:
        queries: Vectors (m, 128).
        own: Their own face ids (m,).
        truth: Face ids (m, k) of the k nearest others.
    """

    queries: Float32
    own: Int64
    truth: Int64


def draw_sample(index: Index, seed: int, queries: int | None = None) -> RecallSample:
    """Draw a seeded sample over all shards, with its truth. Every query leaves itself out."""
    # A larger gallery gets fewer queries, because each is compared with every vector.
    by_work = int(np.clip(_MAX_DISTANCES / max(1, index.live), _MIN_QUERIES, _MAX_QUERIES))
    count = min(index.live, queries or by_work)
    rng = np.random.default_rng(seed)
    parts = [np.empty(0, np.int64)]
    # Each shard contributes in proportion to its live faces.
    for shard in index.shards:
        ids = np.setdiff1d(shard.ids, shard.tombstones) if shard.tombstones.size else shard.ids
        share = round(count * len(ids) / index.live)
        rows = np.sort(rng.choice(len(ids), min(len(ids), share), replace=False))
        parts.append(np.asarray(ids[rows]))
    own = np.concatenate(parts)
    vectors = index.get_vectors(own)
    truth = search_exactly(vectors, read_live_blocks(index), K + 1).exclude_own(own, K)
    return RecallSample(vectors, own, truth.ids)


def compute_recall(results: Int64, truth: Int64) -> Float64:
    """Compute the share (n,) of the true neighbours (n, k) that are among the results (n, k).

    If there are fewer than k true neighbours, of those.
    """
    exists = truth >= 0
    # Compare each true neighbour with every result, (n, k, k).
    hits = ((truth[:, :, None] == results[:, None, :]) & exists[:, :, None]).any(axis=2).sum(axis=1)
    return np.asarray(hits / np.maximum(1, exists.sum(axis=1)), np.float64)


def measure_curve(index: Index, sample: RecallSample, recall: float) -> tuple[RecallPoint, ...]:
    """Measure for rising recall the cheapest setting that reaches it, up to a little above the requested recall.

    Lists double until the goal is near, then rise by a factor of 1.19, and beyond it of 1.5. Recalls are lower bounds
    of 95 % one-sided intervals.
    """
    if not index.lists:
        return (_measure_point(index, sample, SearchSetting(1, _RESCORED[0])),)
    points: list[RecallPoint] = []
    nprobe = min(8, index.lists)
    goal = max(0.99, recall)
    while True:
        # Near the goal more re-scoring may be cheaper than more lists: measure both.
        is_near = bool(points) and points[-1].recall_at_10 > _FINE_RECALL
        rescored = _RESCORED if is_near else _RESCORED[:1]
        points += [_measure_point(index, sample, SearchSetting(nprobe, count)) for count in rescored]
        reached = points[-1].recall_at_10
        if nprobe == index.lists or reached >= goal:
            return _select_pareto(points, index)
        if reached >= recall:
            step = 1.5
        elif reached > _FINE_RECALL:
            step = 2**0.25
        else:
            step = 2
        nprobe = min(index.lists, round(nprobe * step) + 1)


def tune_manifest(gallery: str, draft: Manifest, recall: float, *, seed: int, new_template: bool) -> Manifest:
    """Measure the index of a draft and choose its setting.

    Args:
        gallery: path or URL.
        draft: a manifest that need not be published.
        recall: requested recall@10.
        seed: of the sample.
        new_template: whether the template was trained for these shards: it then gets their imbalance.
    """
    index = Index(gallery, manifest=draft)
    curve = measure_curve(index, draw_sample(index, seed), recall)
    nprobe, rescore = replace(draft, curve=curve).choose_setting(recall)
    template = draft.template
    if new_template:
        template = replace(template, imbalance=compute_imbalance(index.count_per_list()))
    return replace(
        draft,
        template=template,
        recall=recall,
        nprobe=nprobe,
        rescore=rescore,
        curve=curve,
        measured=draft.live,
    )


def is_unbalanced(gallery: str, draft: Manifest, max_growth: float) -> bool:
    """Say whether the lists' imbalance is more than `max_growth` times that of training."""
    if not draft.template.lists:
        return False
    lengths = Index(gallery, manifest=draft).count_per_list()
    return compute_imbalance(lengths) > max_growth * draft.template.imbalance


def _measure_point(index: Index, sample: RecallSample, setting: SearchSetting) -> RecallPoint:
    ids = index.search(sample.queries, K + 1, setting).exclude_own(sample.own, K).ids
    at_1 = compute_recall(ids[:, :1], sample.truth[:, :1])
    at_10 = compute_recall(ids, sample.truth)
    return RecallPoint(setting.nprobe, setting.rescore, _compute_lower_bound(at_1), _compute_lower_bound(at_10))


def _compute_lower_bound(values: Float64) -> float:
    """Return what the mean is not below, with 95 % certainty."""
    if len(values) < 2:
        return float(values.mean()) if len(values) else 1.0
    return max(0.0, round(float(values.mean() - _CONFIDENCE * values.std(ddof=1) / len(values) ** 0.5), 4))


def _select_pareto(points: list[RecallPoint], index: Index) -> tuple[RecallPoint, ...]:
    """Select the points that no cheaper one reaches."""

    def estimate(point: RecallPoint) -> float:
        return estimate_lists(
            index.live, lists=index.lists, shards=len(index.shards), nprobe=point.nprobe, rescore=point.rescore
        )

    # By rising cost, keep the points that reach more than all cheaper ones.
    selected: list[RecallPoint] = []
    for point in sorted(points, key=estimate):
        if not selected or point.recall_at_10 > selected[-1].recall_at_10:
            selected.append(point)
    return tuple(selected)
