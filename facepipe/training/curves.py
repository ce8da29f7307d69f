"""Curves over steps, laid out for SVG: paths and labels in pixels, without colours, which the page's style has."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from facepipe.reports.chart import Tick
from facepipe.reports.histogram import log_ticks, number, ticks

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 540, 14, 208
_MOST = 1000  # points of a curve that are drawn

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class CurveChart:
    """Curves that share their axes, in pixels of a WIDTH x HEIGHT box.

    paths: one a curve; dots: places of single points; mark: x of a vertical line and its label
    """

    title: str
    names: tuple[str, ...]
    paths: tuple[str, ...]
    dots: tuple[tuple[int, float, float], ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    mark: tuple[float, str] | None
    summary: str


def build_curve_chart(
    title: str, lines: dict[str, Points], mark: tuple[float, str] | None = None, log: bool = False
) -> CurveChart:
    """Lay curves out by name; points that are not finite (and, on a logarithmic axis, not positive) are left out.

    mark: x of a vertical line, and what it says
    """
    kept = {name: _thin_points([p for p in points if _is_drawable(p[1], log)]) for name, points in lines.items()}
    kept = {name: points for name, points in kept.items() if points}
    xs = [x for points in kept.values() for x, _ in points] or [0.0, 1.0]
    ys = [y for points in kept.values() for _, y in points] or [1.0]
    right = max(xs)
    low, high = _widen_bounds(min(ys), max(ys), log)

    def across(x: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * x / (right or 1.0), 1)

    def up(y: float) -> float:
        share = math.log(y / low) / math.log(high / low) if log else (y - low) / (high - low)
        return round(BOTTOM - (BOTTOM - TOP) * share, 1)

    places = [[(across(x), up(y)) for x, y in points] for points in kept.values()]
    return CurveChart(
        title,
        tuple(kept),
        tuple("M" + "L".join(f"{x} {y}" for x, y in line) for line in places),
        tuple((n, x, y) for n, line in enumerate(places) if len(line) <= 30 for x, y in line),
        tuple(Tick(across(t), number(t)) for t in ticks(0.0, right, 6)),
        tuple(Tick(up(t), number(t)) for t in (log_ticks if log else ticks)(low, high, 6)),
        (across(mark[0]), mark[1]) if mark and mark[0] <= right else None,
        "; ".join(f"{name}: {number(p[0][1])} at first, {number(p[-1][1])} at last" for name, p in kept.items()),
    )


def _is_drawable(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _widen_bounds(low: float, high: float, log: bool) -> tuple[float, float]:
    if log:
        return (low / 1.1, high * 1.1)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 0.5
    return low - margin, high + margin


def _thin_points(points: Points) -> list[tuple[float, float]]:
    """Means of neighbours where there are more points than can be told apart."""
    size = -(-len(points) // _MOST)
    groups = [points[n : n + size] for n in range(0, len(points), max(1, size))]
    return [(g[-1][0], sum(y for _, y in g) / len(g)) for g in groups]
