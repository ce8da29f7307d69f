"""Verification figures from distances and labels, on plain arrays."""

from typing import NamedTuple

import numpy as np

from facepipe.types import Bool, Float64, Int64


class Curve(NamedTuple):
    """Operating points by rising threshold: a pair is accepted as the same person where distance <= threshold."""

    thresholds: Float64
    far: Float64
    tar: Float64


def roc(distances: Float64, same: Bool) -> Curve:
    """One operating point for each distinct distance, opened by the one that accepts nothing."""
    order = np.argsort(distances, kind="stable")
    sorted_distances, sorted_same = distances[order], same[order]
    last = np.append(np.flatnonzero(np.diff(sorted_distances)), len(order) - 1)
    tar = np.cumsum(sorted_same)[last] / max(1, same.sum())
    far = np.cumsum(~sorted_same)[last] / max(1, (~same).sum())
    return Curve(
        np.concatenate([[-np.inf], sorted_distances[last]]), np.concatenate([[0.0], far]), np.concatenate([[0.0], tar])
    )


def auc(curve: Curve) -> float:
    """Area under the curve; ties count half (trapezoids)."""
    return float(np.trapezoid(curve.tar, curve.far))


def equal_error_rate(curve: Curve) -> float:
    """Where false accepts and false rejects are equal, linear between operating points."""
    gap = curve.far - (1 - curve.tar)
    above = int(np.argmax(gap >= 0))
    if above == 0:
        return float(curve.far[0])
    share = -gap[above - 1] / (gap[above] - gap[above - 1])
    return float(curve.far[above - 1] + share * (curve.far[above] - curve.far[above - 1]))


def tar_at_far(curve: Curve, far: float) -> tuple[float, float]:
    """(TAR, threshold) of the last operating point whose FAR does not exceed the target."""
    at = int(np.searchsorted(curve.far, far, side="right")) - 1
    return float(curve.tar[at]), float(curve.thresholds[at])


def best_threshold(distances: Float64, same: Bool) -> float:
    """A threshold of the highest accuracy, midway between distances; the middle one where several tie."""
    order = np.argsort(distances, kind="stable")
    d, s = distances[order], same[order]
    correct = np.concatenate([[0], np.cumsum(s)]) + np.concatenate([np.cumsum((~s)[::-1])[::-1], [0]])
    cuts = np.concatenate([[np.nextafter(d[0], -np.inf)], (d[1:] + d[:-1]) / 2, [d[-1]]])
    possible = np.concatenate([[True], d[1:] != d[:-1], [True]])
    best = cuts[possible & (correct == correct[possible].max())]
    return float(best[len(best) // 2])


class Folds(NamedTuple):
    """Accuracy of each fold at the threshold chosen on the others."""

    accuracies: Float64
    thresholds: Float64

    @property
    def mean(self) -> float:
        return float(self.accuracies.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean: sample standard deviation over the root of the number of folds, as LFW prescribes."""
        n = len(self.accuracies)
        return float(self.accuracies.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")


def cross_validate(distances: Float64, same: Bool, folds: Int64) -> Folds:
    """k-fold accuracy; with a single fold the threshold is chosen on the fold itself."""
    accuracies, thresholds = [], []
    for fold in np.unique(folds):
        test = folds == fold
        train = ~test if (~test).any() else test
        threshold = best_threshold(distances[train], same[train])
        thresholds.append(threshold)
        accuracies.append(np.mean((distances[test] <= threshold) == same[test]))
    return Folds(np.array(accuracies), np.array(thresholds))
