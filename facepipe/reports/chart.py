"""Histograms laid out for SVG: paths and labels in pixels. Colours are in the page's style."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from facepipe.reports.histogram import choose_log_ticks, choose_ticks, format_number
from facepipe.reports.model import Histogram, Mark, Series

# Size of a chart, in pixels.
WIDTH = 560
HEIGHT = 250
# Margins around the plot, in pixels.
_LEFT = 48
_RIGHT = 20
_BOTTOM = 42
_TOP = 12
_LANE_HEIGHT = 15
_CHARACTER_WIDTH = 6.2  # at the labels' size, a little more than the mean
# Longest label, in characters.
_MAX_LABEL = 40
# Room between two labels of a lane, in pixels.
_LABEL_GAP = 6
_MIN_DENSITY = 1e-12  # densities below count as none

Scale = Callable[[float], float]  # from a value to pixels


@dataclass(frozen=True)
class Tick:
    """A label at a position along its axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """The line of a mark at x, from y downward, and its label, which ends at the line if `left`."""

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
    """A histogram in pixels of a WIDTH x HEIGHT box; left, right, top and bottom bound the plot."""

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


def draw_chart(histogram: Histogram) -> Chart:
    """Lay a histogram out.

    Marks widen the axis to where they are. Marks without a finite position are left out.
    """
    marks = [mark for mark in histogram.marks if math.isfinite(mark.x) and (mark.x > 0 or not histogram.log_x)]

    # The horizontal axis, and above the plot one lane for each row of labels.
    positions = [edge for series in histogram.series for edge in series.edges] + [mark.x for mark in marks]
    low = min(positions, default=1.0)
    high = max(positions, default=10.0)
    to_x = _create_scale(low, high, _LEFT, WIDTH - _RIGHT, log=histogram.log_x)
    lanes = _choose_lanes([to_x(mark.x) for mark in marks], [_shorten(mark.label) for mark in marks])
    top = _TOP + _LANE_HEIGHT * max((lane + 1 for lane in lanes), default=0)
    bottom = HEIGHT - _BOTTOM

    # The vertical axis.
    floor, ceiling = _find_bounds(histogram)
    to_y = _create_scale(floor, ceiling, bottom, top, log=histogram.log)
    # One outline per series: up from the axis, in steps over the bins, and down again; closed it is the area.
    areas = []
    outlines = []
    for series in histogram.series:
        # A logarithmic axis has no place for 0, so counts stop at its bottom.
        steps = _draw_steps(series, to_x, lambda count: to_y(max(count, floor)))
        outline = f"M{to_x(series.edges[0]):.1f},{bottom}{steps}V{bottom}"
        outlines.append(outline)
        areas.append(outline + "Z")
    x_ticks = (choose_log_ticks if histogram.log_x else choose_ticks)(low, high)
    y_ticks = (choose_log_ticks if histogram.log else choose_ticks)(floor, ceiling, 5)

    return Chart(
        histogram=histogram,
        summary=_summarise(histogram),
        areas=tuple(areas),
        outlines=tuple(outlines),
        x_ticks=tuple(Tick(round(to_x(tick), 1), format_number(tick)) for tick in x_ticks),
        y_ticks=tuple(Tick(round(to_y(tick), 1), format_number(tick)) for tick in y_ticks),
        lines=tuple(_draw_line(mark, to_x(mark.x), lane) for mark, lane in zip(marks, lanes, strict=True)),
        bins=_describe_bins(histogram.series, to_x),
        left=_LEFT,
        right=WIDTH - _RIGHT,
        top=top,
        bottom=bottom,
    )


def _create_scale(low: float, high: float, first: float, last: float, *, log: bool) -> Scale:
    """Create a scale that maps low to `first` and high to `last`."""
    transform: Scale = math.log10 if log else float
    # An empty range has one place, in the middle.
    if not high > low:
        return lambda value: (first + last) / 2
    start = transform(low)
    span = transform(high) - start
    return lambda value: first + (transform(value) - start) / span * (last - first)


def _find_bounds(histogram: Histogram) -> tuple[float, float]:
    """Find the counts at the bottom and the top of the plot; a logarithmic axis has room below the least count."""
    counts = [count for series in histogram.series for count in series.counts if count > _MIN_DENSITY] or [1.0]
    if not histogram.log:
        # A little room above the highest column.
        return 0.0, max(counts) * 1.04
    # Half a decade below the least count, so that its column can be seen.
    floor = 10.0 ** math.floor(math.log10(min(counts))) / 2
    return floor, max(max(counts) * 1.3, floor * 20)


def _draw_steps(series: Series, to_x: Scale, to_y: Scale) -> str:
    steps = zip(series.counts, series.edges[1:], strict=True)
    return "".join(f"V{to_y(count):.1f}H{to_x(edge):.1f}" for count, edge in steps)


def _choose_lanes(positions: Sequence[float], labels: Sequence[str]) -> list[int]:
    """Choose the row of each label above the plot, so that no two overlap."""
    # Each lane keeps the spans (begin, end) that its labels take.
    occupied: list[list[tuple[float, float]]] = []
    lanes = []
    for position, label in zip(positions, labels, strict=True):
        width = len(label) * _CHARACTER_WIDTH + _LABEL_GAP
        begin = position - width if _leans_left(position, label) else position
        end = begin + width
        # Take the first lane in which the label fits, or open a new one.
        free = (n for n, spans in enumerate(occupied) if all(end < low or high < begin for low, high in spans))
        lane = next(free, len(occupied))
        if lane == len(occupied):
            occupied.append([])
        occupied[lane].append((begin, end))
        lanes.append(lane)
    return lanes


def _leans_left(position: float, label: str) -> bool:
    """Tell whether a label must end at its line, because it would not fit to the right of it."""
    return position + len(label) * _CHARACTER_WIDTH + _LABEL_GAP > WIDTH and position > WIDTH / 2


def _draw_line(mark: Mark, position: float, lane: int) -> Line:
    label = _shorten(mark.label)
    y = _TOP + _LANE_HEIGHT * lane
    return Line(x=round(position, 1), y=y, text=label, left=_leans_left(position, label))


def _shorten(label: str) -> str:
    return label if len(label) <= _MAX_LABEL else label[: _MAX_LABEL - 1] + "…"


def _describe_bins(all_series: Sequence[Series], to_x: Scale) -> tuple[Bin, ...]:
    """Describe columns with the counts of all series, if the series share their edges."""
    # Columns of different edges cannot share their words.
    if not all_series or any(series.edges != all_series[0].edges for series in all_series):
        return ()
    bins = []
    for n, (low, high) in enumerate(pairwise(all_series[0].edges)):
        counts = ", ".join(f"{_shorten(series.name)} {format_number(series.counts[n])}" for series in all_series)
        text = f"{format_number(low)} to {format_number(high)}: {counts}"
        bins.append(Bin(x=round(to_x(low), 1), width=round(to_x(high) - to_x(low), 1), text=text))
    return tuple(bins)


def _summarise(histogram: Histogram) -> str:
    """Describe the chart in one sentence, for screen readers."""
    names = [f"{_shorten(series.name)} ({format_number(sum(series.counts))})" for series in histogram.series]
    marks = [
        f"; {_shorten(mark.label)} at {format_number(mark.x)}" for mark in histogram.marks if math.isfinite(mark.x)
    ]
    return f"Histogram over {histogram.x_label}: {', '.join(names) or 'no data'}{''.join(marks)}"
