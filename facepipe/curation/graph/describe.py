"""What a graph tells those who build on it: a stricter threshold, and the notes and the histogram of reports."""

import numpy as np

from facepipe.curation.graph.graph import Graph, GraphInfo
from facepipe.curation.graph.threshold import BIN_EDGES
from facepipe.reports.model import Histogram, Mark, Series
from facepipe.types import Float32

_STRICTER_SHARE = 0.25  # of the share of strangers above the threshold, above the stricter one
_STRICTER_SIMILARITY = 0.02  # added to the threshold if that share is not known
_MAX_BARS = 120


def describe_threshold(info: GraphInfo) -> str:
    """Say where the threshold comes from."""
    if not info.threshold.estimated:
        return "distance; requested, or the model's default: too few faces or persons to estimate it"
    share = f"{info.threshold.impostors:.0%} of a face's neighbours are strangers, on average"
    return f"distance, estimated from the data: {share}"


def describe_recall(info: GraphInfo) -> str:
    """Say how the recall was measured."""
    if info.exact:
        return "every face was compared with every other"
    return f"of {info.sampled:,} edges that comparing everything finds for a sample"


def build_pair_histogram(graph: Graph) -> Histogram:
    """Build a histogram of the distances of random pairs, with the threshold as a mark."""
    info = graph.info
    counts = graph.histogram
    # Cut the used bins into about 120 bars.
    used = np.flatnonzero(counts)
    first = int(used[0]) if used.size else 0
    last = int(used[-1]) + 1 if used.size else 1
    step = max(1, (last - first) // _MAX_BARS)
    sums = np.add.reduceat(counts[first:last], np.arange(0, last - first, step))
    edges = BIN_EDGES[first : last + step : step][: len(sums) + 1]
    # Distances rise as similarities fall, so that bars and bounds are reversed.
    bounds = tuple(float(info.to_distance(edge)) for edge in edges[::-1])
    heights = tuple(float(height) for height in sums[::-1][: len(bounds) - 1])
    return Histogram(
        "Distances of random pairs of faces",
        "distance",
        (Series("pairs", bounds, heights),),
        (Mark(info.distance, "threshold"),),
        log=True,
    )


def find_stricter_threshold(graph: Graph) -> float:
    """Find a similarity above the threshold, from which two faces are one person with little doubt."""
    threshold = graph.info.threshold
    curve = graph.impostors
    if threshold.estimated and len(curve):
        # The first bin behind the last one with too many strangers.
        too_many = np.flatnonzero(curve > _STRICTER_SHARE * threshold.impostors)
        at = int(too_many[-1]) + 1 if too_many.size else 0
        if 0 < at < len(curve):
            return max(float(BIN_EDGES[at]), threshold.similarity)
    return threshold.similarity + _STRICTER_SIMILARITY


def cap_density(density: Float32, threshold: float, reach: float) -> Float32:
    """Cap densities (n,) so that every pair closer than `reach` has at least the threshold's similarity."""
    return np.minimum(density, np.float32(1 - reach**2 / 2 - threshold))
