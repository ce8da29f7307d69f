"""The similarity from which two faces count as one person, estimated without labels.

Pairs of strangers give the null distribution. They are taken between the persons of a thinned cohort, in which a person
counts a few times at most, so that a person with many faces does not loosen or tighten the threshold for all others.
The null's tail is extrapolated by a cubic fitted to the logarithm of the density (an empirical null, Efron, JASA 2004).
The threshold is where a given share of the neighbours of a face would be strangers, on average over faces: the average
over pairs would be that of the largest person. If few identities repeat, that share is never reached. Then the
threshold is where a face has few strangers.
"""

from dataclasses import dataclass, replace

import numpy as np

from facepipe.types import Float32, Float64, Int32, Int64

DEFAULT_IMPOSTORS = 0.25  # share of a face's neighbours; means over clusters then decide (docs/reports.md)
# Range and width of the bins of similarities.
_LOWEST = -0.5
_HIGHEST = 1.0
_STEP = 0.0005
BIN_EDGES = np.arange(_LOWEST, _HIGHEST + _STEP, _STEP)
_BINS = len(BIN_EDGES) - 1
_MIN_PAIRS = 1000
_STRANGERS_PER_FACE = 0.25  # per unit of the share: the threshold is never beyond where a face has so many
_MAX_EXPECTED = 2.0  # times the strangers that there can be, the most that a fit may expect
_BLOCK_COLUMNS = 8192  # a block of products and what follows from it stay in the cache
_BLOCK_ROWS = 256
# The bulk that is fitted: the share of pairs above its beginning, and above its end.
_BEGIN_SHARE = 0.5
_END_SHARE = 0.001
_MIN_BINS = 20  # fewer bins carry no information
_DEGREE = 3
_MAX_RESIDUAL = 0.25  # of the logarithm of the counts: a bulk of few persons has bumps that no cubic follows
_MARGIN_SHARE = 0.1  # of the way from the threshold to the typical pair of one person
_MAX_MARGIN_SHARE = 0.5  # the same, over a gap between groups
_MAX_FLOOR_PAIRS = 1.0  # strangers that a fit may expect beyond where it stops falling
_RESIDUAL_PARTS = 12  # of the bulk, in each of which the residuals are averaged


@dataclass(frozen=True)
class Threshold:
    """A threshold, and what it separates. Stored as JSON with the graph.

    Attributes:
        similarity: The threshold.
        genuine: Share of all pairs that are of one person.
        impostors: Share of a face's neighbours above the threshold that are strangers, on average over faces.
        estimated: Whether it was estimated from the data; otherwise it is the model's or the user's.
        margin: How much more than that the mean similarity of two groups of very many faces must be.
    """

    similarity: float
    genuine: float
    impostors: float
    estimated: bool = True
    margin: float = 0.0

    @classmethod
    def from_distance(cls, distance: float, density: float) -> "Threshold":
        """Convert a distance between faces of the mean density."""
        return cls(1 - distance**2 / 2 - density, float("nan"), float("nan"), estimated=False)


@dataclass(frozen=True)
class ImpostorCurve:
    """What share of a face's neighbours are strangers, by the similarity from which a face is a neighbour.

    Attributes:
        share: Mean share over faces that have a neighbour (3000,), if the threshold is at the beginning of each bin.
        strangers: Expected strangers per face (3000,).
        genuine: Share of all pairs that are of one person and above (3000,).
        has_neighbour: Share of the faces that have a neighbour (3000,).
    """

    share: Float64
    strangers: Float64
    genuine: Float64
    has_neighbour: Float64

    def find_threshold(self, impostors: float) -> Threshold | None:
        """Find the lowest threshold at which few enough neighbours are strangers; None if there is none."""
        has_few = self.share <= impostors
        has_few |= (self.strangers <= _STRANGERS_PER_FACE * impostors) & (self.share <= _MAX_EXPECTED)
        # The share need not fall everywhere: take the bin behind the last one with too many.
        too_many = np.flatnonzero(~has_few)
        at = int(too_many[-1]) + 1 if too_many.size else 0
        if at == 0 or at >= len(self.share):
            return None
        return self._describe(at)

    def raise_threshold(self, threshold: Threshold, similarity: float) -> Threshold:
        """Return the threshold, or that at a similarity if it is higher."""
        at = min(int(np.searchsorted(BIN_EDGES, similarity)), len(self.share) - 1)
        if BIN_EDGES[at] <= threshold.similarity:
            return threshold
        # Above the groups of look-alikes no group needs a margin.
        return replace(self._describe(at), margin=0.0)

    def widen_margin(self, threshold: Threshold, similarity: float) -> Threshold:
        """Return the threshold with a margin that keeps large groups apart up to a similarity, within limits."""
        at = min(int(np.searchsorted(BIN_EDGES, threshold.similarity)), _BINS - 1)
        widest = _MAX_MARGIN_SHARE * self._measure_reach(at)
        return replace(threshold, margin=max(threshold.margin, min(similarity - threshold.similarity, widest)))

    def get_connected(self, threshold: Threshold) -> float:
        """Get the share of the faces that have a neighbour at a threshold."""
        return float(self.has_neighbour[min(int(np.searchsorted(BIN_EDGES, threshold.similarity)), _BINS - 1)])

    def _describe(self, at: int) -> Threshold:
        margin = _MARGIN_SHARE * self._measure_reach(at)
        return Threshold(float(BIN_EDGES[at]), float(self.genuine[at]), min(1.0, float(self.share[at])), margin=margin)

    def _measure_reach(self, at: int) -> float:
        """Measure how far the typical pair of one person is above a threshold: half of those above it are farther."""
        genuine = float(self.genuine[at])
        if not genuine:
            return 0.0
        typical = int(np.flatnonzero(self.genuine >= genuine / 2)[-1])
        return max(0.0, float(BIN_EDGES[typical] - BIN_EDGES[at]))


def count_similarities(vectors: Float32, densities: Float32, sample: Int64) -> Int32:
    """Count the similarities between sampled faces and all others.

    Args:
        vectors: unit vectors (n, dim).
        densities: densities (n,).
        sample: positions (m,), sorted.

    Returns:
        Counts (m, 3000) in the bins of `BIN_EDGES`, per sampled face.
    """
    counts = np.zeros((len(sample), _BINS), np.int32)
    left = np.ascontiguousarray(vectors[sample])
    left_density = densities[sample]
    for at in range(0, len(vectors), _BLOCK_COLUMNS):
        right = np.asarray(vectors[at : at + _BLOCK_COLUMNS])
        right_density = densities[at : at + _BLOCK_COLUMNS]
        for row in range(0, len(left), _BLOCK_ROWS):
            part = slice(row, row + _BLOCK_ROWS)
            product = left[part] @ right.T - (left_density[part, None] + right_density) / 2
            bins = _find_bins(np.asarray(product, np.float32))
            # A face is not compared with itself.
            inside = np.flatnonzero((sample[part] >= at) & (sample[part] < at + len(right)))
            own_bins = bins[inside, sample[part][inside] - at]
            first = _BINS * np.arange(len(bins), dtype=np.int32)[:, None]
            block = np.bincount((bins + first).ravel(), minlength=_BINS * len(bins)).reshape(len(bins), _BINS)
            block[inside, own_bins] -= 1
            counts[part] += block.astype(np.int32)
    return counts


def count_stranger_pairs(vectors: Float32, densities: Float32, person: Int64) -> Int64:
    """Count the similarities of all pairs of faces of two persons.

    Args:
        vectors: unit vectors (m, dim).
        densities: densities (m,).
        person: number of each face's person, (m,).

    Returns:
        Counts (3000,) in the bins of `BIN_EDGES`. Each pair counts twice.
    """
    counts = np.zeros(_BINS, np.int64)
    for row in range(0, len(vectors), _BLOCK_ROWS):
        part = slice(row, row + _BLOCK_ROWS)
        product = vectors[part] @ vectors.T - (densities[part, None] + densities) / 2
        similarities = np.asarray(product, np.float32)
        bins = _find_bins(similarities[person[part, None] != person])
        counts += np.bincount(bins, minlength=_BINS)
    return counts


def estimate_curve(neighbours: Int32, stranger_pairs: Int64, faces: int) -> ImpostorCurve | None:
    """Estimate which share of the neighbours of a face are strangers, for every threshold.

    The expected number of strangers per face, e, is the null's tail times the number of faces. A face with k neighbours
    has X strangers among them. If X is a Poisson number that does not depend on the others, the mean of X / k is
    e * mean(1 / (k + 1)), where the second mean is over all faces, also those without a neighbour.

    Args:
        neighbours: of `count_similarities`, for sampled faces.
        stranger_pairs: of `count_stranger_pairs`.
        faces: number of faces.

    Returns:
        None if the pairs do not show the null distribution: too few, or not smooth, as with few persons.
    """
    total = int(stranger_pairs.sum())
    if total < _MIN_PAIRS or not len(neighbours):
        return None
    tail = _fit_null_tail(stranger_pairs, _END_SHARE)
    if tail is None:
        return None
    strangers = tail / total * max(1, faces - 1)
    # Neighbours of each sampled face at or above the beginning of each bin, summed up row by row.
    inverse = np.zeros(_BINS)
    has_any = np.zeros(_BINS)
    mean = np.zeros(_BINS)
    for row in range(0, len(neighbours), _BLOCK_ROWS):
        above = neighbours[row : row + _BLOCK_ROWS, ::-1].cumsum(axis=1, dtype=np.int64)[:, ::-1]
        inverse += (1 / (above + 1)).sum(axis=0)
        has_any += (above > 0).sum(axis=0)
        mean += above.sum(axis=0)
    share = strangers * inverse / np.maximum(1, has_any)
    genuine = np.maximum(0, mean / len(neighbours) - strangers) / max(1, faces - 1)
    sampled = len(neighbours)
    return ImpostorCurve(share, strangers, genuine, has_any / sampled)


def _find_bins(similarities: Float32) -> Int32:
    bins = np.clip(((similarities - _LOWEST) / _STEP).astype(np.int32), 0, _BINS - 1)
    return np.asarray(bins, np.int32)


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
    logarithm = np.log(counts[bins])
    curve = np.polynomial.Polynomial.fit(scale, logarithm, _DEGREE, w=np.sqrt(counts[bins]))
    if not _is_smooth(logarithm - curve(scale), counts[bins]):
        return None
    beyond = (np.arange(first, len(counts)) - first) / max(1, last - first)
    tail = np.full(len(counts), float(total))
    # The density may only fall: a cubic rises again somewhere.
    tail[first:] = _sum_tail(np.minimum.accumulate(curve(beyond)))
    lowest = int(np.argmin(curve(beyond)))
    if lowest < len(beyond) - 1 and tail[first + lowest] > _MAX_FLOOR_PAIRS:
        # It rises too early, and leaves strangers at any similarity. From where it falls most, a straight line goes on.
        slope = curve.deriv()(beyond)
        steepest = int(np.argmin(slope[: lowest + 1]))
        line = curve(beyond[steepest]) + slope[steepest] * (beyond - beyond[steepest])
        tail[first:] = _sum_tail(np.where(np.arange(len(beyond)) < steepest, curve(beyond), line))
    return tail


def _sum_tail(logarithm: Float64) -> Float64:
    """Sum up densities, given as logarithms, from the end to the beginning of each bin."""
    return np.asarray(np.exp(logarithm)[::-1].cumsum()[::-1], np.float64)


def _is_smooth(residual: Float64, counts: Int64) -> bool:
    """Say whether a fit follows the counts, part by part of the bulk."""
    parts = [part for part in np.array_split(np.arange(len(residual)), _RESIDUAL_PARTS) if len(part)]
    means = [abs(float(np.average(residual[part], weights=counts[part]))) for part in parts]
    return max(means) <= _MAX_RESIDUAL
