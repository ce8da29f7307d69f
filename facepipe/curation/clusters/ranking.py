"""Rank suspected merges and splits, so that the first ones are worth a look.

The shares of suspicions that are right are those of LFW-dev. They set the level of the probabilities, and the order
within a kind does not depend on them. The page corrects the level by what people decide.
"""

from dataclasses import replace

import numpy as np

from facepipe.curation.clusters.review import SuspectedMerges, SuspectedSplits
from facepipe.curation.graph import Graph
from facepipe.curation.graph.clusters import Clusters
from facepipe.curation.one_person.model import OnePersonModel
from facepipe.types import Bool, Float64, Int64

_RIGHT_MERGES = 0.2  # share of suspected merges that are right
_RIGHT_SPLITS = 1 / 3
_UNFIT_RATIO = -6.0  # log likelihood ratio of a pair with a cluster that has no fit face
_STEPS = 60


def rank_merges(
    graph: Graph, labels: Int64, clusters: Clusters, merges: SuspectedMerges, is_unfit: Bool
) -> SuspectedMerges:
    """Estimate the probabilities of suspected merges, and put those first that gain most.

    The mean similarity of two clusters says less if they are small, or if their region of the embedding space is
    crowded; the likelihoods of `facepipe.curation.one_person` know both. A cluster of blurred and cut faces alone is
    near to many others, and hardly ever right.

    Args:
        graph: the face graph, n nodes.
        labels: cluster of each node, (n,).
        clusters: the clusters.
        merges: the suspected merges.
        is_unfit: whether each node is unfit, (n,).

    Returns:
        The merges, by falling probability times the faces of the smaller cluster.
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
    similarity = merges.similarity.astype(np.float64)
    ratio = model.compute_log_ratio(similarity, inverse, ends, is_face=sizes.min(axis=1) < 2)
    # Clusters without a fit face found no person.
    has_fit = np.zeros(len(clusters), bool)
    has_fit[labels[~is_unfit]] = True
    is_unlikely = ~has_fit[ends].all(axis=1)
    probability = _set_level(ratio, _RIGHT_MERGES)
    probability[is_unlikely] = np.minimum(probability[is_unlikely], 1 / (1 + np.exp(-_UNFIT_RATIO)))
    order = np.lexsort((merges.right, merges.left, -probability * sizes.min(axis=1)))
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
    similarity = splits.similarity.astype(np.float64)
    spread = max(1e-6, float(similarity.std()))
    probability = _set_level((similarity.mean() - similarity) / spread, _RIGHT_SPLITS)
    order = np.lexsort((splits.cluster, -probability))
    return replace(
        splits,
        cluster=splits.cluster[order],
        leaving=splits.leaving[order],
        similarity=splits.similarity[order],
        probability=probability[order].astype(np.float32),
    )


def _set_level(score: Float64, share: float) -> Float64:
    """Turn scores (m,) into probabilities whose mean is a share: a logistic curve with the right offset."""
    # The mean rises with the offset, so the offset is found by halving an interval.
    low = -float(score.max()) - 40
    high = -float(score.min()) + 40
    for _ in range(_STEPS):
        offset = (low + high) / 2
        if float(_sigmoid(score + offset).mean()) < share:
            low = offset
        else:
            high = offset
    return _sigmoid(score + (low + high) / 2)


def _sigmoid(value: Float64) -> Float64:
    return np.asarray(1 / (1 + np.exp(-np.clip(value, -50, 50))), np.float64)
