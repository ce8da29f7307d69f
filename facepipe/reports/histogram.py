"""From numbers to bins: edges, counts, and round numbers for an axis."""

import math
import sys

import numpy as np
import numpy.typing as npt

from facepipe.reports.model import Series
from facepipe.reports.top import SLICE
from facepipe.types import Float64

Numbers = npt.NDArray[np.floating] | npt.NDArray[np.integer]


def count_values(name: str, values: Numbers, edges: Numbers) -> Series:
    """Count values between edges.

    Values beyond the edges count in the outermost bins, so that none is lost. NaN is not counted.

    Args:
        name: name of the series.
        values: numbers, of any shape.
        edges: rising edges, (n + 1,).
    """
    flat = values.reshape(-1)
    counts = np.zeros(len(edges) - 1, np.int64)
    # Slice by slice, because values are copied. Clipping moves those beyond the edges into the outermost bins.
    for begin in range(0, len(flat), SLICE):
        part = flat[begin : begin + SLICE]
        counts += np.histogram(np.clip(part[~np.isnan(part)], edges[0], edges[-1]), edges)[0]
    return Series(name, tuple(edges.tolist()), tuple(counts.tolist()))


def linear_edges(low: float, high: float, bins: int) -> Float64:
    """Compute the edges (bins + 1,) of equal bins; an empty range is widened to one that can be drawn."""
    if high <= low:
        low, high = low - 0.5, low + 0.5
    return np.linspace(low, high, bins + 1)


def log_edges(low: float, high: float, per_decade: int = 5) -> Float64:
    """Compute edges that rise by equal factors, from `low` (above 0) to at least `high`."""
    if low <= 0:
        raise ValueError(f"a logarithmic axis cannot begin at {low}")
    # The small number keeps rounding from adding a bin to an exact power.
    bins = max(1, math.ceil(math.log10(max(high / low, 1)) * per_decade - 1e-9))
    return low * 10 ** (np.arange(bins + 1) / per_decade)


def choose_ticks(low: float, high: float, max_ticks: int = 8) -> tuple[float, ...]:
    """Choose round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    rough_step = (high - low) / max(1, max_ticks - 1)
    # An empty or tiny range has one tick: a step would vanish in rounding.
    if rough_step < sys.float_info.min:
        return (low,)
    # The first round step that gives no more ticks than allowed.
    power = 10.0 ** math.floor(math.log10(rough_step))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough_step * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return tuple(k * step for k in range(first, last + 1))


def choose_log_ticks(low: float, high: float, max_ticks: int = 8) -> tuple[float, ...]:
    """Choose powers of ten within [low, high] (above 0), or round numbers if there are fewer than two powers."""
    first = math.ceil(math.log10(low) - 1e-9)
    last = math.floor(math.log10(high) + 1e-9)
    # Within one decade, powers of ten are too few to read the axis by.
    if last - first < 1:
        return tuple(tick for tick in choose_ticks(low, high, max_ticks) if tick > 0)
    step = math.ceil((last - first + 1) / max_ticks)
    return tuple(10.0**k for k in range(first, last + 1, step))


def format_number(value: float) -> str:
    """Format a number as an axis shows it: `0.25`, `1,500`, `20k`, `3M`."""
    size = abs(value)
    # From ten thousand on, a suffix replaces the zeros.
    for limit, divisor, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= limit:
            return f"{value / divisor:.4g}{suffix}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"
