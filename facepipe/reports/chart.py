"""Histograms laid out for SVG: paths and labels in pixels, without colours, which the page's style has."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from facepipe.reports.histogram import log_ticks, number, ticks
from facepipe.reports.model import Histogram, Mark, Series

WIDTH, HEIGHT = 560, 250
_LEFT, _RIGHT, _BOTTOM, _TOP = 48, 20, 42, 12
_LANE = 15
_CHARACTER = 6.2  # width of one at the labels' size, a little more than the mean
_LONGEST = 40
_GAP = 6
_NOTHING = 1e-12  # densities below count as none


@dataclass(frozen=True)
class Tick:
    """A label at a position along its axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """A mark's line at x, from y downward, and its label, which ends at the line where `left`."""

    x: float
    y: float
    text: str
    left: bool


@dataclass(frozen=True)
class Bin:
    """A column of the plot and the words that show over it."""

    x: float
    width: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A histogram in pixels of a WIDTH x HEIGHT box; `top` and `bottom` bound the plot."""

    histogram: Histogram
    summary: str
    areas: tuple[str, ...]
    outlines: tuple[str, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    bins: tuple[Bin, ...]
    left: float
    right: float
    top: float
    bottom: float


Scale = Callable[[float], float]


def chart(histogram: Histogram) -> Chart:
    """Lay a histogram out. Marks widen the axis to where they are; those that are no finite number are left out."""
    marks = [m for m in histogram.marks if math.isfinite(m.x) and (m.x > 0 or not histogram.log_x)]
    places = [e for s in histogram.series for e in s.edges] + [m.x for m in marks] or [1.0, 10.0]
    low, high = min(places), max(places)
    x = _scale(low, high, _LEFT, WIDTH - _RIGHT, histogram.log_x)
    lanes = _lanes([x(m.x) for m in marks], [_short(m.label) for m in marks])
    top, bottom = _TOP + _LANE * max((lane + 1 for lane in lanes), default=0), HEIGHT - _BOTTOM
    floor, ceiling = _bounds(histogram)
    y = _scale(floor, ceiling, bottom, top, histogram.log)
    steps = [_steps(s, x, lambda count: y(max(count, floor))) for s in histogram.series]
    x_ticks = (log_ticks if histogram.log_x else ticks)(low, high)
    y_ticks = (log_ticks if histogram.log else ticks)(floor, ceiling, 5)
    return Chart(
        histogram,
        _summary(histogram),
        tuple(f"M{x(s.edges[0]):.1f},{bottom}{p}V{bottom}Z" for s, p in zip(histogram.series, steps, strict=True)),
        tuple(f"M{x(s.edges[0]):.1f},{bottom}{p}V{bottom}" for s, p in zip(histogram.series, steps, strict=True)),
        tuple(Tick(round(x(t), 1), number(t)) for t in x_ticks),
        tuple(Tick(round(y(t), 1), number(t)) for t in y_ticks),
        tuple(_line(m, x(m.x), lane) for m, lane in zip(marks, lanes, strict=True)),
        _bins(histogram.series, x),
        _LEFT,
        WIDTH - _RIGHT,
        top,
        bottom,
    )


def _scale(low: float, high: float, first: float, last: float, log: bool) -> Scale:
    change: Scale = math.log10 if log else float
    if not high > low:
        return lambda value: (first + last) / 2
    start, span = change(low), change(high) - change(low)
    return lambda value: first + (change(value) - start) / span * (last - first)


def _bounds(histogram: Histogram) -> tuple[float, float]:
    """The counts at the bottom and the top of the plot; below a logarithmic axis there is room for the least count."""
    counts = [c for s in histogram.series for c in s.counts if c > _NOTHING] or [1.0]
    if not histogram.log:
        return 0.0, max(counts) * 1.04
    floor = 10.0 ** math.floor(math.log10(min(counts))) / 2
    return floor, max(max(counts) * 1.3, floor * 20)


def _steps(series: Series, x: Scale, y: Scale) -> str:
    return "".join(f"V{y(c):.1f}H{x(e):.1f}" for c, e in zip(series.counts, series.edges[1:], strict=True))


def _lanes(places: Sequence[float], labels: Sequence[str]) -> list[int]:
    """The row of each label above the plot, such that no two overlap."""
    rows: list[list[tuple[float, float]]] = []
    lanes = []
    for place, label in zip(places, labels, strict=True):
        width = len(label) * _CHARACTER + _GAP
        span = (place - width, place) if _leans_left(place, label) else (place, place + width)
        lane = next((n for n, row in enumerate(rows) if all(span[1] < a or b < span[0] for a, b in row)), len(rows))
        if lane == len(rows):
            rows.append([])
        rows[lane].append(span)
        lanes.append(lane)
    return lanes


def _leans_left(place: float, label: str) -> bool:
    return place + len(label) * _CHARACTER + _GAP > WIDTH and place > WIDTH / 2


def _line(mark: Mark, place: float, lane: int) -> Line:
    label = _short(mark.label)
    return Line(round(place, 1), _TOP + _LANE * lane, label, _leans_left(place, label))


def _short(label: str) -> str:
    return label if len(label) <= _LONGEST else label[: _LONGEST - 1] + "…"


def _bins(series: Sequence[Series], x: Scale) -> tuple[Bin, ...]:
    """Columns with every series' count, where the series share their edges."""
    if not series or any(s.edges != series[0].edges for s in series):
        return ()
    found = []
    for n, (a, b) in enumerate(pairwise(series[0].edges)):
        counts = ", ".join(f"{_short(s.name)} {number(s.counts[n])}" for s in series)
        found.append(Bin(round(x(a), 1), round(x(b) - x(a), 1), f"{number(a)} to {number(b)}: {counts}"))
    return tuple(found)


def _summary(histogram: Histogram) -> str:
    """The chart in one sentence, for those who hear the page."""
    names = ", ".join(f"{_short(s.name)} ({number(sum(s.counts))})" for s in histogram.series) or "no data"
    marks = "".join(f"; {_short(m.label)} at {number(m.x)}" for m in histogram.marks if math.isfinite(m.x))
    return f"Histogram over {histogram.x_label}: {names}{marks}"
