"""The tail of the similarities of strangers: what is expected beyond the pairs that were seen."""

from math import lgamma

import numpy as np
import pytest

from facepipe.curation.graph.threshold import BIN_EDGES, estimate_curve

_PAIRS = 12e6


def draw_skewed(shape: float, spread: float) -> np.ndarray:
    """Return the expected pairs of a gamma distribution around -0.2, per bin; a small shape has a long tail."""
    middles = (BIN_EDGES[:-1] + BIN_EDGES[1:]) / 2
    scale = spread / np.sqrt(shape)
    x = np.maximum((middles + 0.2) / scale + shape, 1e-9)
    density = np.exp((shape - 1) * np.log(x) - x - lgamma(shape)) / scale
    return np.asarray(_PAIRS * density * np.diff(BIN_EDGES))


@pytest.mark.parametrize(("shape", "spread"), [(64, 0.11), (25, 0.11), (12, 0.1), (8, 0.08), (5, 0.07)])
def test_strangers_become_few_however_long_their_tail(shape: float, spread: float) -> None:
    """A cubic through the logarithms of such a flank turns up, and would leave strangers at any similarity."""
    pairs = draw_skewed(shape, spread)
    counts = np.round(pairs).astype(np.int64)
    faces = 3_500
    curve = estimate_curve(np.zeros((5, len(counts)), np.int32), counts, faces)
    assert curve is not None
    expected = curve.strangers * counts.sum() / (faces - 1)
    true = pairs[::-1].cumsum()[::-1]
    # More strangers are expected than there are, so that a threshold is rather too strict, but in proportion.
    for similarity in (0.2, 0.3, 0.4):
        at = np.searchsorted(BIN_EDGES, similarity)
        assert true[at] / 1.2 <= expected[at] <= 5 * true[at]
    assert expected[np.searchsorted(BIN_EDGES, 0.8)] < 1
    assert (np.diff(expected) <= 0).all()
