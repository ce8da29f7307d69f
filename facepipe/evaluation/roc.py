"""Compute verification figures from distances and labels, on plain arrays."""

from typing import NamedTuple

import numpy as np

from facepipe.types import Bool, Float64, Int64


class RocCurve(NamedTuple):
    """Operating points by rising threshold. A pair is accepted as the same person if its distance <= threshold.

    Attributes:
        thresholds: Distances, (k,).
        far: False accept rates, (k,).
        tar: True accept rates, (k,).
    """

    thresholds: Float64
    far: Float64
    tar: Float64


def compute_roc(distances: Float64, same: Bool) -> RocCurve:
    """Compute one operating point per distinct distance, after one that accepts nothing.

    Args:
        distances: distance of each pair, (n,).
        same: whether each pair shows one person, (n,).
    """
    order = np.argsort(distances, kind="stable")
    distances = distances[order]
    same = same[order]
    # `last` (k,) ends each run of equal distances, which are accepted together.
    last = np.append(np.flatnonzero(np.diff(distances)), len(order) - 1)
    tar = np.cumsum(same)[last] / max(1, same.sum())
    far = np.cumsum(~same)[last] / max(1, (~same).sum())
    return RocCurve(
        np.concatenate([[-np.inf], distances[last]]),
        np.concatenate([[0.0], far]),
        np.concatenate([[0.0], tar]),
    )


def compute_auc(curve: RocCurve) -> float:
    """Compute the area under the curve. Ties count half (trapezoids)."""
    return float(np.trapezoid(curve.tar, curve.far))


def compute_equal_error_rate(curve: RocCurve) -> float:
    """Compute the rate at which false accepts and false rejects are equal, linear between operating points."""
    # FAR less FRR rises along the curve, from -1 to 1; the rates are equal at its zero.
    gap = curve.far - (1 - curve.tar)
    above = int(np.argmax(gap >= 0))
    if above == 0:
        return float(curve.far[0])
    share = -gap[above - 1] / (gap[above] - gap[above - 1])
    return float(curve.far[above - 1] + share * (curve.far[above] - curve.far[above - 1]))


def find_tar_at_far(curve: RocCurve, far: float) -> tuple[float, float]:
    """Find TAR and threshold of the last operating point whose FAR does not exceed the given one."""
    at = int(np.searchsorted(curve.far, far, side="right")) - 1
    return float(curve.tar[at]), float(curve.thresholds[at])


def find_best_threshold(distances: Float64, same: Bool) -> float:
    """Find a threshold of the highest accuracy, midway between distances; the middle one if several tie."""
    return _find_best_cut(distances, same, same_weight=1.0, other_weight=1.0)


def find_balanced_threshold(distances: Float64, same: Bool) -> float:
    """Find a threshold as `find_best_threshold` does, with pairs of both kinds counted as if there were as many.

    Among many more pairs of two persons than of one, the highest accuracy calls next to all pairs different.
    """
    same_weight = 1 / max(1, int(same.sum()))
    other_weight = 1 / max(1, int((~same).sum()))
    return _find_best_cut(distances, same, same_weight=same_weight, other_weight=other_weight)


def _find_best_cut(distances: Float64, same: Bool, *, same_weight: float, other_weight: float) -> float:
    """Find the cut with the highest weight of right decisions."""
    order = np.argsort(distances, kind="stable")
    distances = distances[order]
    same = same[order]
    # Right decisions for each cut: same pairs below it and different pairs above it.
    accepted = np.concatenate([[0], np.cumsum(same)])
    rejected = np.concatenate([np.cumsum((~same)[::-1])[::-1], [0]])
    correct = accepted * same_weight + rejected * other_weight
    below_all = np.nextafter(distances[0], -np.inf)
    cuts = np.concatenate([[below_all], (distances[1:] + distances[:-1]) / 2, [distances[-1]]])
    # Equal distances cannot be cut apart.
    is_possible = np.concatenate([[True], distances[1:] != distances[:-1], [True]])
    # Weights are fractions, whose sums may differ in the last bits where counts are equal.
    best = cuts[is_possible & (correct >= correct[is_possible].max() * (1 - 1e-12))]
    return float(best[len(best) // 2])


class FoldResults(NamedTuple):
    """Accuracy of each fold at the threshold chosen on the others.

    Attributes:
        accuracies: Accuracy of each fold, (k,).
        thresholds: Threshold of each fold, (k,).
    """

    accuracies: Float64
    thresholds: Float64

    @property
    def mean(self) -> float:
        """Mean accuracy."""
        return float(self.accuracies.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of the mean: sample standard deviation over the root of the number of folds, as in LFW."""
        n = len(self.accuracies)
        return float(self.accuracies.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")


def cross_validate(distances: Float64, same: Bool, folds: Int64) -> FoldResults:
    """Compute k-fold accuracy. With a single fold the threshold is chosen on the fold itself.

    Args:
        distances: distance of each pair, (n,).
        same: whether each pair shows one person, (n,).
        folds: fold of each pair, (n,).
    """
    accuracies = []
    thresholds = []
    for fold in np.unique(folds):
        is_test = folds == fold
        is_train = ~is_test if (~is_test).any() else is_test
        threshold = find_best_threshold(distances[is_train], same[is_train])
        thresholds.append(threshold)
        accuracies.append(np.mean((distances[is_test] <= threshold) == same[is_test]))
    return FoldResults(np.array(accuracies), np.array(thresholds))
