"""Figures per group of people, such as RFW's four: at the thresholds of all pairs, how often each group is mistaken."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from facepipe.types import Bool, Float64

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class GroupFigures:
    """Figures of the pairs of which both images are of one group.

    Attributes:
        group: Name of the group.
        genuine: Number of pairs of one person.
        impostors: Number of pairs of two.
        tar: Share of genuine pairs that match, by the FAR of all pairs whose threshold is used; None without any.
        fmr: Share of impostor pairs that match, likewise.
        fmr_low: Lower end of its 95 % interval (Wilson).
        fmr_high: Upper end.
    """

    group: str
    genuine: int
    impostors: int
    tar: dict[str, float | None]
    fmr: dict[str, float | None]
    fmr_low: dict[str, float | None]
    fmr_high: dict[str, float | None]


def find_group(uri: str, level: int) -> str | None:
    """Find the group of an image: the name of a folder above it; None if it has not so many.

    Args:
        uri: the image.
        level: which folder, counted from the image: 1 is its own, 2 the one above.
    """
    parts = [part for part in uri.replace("#", "/").split("/") if part]
    return parts[-1 - level] if len(parts) > level else None


def compare_groups(
    left: list[str | None],
    right: list[str | None],
    distances: Float64,
    same: Bool,
    thresholds: dict[str, float | None],
) -> list[GroupFigures]:
    """Compare groups at thresholds that hold for all.

    Args:
        left: group of the first image of each pair, n of them; None for none.
        right: group of the second.
        distances: distance of each pair, (n,).
        same: whether it shows one person, (n,).
        thresholds: distances by name; None for those that are not known.

    Returns:
        The groups by name. Pairs of two groups are in none of them.
    """
    names = sorted({name for name in left if name is not None})
    figures = []
    for name in names:
        inside = np.array([a == name and b == name for a, b in zip(left, right, strict=True)])
        genuine = distances[inside & same]
        impostors = distances[inside & ~same]
        tar: dict[str, float | None] = {}
        fmr: dict[str, float | None] = {}
        low: dict[str, float | None] = {}
        high: dict[str, float | None] = {}
        for far, threshold in thresholds.items():
            tar[far] = None if threshold is None or not len(genuine) else float((genuine <= threshold).mean())
            rate = _measure_rate(impostors, threshold)
            fmr[far], low[far], high[far] = rate
        figures.append(GroupFigures(name, len(genuine), len(impostors), tar, fmr, low, high))
    return figures


def _measure_rate(impostors: Float64, threshold: float | None) -> tuple[float | None, float | None, float | None]:
    """Measure the share of impostors that match, and its interval."""
    if threshold is None or not len(impostors):
        return None, None, None
    from scipy.stats import binomtest

    matches = int((impostors <= threshold).sum())
    interval: Any = binomtest(matches, len(impostors)).proportion_ci(_CONFIDENCE, method="wilson")
    return matches / len(impostors), float(interval.low), float(interval.high)
