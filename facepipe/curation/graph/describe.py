"""What a graph says for those who build on it: a stricter threshold, capped densities, the notes of reports."""

import numpy as np

from facepipe.curation.graph.graph import Graph, GraphInfo
from facepipe.curation.graph.threshold import EDGES, estimate
from facepipe.reports.model import Histogram, Mark, Series
from facepipe.types import Float32

_DOUBT = 0.25  # of the share of impostors above the threshold, above the stricter one
_STRICTER = 0.02  # in similarity, if that share is not known


def threshold_note(info: GraphInfo) -> str:
    """Where the threshold came from."""
    if not info.threshold.estimated:
        return "distance; given, or the model's own: too few faces to find it"
    return f"distance, found from the data: {info.threshold.impostors:.0%} of the pairs below it would be two persons"


def recall_note(info: GraphInfo) -> str:
    """How the recall was found."""
    if info.exact:
        return "every face was compared with every other"
    return f"of {info.sampled:,} edges that comparing everything finds for a sample"


def pair_histogram(graph: Graph) -> Histogram:
    """Distances of random pairs, with the threshold."""
    info, counts = graph.info, graph.histogram
    used = np.flatnonzero(counts)
    first, last = (int(used[0]), int(used[-1]) + 1) if used.size else (0, 1)
    step = max(1, (last - first) // 120)
    edges = EDGES[first : last + step : step]
    sums = np.add.reduceat(counts[first:last], np.arange(0, last - first, step))
    bounds = tuple(float(x) for x in [info.distance_at(e) for e in edges[: len(sums) + 1]][::-1])
    bars = Series("pairs", bounds, tuple(float(x) for x in sums[::-1][: len(bounds) - 1]))
    mark = Mark(info.distance, "threshold")
    return Histogram("Distances of random pairs of faces", "distance", (bars,), (mark,), log=True)


def stricter_threshold(graph: Graph) -> float:
    """Return a similarity above the threshold, from which two faces are one person with little doubt."""
    threshold = graph.info.threshold
    if threshold.estimated:
        estimated = estimate(graph.histogram, len(graph.nodes), _DOUBT * threshold.impostors)
        if estimated:
            return max(estimated.similarity, threshold.similarity)
    return threshold.similarity + _STRICTER


def cap_density(density: Float32, threshold: float, reach: float) -> Float32:
    """Cap densities (n,) so that every pair closer than `reach` has at least the threshold's similarity."""
    return np.minimum(density, np.float32(1 - reach**2 / 2 - threshold))
