"""Charts of curves over steps, in pixels for SVG. Colours come from the style of the page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from facepipe.reports.chart import Tick
from facepipe.reports.histogram import choose_log_ticks, choose_ticks, format_number
from facepipe.reports.model import Mark

# Size of a chart and edges of its plot, in pixels.
WIDTH = 560
HEIGHT = 250
LEFT = 56
RIGHT = 540
TOP = 14
BOTTOM = 208
_MAX_POINTS = 1000  # drawn per curve
_MAX_DOTS = 30  # a curve of no more points shows each as a dot

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Dot:
    """A point of a curve that is shown by itself.

    Attributes:
        curve: number of the curve.
        x: position in pixels.
        y: position in pixels.
    """

    curve: int
    x: float
    y: float


@dataclass(frozen=True)
class CurveChart:
    """Curves that share their axes, in pixels of a WIDTH x HEIGHT box.

    Attributes:
        title: title of the chart.
        names: name of each curve.
        paths: SVG path of each curve.
        dots: points of curves that have few.
        x_ticks: labels of the horizontal axis.
        y_ticks: labels of the vertical axis.
        mark: vertical line with a label, if any.
        summary: description for screen readers.
    """

    title: str
    names: tuple[str, ...]
    paths: tuple[str, ...]
    dots: tuple[Dot, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    mark: Mark | None
    summary: str


def build_curve_chart(
    title: str, curves: Mapping[str, Points], mark: Mark | None = None, *, log_scale: bool = False
) -> CurveChart:
    """Lay out curves in pixels.

    Points that are not finite are left out, and on a logarithmic axis also those that are not positive.

    Args:
        title: title of the chart.
        curves: points (x, y) of each curve, by name.
        mark: vertical line with a label, in the units of x.
        log_scale: use a logarithmic vertical axis.
    """
    # Leave out what cannot be drawn, and thin long curves.
    drawable = {name: [p for p in points if _is_drawable(p[1], log_scale)] for name, points in curves.items()}
    thinned = {name: _thin_points(points) for name, points in drawable.items() if points}
    # Find the ranges of the axes.
    xs = [x for points in thinned.values() for x, _ in points] or [0.0, 1.0]
    ys = [y for points in thinned.values() for _, y in points] or [1.0]
    right = max(xs)
    low, high = _widen_bounds(min(ys), max(ys), log_scale)

    # The horizontal axis begins at 0, the vertical one at the low bound.
    def to_x(value: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * value / (right or 1.0), 1)

    def to_y(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if log_scale else (value - low) / (high - low)
        return round(BOTTOM - (BOTTOM - TOP) * share, 1)

    # Convert curves, ticks and the mark to pixels.
    pixels = [[(to_x(x), to_y(y)) for x, y in points] for points in thinned.values()]
    y_tick_values = (choose_log_ticks if log_scale else choose_ticks)(low, high, 6)
    summaries = [
        f"{name}: {format_number(points[0][1])} at first, {format_number(points[-1][1])} at last"
        for name, points in thinned.items()
    ]
    return CurveChart(
        title=title,
        names=tuple(thinned),
        paths=tuple("M" + "L".join(f"{x} {y}" for x, y in line) for line in pixels),
        dots=tuple(Dot(n, x, y) for n, line in enumerate(pixels) if len(line) <= _MAX_DOTS for x, y in line),
        x_ticks=tuple(Tick(to_x(t), format_number(t)) for t in choose_ticks(0.0, right, 6)),
        y_ticks=tuple(Tick(to_y(t), format_number(t)) for t in y_tick_values),
        mark=Mark(to_x(mark.x), mark.label) if mark and mark.x <= right else None,
        summary="; ".join(summaries),
    )


def _is_drawable(value: float, log_scale: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log_scale)


def _widen_bounds(low: float, high: float, log_scale: bool) -> tuple[float, float]:
    if log_scale:
        return low / 1.1, high * 1.1
    # A flat curve needs a margin too, so that it does not lie on the axis.
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 0.5
    return low - margin, high + margin


def _thin_points(points: Points) -> list[tuple[float, float]]:
    """Replace neighbouring points by their mean if there are more than a reader can distinguish."""
    # Size of a group, so that no more than the maximum number of groups are left.
    size = -(-len(points) // _MAX_POINTS)
    groups = [points[n : n + size] for n in range(0, len(points), max(1, size))]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
