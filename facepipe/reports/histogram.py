"""From numbers to bins: edges, counts, and round numbers for an axis."""

import math
import sys

import numpy as np
import numpy.typing as npt

from facepipe.reports.model import Series
from facepipe.types import Float64

Numbers = npt.NDArray[np.floating] | npt.NDArray[np.integer]


def series(name: str, values: Numbers, edges: Numbers) -> Series:
    """Counts of values (any shape) between rising edges (n + 1,).

    Values beyond the edges count in the outermost bins, so that none is lost; NaN count nowhere.
    """
    known = values[~np.isnan(values)]
    counts, _ = np.histogram(np.clip(known, edges[0], edges[-1]), edges)
    return Series(name, tuple(edges.tolist()), tuple(counts.tolist()))


def linear_edges(low: float, high: float, bins: int) -> Float64:
    """Edges (bins + 1,) of equal bins; a range of nothing is widened to one that can be drawn."""
    if high <= low:
        low, high = low - 0.5, low + 0.5
    return np.linspace(low, high, bins + 1)


def log_edges(least: float, most: float, per_decade: int = 5) -> Float64:
    """Edges that rise by equal factors, from `least` (above 0) to at least `most`."""
    if least <= 0:
        raise ValueError(f"a logarithmic axis cannot begin at {least}")
    bins = max(1, math.ceil(math.log10(max(most / least, 1)) * per_decade - 1e-9))
    return least * 10 ** (np.arange(bins + 1) / per_decade)


def ticks(low: float, high: float, most: int = 8) -> tuple[float, ...]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high], at most `most` of them."""
    rough = (high - low) / max(1, most - 1)
    if rough < sys.float_info.min:
        return (low,)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(k * step for k in range(first, last + 1))


def log_ticks(low: float, high: float, most: int = 8) -> tuple[float, ...]:
    """Powers of ten within [low, high] (above 0), thinned out to at most `most`; round numbers where there are few."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    if last - first < 1:
        return tuple(t for t in ticks(low, high, most) if t > 0)
    every = math.ceil((last - first + 1) / most)
    return tuple(10.0**k for k in range(first, last + 1, every))


def number(value: float) -> str:
    """A number as an axis shows it: `0.25`, `1,500`, `20k`, `3M`."""
    size = abs(value)
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            scale = 1e3 if suffix == "k" else unit
            return f"{value / scale:.4g}{suffix}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"
