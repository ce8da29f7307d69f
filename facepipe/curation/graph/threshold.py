"""The similarity from which two faces count as one person, estimated without labels.

Nearly all pairs of a gallery are of two persons, so the bulk of their similarities is the null distribution. Its tail
is extrapolated by a cubic fitted to the logarithm of the density (an empirical null, Efron, JASA 2004). The threshold
is where a given share of the pairs above it would be impostors. If few identities repeat, that share is never reached.
Then the threshold is where a face has few impostors.
"""

from dataclasses import dataclass

import numpy as np

from facepipe.types import Float32, Float64, Int64

DEFAULT_IMPOSTORS = 0.2  # share of the pairs above the threshold; means over clusters then decide (docs/reports.md)
# Range and width of the bins of similarities.
_LOWEST = -0.5
_HIGHEST = 1.0
_STEP = 0.0005
BIN_EDGES = np.arange(_LOWEST, _HIGHEST + _STEP, _STEP)
_MIN_PAIRS = 1000
_IMPOSTORS_PER_FACE = 0.25  # per unit of the share: the threshold is never beyond where a face has so many
_MAX_EXPECTED = 2.0  # times the pairs that exist, the most that a fit to the bulk may expect
_BLOCK_COLUMNS = 65536
_BLOCK_ROWS = 256
# The bulk that is fitted: the share of pairs above its beginning, and above its end.
_BEGIN_SHARE = 0.5
_END_SHARE = 0.005
_BULK_PURITY = 10  # the fitted bulk holds at least this many times the pairs of one person
_MIN_BINS = 20  # fewer bins carry no information
_DEGREE = 3
_MAX_FITS = 5


@dataclass(frozen=True)
class Threshold:
    """A threshold, and what it separates. Stored as JSON with the graph.

    Attributes:
        similarity: The threshold.
        genuine: Share of all pairs that are of one person.
        impostors: Share of the pairs above the threshold that are not.
        estimated: Whether it was estimated from the data; otherwise it is the model's or the user's.
    """

    similarity: float
    genuine: float
    impostors: float
    estimated: bool = True

    @classmethod
    def from_distance(cls, distance: float, density: float) -> "Threshold":
        """Convert a distance between faces of the mean density."""
        return cls(1 - distance**2 / 2 - density, float("nan"), float("nan"), estimated=False)


def count_similarities(vectors: Float32, densities: Float32, sample: Int64) -> Int64:
    """Count the similarities between sampled faces and all others.

    Args:
        vectors: unit vectors (n, 128).
        densities: densities (n,).
        sample: positions (m,), sorted.

    Returns:
        Counts (3000,) in the bins of `BIN_EDGES`.
    """
    counts = np.zeros(len(BIN_EDGES) - 1, np.int64)
    left = np.ascontiguousarray(vectors[sample])
    left_density = densities[sample]
    for at in range(0, len(vectors), _BLOCK_COLUMNS):
        right = np.asarray(vectors[at : at + _BLOCK_COLUMNS])
        right_density = densities[at : at + _BLOCK_COLUMNS]
        for row in range(0, len(left), _BLOCK_ROWS):
            part = slice(row, row + _BLOCK_ROWS)
            similarities = left[part] @ right.T - (left_density[part, None] + right_density) / 2
            bins = np.clip(((similarities - _LOWEST) / _STEP).astype(np.int32), 0, len(counts) - 1)
            # A face is not compared with itself.
            inside = np.flatnonzero((sample[part] >= at) & (sample[part] < at + len(right)))
            own_bins = bins[inside, sample[part][inside] - at]
            counts += np.bincount(bins.ravel(), minlength=len(counts))
            counts -= np.bincount(own_bins, minlength=len(counts))
    return counts


def estimate_threshold(counts: Int64, faces: int, impostors: float = DEFAULT_IMPOSTORS) -> Threshold | None:
    """Estimate the threshold from counts of similarities.

    The fit is repeated with a smaller share of the tail once the number of pairs of one person in it is known.

    Args:
        counts: of `count_similarities`.
        faces: number of faces.
        impostors: share of the pairs above the threshold that may be of two persons.

    Returns:
        None if the counts do not separate one person from another.
    """
    total = counts.sum()
    if total < _MIN_PAIRS:
        return None
    above = _accumulate(counts)
    threshold = None
    end_share = _END_SHARE
    for _ in range(_MAX_FITS):
        expected = _fit_null_tail(counts, end_share)
        if expected is None:
            return threshold
        # The first bin behind the bulk with few enough impostors, per pair or per face.
        share = expected / np.maximum(1, above)
        per_face = expected / total * faces
        has_few = (share <= impostors) | (per_face <= _IMPOSTORS_PER_FACE * impostors) & (share <= _MAX_EXPECTED)
        bulk_end = int(np.argmax(above <= end_share * total))
        bins = np.flatnonzero(has_few & (above > 0) & (np.arange(len(counts)) >= bulk_end))
        if not bins.size:
            return threshold
        at = int(bins[0])
        genuine = max(0.0, float((above[at] - expected[at]) / total))
        threshold = Threshold(float(BIN_EDGES[at]), genuine, min(1.0, float(share[at])))
        # Fit again, with an end at which few pairs of one person are in the bulk.
        wanted = min(max(_BULK_PURITY * genuine, 100 / total, 1e-5), _BEGIN_SHARE / 3)
        if abs(np.log(wanted / end_share)) < 0.1:
            break
        end_share = wanted
    return threshold


def _accumulate(counts: Int64) -> Int64:
    """Count the pairs at or above the beginning of each bin."""
    return np.asarray(counts[::-1].cumsum()[::-1], np.int64)


def _fit_null_tail(counts: Int64, end_share: float) -> Float64 | None:
    """Fit the bulk's right flank, and return the impostor pairs expected at or above the beginning of each bin."""
    total = counts.sum()
    above = _accumulate(counts)
    # The flank begins at the median and ends at the given share; empty bins have no logarithm.
    first = int(np.argmax(above <= _BEGIN_SHARE * total))
    last = int(np.argmax(above <= end_share * total))
    bins = np.arange(first, last)
    bins = bins[counts[bins] > 0]
    if len(bins) < _MIN_BINS:
        return None
    # Fit a cubic to the logarithms, weighted by how precise each count is.
    scale = (bins - first) / max(1, last - first)
    curve = np.polynomial.Polynomial.fit(scale, np.log(counts[bins]), _DEGREE, w=np.sqrt(counts[bins]))
    beyond = np.arange(first, len(counts))
    # The density may only fall: a cubic rises again somewhere.
    density = np.exp(np.minimum.accumulate(curve((beyond - first) / max(1, last - first))))
    tail = np.full(len(counts), float(total))
    tail[first:] = density[::-1].cumsum()[::-1]
    return tail
