"""The similarity from which two faces count as one person, found without labels.

Nearly all pairs of a gallery are of two persons, so the bulk of their similarities is the null distribution; its tail
is extrapolated by a cubic fitted to the logarithm of the density (an empirical null, Efron, JASA 2004), and the
threshold is where a given share of the pairs above it would be impostors. Where hardly anybody is there twice that
share is never reached; then it is where a face has few impostors.
"""

from dataclasses import dataclass

import numpy as np

from facepipe.types import Float32, Float64, Int64

IMPOSTORS = 0.2  # share of the pairs above the threshold; means over clusters then decide (docs/reports.md)
_LOW, _HIGH, _STEP = -0.5, 1.0, 0.0005
EDGES = np.arange(_LOW, _HIGH + _STEP, _STEP)
_IMPOSTORS_EACH = 0.25  # for each unit of the share: the threshold is never beyond where a face has so many
_HONEST = 2.0  # times the pairs that are there, the most that a fit to the bulk may expect
_COLUMNS = 65536
_UPPER, _LOWER = 0.5, 0.005  # of the bulk that is fitted: the share of pairs above its beginning, above its end
_PURE = 10  # the fitted bulk holds at least this many times the pairs of one person
_BINS = 20  # fewer bins say nothing
_DEGREE = 3


@dataclass(frozen=True)
class Threshold:
    """What was found. similarity: the threshold; genuine: share of all pairs that are of one person; impostors: share
    of those above the threshold that are not; estimated: False where it came from the model's card or from the user."""

    similarity: float
    genuine: float
    impostors: float
    estimated: bool = True


def histogram(vectors: Float32, densities: Float32, sample: Int64) -> Int64:
    """Counts (3000,) of the similarities between sampled faces (m,) and all others, in bins of EDGES."""
    counts = np.zeros(len(EDGES) - 1, np.int64)
    left, own = np.ascontiguousarray(vectors[sample]), densities[sample]
    for at in range(0, len(vectors), _COLUMNS):
        right, theirs = np.asarray(vectors[at : at + _COLUMNS]), densities[at : at + _COLUMNS]
        for row in range(0, len(left), 256):
            part = slice(row, row + 256)
            product = left[part] @ right.T - (own[part, None] + theirs) / 2
            binned = np.clip(((product - _LOW) / _STEP).astype(np.int32), 0, len(counts) - 1)
            inside = np.flatnonzero((sample[part] >= at) & (sample[part] < at + len(right)))
            itself = binned[inside, sample[part][inside] - at]
            counts += np.bincount(binned.ravel(), minlength=len(counts))
            counts -= np.bincount(itself, minlength=len(counts))
    return counts


def estimate(counts: Int64, faces: int, impostors: float = IMPOSTORS) -> Threshold | None:
    """The threshold for n faces from a histogram of similarities; None where it does not show where one person ends.

    The fit is repeated with a smaller share of the tail once it is known how many pairs of one person lie in it.
    """
    total = counts.sum()
    if total < 1000:
        return None
    above = counts[::-1].cumsum()[::-1]  # at or above the bin's beginning
    found, lower = None, _LOWER
    for _ in range(5):
        expected = _null_tail(counts, lower)
        if expected is None:
            return found
        share = expected / np.maximum(1, above)
        bulk = int(np.argmax(above <= lower * total))
        each = expected / total * faces
        few = (share <= impostors) | (each <= _IMPOSTORS_EACH * impostors) & (share <= _HONEST)
        passed = np.flatnonzero(few & (above > 0) & (np.arange(len(counts)) >= bulk))
        if not passed.size:
            return found
        at = int(passed[0])
        genuine = max(0.0, float((above[at] - expected[at]) / total))
        found = Threshold(float(EDGES[at]), genuine, min(1.0, float(share[at])))
        wanted = min(max(_PURE * genuine, 100 / total, 1e-5), _UPPER / 3)
        if abs(np.log(wanted / lower)) < 0.1:
            break
        lower = wanted
    return found


def _null_tail(counts: Int64, lower: float) -> Float64 | None:
    """Impostor pairs expected at or above the beginning of each bin, from a fit to the bulk's right flank."""
    total = counts.sum()
    above = counts[::-1].cumsum()[::-1]
    first, last = int(np.argmax(above <= _UPPER * total)), int(np.argmax(above <= lower * total))
    bins = np.arange(first, last)
    bins = bins[counts[bins] > 0]
    if len(bins) < _BINS:
        return None
    scale = (bins - first) / max(1, last - first)
    curve = np.polynomial.Polynomial.fit(scale, np.log(counts[bins]), _DEGREE, w=np.sqrt(counts[bins]))
    beyond = np.arange(first, len(counts))
    density = np.exp(np.minimum.accumulate(curve((beyond - first) / max(1, last - first))))
    tail = np.full(len(counts), float(total))
    tail[first:] = density[::-1].cumsum()[::-1]
    return tail
