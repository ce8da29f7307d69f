"""Rank suspected merges and splits, so that the first ones are worth a look.

The order is what counts. The probabilities only give it a level, which is that of known faces (LFW-dev); the page
corrects it by what people decide.
"""

from dataclasses import replace

import numpy as np

from facepipe.curation.clusters.review import SuspectedMerges, SuspectedSplits
from facepipe.curation.graph import Graph
from facepipe.curation.graph.clusters import Clusters
from facepipe.curation.one_person.model import OnePersonModel
from facepipe.types import Bool, Float64, Int64

# How many suspicions are right: merges per cluster, and of all suspected merges and splits at most.
_RIGHT_MERGES_PER_CLUSTER = 0.03
_RIGHT_MERGES = 0.2
_RIGHT_SPLITS = 1 / 3
_UNFIT_PROBABILITY = 0.002  # that a pair with a cluster without a fit face is one person
_SLOPE_MERGES = 2.0  # of the logistic curve, per standard deviation of the scores
_SLOPE_SPLITS = 1.0
_STEPS = 60


def rank_merges(
    graph: Graph, labels: Int64, clusters: Clusters, merges: SuspectedMerges, is_unfit: Bool
) -> SuspectedMerges:
    """Estimate the probabilities of suspected merges, and put the most probable first.

    What counts is how much more alike two clusters are than strangers of their size and of their region of the
    embedding space: some regions are crowded. A cluster of blurred and cut faces alone is near to many others, and
    hardly ever right.

    Args:
        graph: the face graph, n nodes.
        labels: cluster of each node, (n,).
        clusters: the clusters.
        merges: the suspected merges.
        is_unfit: whether each node is unfit, (n,).

    Returns:
        The merges, by falling probability.
    """
    if not len(merges):
        return merges
    model = OnePersonModel.fit(
        clusters,
        np.asarray(graph.nodes.vectors),
        np.asarray(graph.density),
        labels,
        compared=np.unique(np.concatenate([merges.left, merges.right])),
        threshold=graph.info.threshold.similarity,
    )
    ends = np.stack([merges.left, merges.right], axis=1)
    sizes = clusters.size[ends]
    inverse = (1 / sizes).sum(axis=1)
    deviation = model.compute_deviation(merges.similarity.astype(np.float64), inverse)
    if model.regions is not None:
        # The more crowded of the two regions decides.
        ends_in_region = [model.regions.normalise(deviation, ends[:, end])[0] for end in (0, 1)]
        deviation = np.minimum(*ends_in_region)
    # Clusters without a fit face found no person.
    has_fit = np.zeros(len(clusters), bool)
    has_fit[labels[~is_unfit]] = True
    is_unlikely = ~has_fit[ends].all(axis=1)
    share = min(_RIGHT_MERGES, _RIGHT_MERGES_PER_CLUSTER * len(clusters) / len(merges))
    probability = _set_level(deviation, share, slope=_SLOPE_MERGES)
    probability[is_unlikely] = np.minimum(probability[is_unlikely], _UNFIT_PROBABILITY)
    order = np.lexsort((merges.right, merges.left, -probability))
    return SuspectedMerges(
        merges.left[order], merges.right[order], merges.similarity[order], probability[order].astype(np.float32)
    )


def rank_splits(splits: SuspectedSplits) -> SuspectedSplits:
    """Estimate the probabilities of suspected splits, and put the most probable first.

    Among the parts of one cluster the mean similarity ranks better than a likelihood that knows their sizes: nearly all
    second parts are one face.
    """
    if not len(splits):
        return splits
    probability = _set_level(-splits.similarity.astype(np.float64), _RIGHT_SPLITS, slope=_SLOPE_SPLITS)
    order = np.lexsort((splits.cluster, -probability))
    return replace(
        splits,
        cluster=splits.cluster[order],
        leaving=splits.leaving[order],
        similarity=splits.similarity[order],
        probability=probability[order].astype(np.float32),
    )


def _set_level(score: Float64, share: float, *, slope: float) -> Float64:
    """Turn scores (m,) into probabilities: a logistic curve, with the offset that makes their mean a share."""
    scaled = slope * (score - score.mean()) / max(1e-6, float(score.std()))
    # The mean rises with the offset, so the offset is found by halving an interval.
    low = -float(scaled.max()) - 40
    high = -float(scaled.min()) + 40
    for _ in range(_STEPS):
        offset = (low + high) / 2
        if float(_sigmoid(scaled + offset).mean()) < share:
            low = offset
        else:
            high = offset
    return _sigmoid(scaled + (low + high) / 2)


def _sigmoid(value: Float64) -> Float64:
    return np.asarray(1 / (1 + np.exp(-np.clip(value, -50, 50))), np.float64)
