"""Recall of an index against exact search, on faces of the gallery, and the setting that reaches what was requested.

Other numbers of neighbours, and radii: facepipe.index.targets.
"""

from dataclasses import replace

from facepipe.index.candidates import compute_imbalance
from facepipe.index.cost import estimate_lists
from facepipe.index.manifest import CURVE_K, Manifest, RecallPoint
from facepipe.index.samples import RecallSample, compute_lower_bound, compute_recall, draw_sample
from facepipe.index.search import Index, SearchSetting
from facepipe.index.targets import measure_targets

# Candidates re-scored per query: the first number alone while recall is low, then both.
_RESCORED = (100, 200)
_FINE_RECALL = 0.85  # recall from which steps are small


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
    index = Index(gallery, manifest=draft, with_ignored=True)
    curve = measure_curve(index, draw_sample(index, seed), recall)
    nprobe, rescore = replace(draft, curve=curve).choose_setting(recall)
    targets = measure_targets(index, seed, recall)
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
        targets=targets,
        measured=draft.live,
    )


def is_unbalanced(gallery: str, draft: Manifest, max_growth: float) -> bool:
    """Say whether the lists' imbalance is more than `max_growth` times that of training."""
    if not draft.template.lists:
        return False
    lengths = Index(gallery, manifest=draft, with_ignored=True).count_per_list()
    return compute_imbalance(lengths) > max_growth * draft.template.imbalance


def _measure_point(index: Index, sample: RecallSample, setting: SearchSetting) -> RecallPoint:
    ids = index.search(sample.queries, CURVE_K + 1, setting).exclude_own(sample.own, CURVE_K).ids
    at_1 = compute_recall(ids[:, :1], sample.truth[:, :1])
    at_10 = compute_recall(ids, sample.truth)
    return RecallPoint(setting.nprobe, setting.rescore, compute_lower_bound(at_1), compute_lower_bound(at_10))


def _select_pareto(points: list[RecallPoint], index: Index) -> tuple[RecallPoint, ...]:
    """Select the points that no cheaper one reaches."""

    def estimate(point: RecallPoint) -> float:
        return estimate_lists(
            index.live,
            lists=index.lists,
            shards=len(index.shards),
            nprobe=point.nprobe,
            rescore=point.rescore,
            dim=index.dim,
        )

    # By rising cost, keep the points that reach more than all cheaper ones.
    selected: list[RecallPoint] = []
    for point in sorted(points, key=estimate):
        if not selected or point.recall_at_10 > selected[-1].recall_at_10:
            selected.append(point)
    return tuple(selected)
