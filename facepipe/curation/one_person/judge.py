"""Judge pairs of groups of faces: how likely each is one person, with how common that is learnt from the pairs."""

from dataclasses import dataclass

import numpy as np

from facepipe.curation.one_person.model import OnePersonModel
from facepipe.types import Float32, Float64, Int64

MIN_PROBABILITY = 0.6
"""From which probability a pair is named as one person. At least so many of those that are named are right. The others
are called look-alikes."""

MIN_SHOWN = 0.001
"""A pair that is less likely is not worth a look."""

# Why two groups are compared, in rising order of what that says before their faces are looked at.
NEAR = 0
SAME_NAME = 1
SAME_PICTURE = 2
_REASON_COUNT = 3

_ROUNDS = 4  # of fitting the tail of strangers without pairs of one person
_STEPS = 50
_PRIOR_PARTS = 0.5  # groups of two persons, before anything is seen
_PRIOR_WEIGHT = 2.0  # pairs that the first guess at a rate counts as
_NAME_RATE = 0.9
_NUMBER_RATE = 0.1  # a number as a name says little: other corpora count from 0 too
_PICTURE_RATE = 0.5


@dataclass(frozen=True)
class GroupPairs:
    """Pairs of groups that may be one person.

    Attributes:
        ends: The two groups of each pair, (m, 2).
        similarity: Mean similarity of their faces, without those that are copies of each other, (m,).
        sizes: Faces that it rests on, (m, 2).
        reason: Why the two are compared, (m,): NEAR, SAME_NAME or SAME_PICTURE.
        is_number: Whether the name of a pair with one name is a number, (m,).
        total: Number of pairs that could have been near.
        expected: Number of those that are one person, as far as that is known before they are looked at.
    """

    ends: Int64
    similarity: Float32
    sizes: Int64
    reason: Int64
    is_number: Int64
    total: float
    expected: float

    def __len__(self) -> int:
        return len(self.similarity)

    @property
    def inverse(self) -> Float64:
        """1 / n + 1 / m for the sizes of each pair, (m,)."""
        return np.asarray((1 / np.maximum(1, self.sizes)).sum(axis=1), np.float64)


def judge_pairs(model: OnePersonModel, pairs: GroupPairs) -> Float64:
    """Estimate the probability (m,) that each pair of groups is one person.

    Very similar pairs may be of one person, or the tail of strangers may be long: look-alikes. Both are tried, and what
    explains all pairs better holds.
    """
    if not len(pairs):
        return np.empty(0)
    candidates = []
    for start in (model, model.hope()):
        probability, fitted = _iterate(start, pairs)
        candidates.append((fitted.score(pairs.inverse, probability), probability))
    return max(candidates, key=lambda candidate: candidate[0])[1]


def _iterate(model: OnePersonModel, pairs: GroupPairs) -> tuple[Float64, OnePersonModel]:
    """Estimate probabilities (m,) and the tail of strangers in turn."""
    similarity = pairs.similarity.astype(np.float64)
    smaller = pairs.sizes.min(axis=1)
    deviation = model.compute_deviation(similarity, pairs.inverse)
    probability = np.zeros(len(pairs))
    for n in range(_ROUNDS):
        if n:
            model = model.refit(deviation, probability)
        ratio = model.compute_log_ratio(similarity, pairs.inverse, pairs.ends, is_face=smaller < 2)
        # If all faces of one are copies of the other's, nothing is left to compare: the copies themselves decide.
        ratio = np.where(smaller < 1, model.max_for, ratio)
        probability = _weigh(ratio, pairs)
    return probability, model


def judge_parts(model: OnePersonModel, similarity: Float32, sizes: Int64, group_count: int) -> Float64:
    """Estimate the probability (m,) that two parts of one group are two persons.

    Args:
        model: likelihoods.
        similarity: mean similarity of the two parts of each group, (m,).
        sizes: their faces, (m, 2).
        group_count: groups that could have had two such parts.
    """
    inverse = (1 / np.maximum(1, sizes)).sum(axis=1)
    is_face = sizes.min(axis=1) < 2 if len(sizes) else np.empty(0, bool)
    ratio = -model.compute_log_ratio(similarity.astype(np.float64), inverse, is_face=is_face)
    return _estimate(ratio, prior=_PRIOR_PARTS, weight=1.0, total=float(max(group_count, len(similarity))))


def _weigh(ratio: Float64, pairs: GroupPairs) -> Float64:
    """Turn likelihood ratios into probabilities. Each reason has a rate of its own; names of digits have one too."""
    probability = np.zeros(len(pairs))
    for reason in range(_REASON_COUNT):
        for is_number in (0, 1):
            chosen = np.flatnonzero((pairs.reason == reason) & (pairs.is_number == is_number))
            if reason == NEAR:
                probability[chosen] = _estimate(
                    ratio[chosen], prior=pairs.expected, weight=2 * pairs.expected, total=pairs.total
                )
                continue
            rate = _PICTURE_RATE
            if reason == SAME_NAME:
                rate = _NUMBER_RATE if is_number else _NAME_RATE
            probability[chosen] = _estimate(
                ratio[chosen], prior=_PRIOR_WEIGHT * rate, weight=_PRIOR_WEIGHT, total=float(len(chosen))
            )
    return probability


def _estimate(ratio: Float64, *, prior: float, weight: float, total: float) -> Float64:
    """Estimate probabilities (m,) and how common they are among `total` pairs, by expectation maximisation.

    Args:
        ratio: log likelihood ratios, (m,).
        prior: pairs of one person that the first guess counts as.
        weight: pairs that it counts as in all.
        total: number of pairs, those that are not listed included.
    """
    probability = np.zeros(len(ratio))
    total = max(total, float(len(ratio)))
    # The first guess is high, so that many pairs of one person are not taken for the tail of strangers.
    rate = np.clip((prior + 0.5 * len(ratio)) / (weight + total), 1e-15, 1 - 1e-6)
    for _ in range(_STEPS):
        odds = np.clip(ratio + np.log(rate / (1 - rate)), -50, 50)
        probability = 1 / (1 + np.exp(-odds))
        rate = np.clip((prior + probability.sum()) / (weight + total), 1e-15, 1 - 1e-6)
    return np.asarray(probability, np.float64)
