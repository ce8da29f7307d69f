"""Identify a face: an identity or `Unknown`, from the nearest faces and a threshold."""

from typing import Literal

import numpy as np
import numpy.typing as npt

from facepipe.types import Float32

UNKNOWN = "Unknown"
DecisionRule = Literal["nearest", "vote"]


def decide_identities(
    identities: npt.NDArray[np.object_], distances: Float32, threshold: float, rule: DecisionRule = "nearest"
) -> npt.NDArray[np.object_]:
    """Decide the identity of each query by its nearest faces.

    Args:
        identities: identities of the k nearest faces, nearest first, (n, k); None if a face has none.
        distances: distances (n, k).
        threshold: maximum distance of a face that counts.
        rule: `nearest` takes the identity of the nearest face that has one. `vote` takes the identity of most faces; of
            two with as many the nearer one.

    Returns:
        Identities (n,), `Unknown` if no face counts.
    """
    counts = (distances <= threshold) & (identities != None)  # noqa: E711  elementwise
    decisions = np.full(len(identities), UNKNOWN, object)
    for n in np.flatnonzero(counts.any(axis=1)):
        candidates = identities[n][counts[n]]
        if rule == "nearest":
            decisions[n] = candidates[0]
        else:
            # `first` is the position of each name's nearest face; it decides between equal votes.
            names, first, votes = np.unique(candidates.astype(str), return_index=True, return_counts=True)
            decisions[n] = names[np.lexsort((first, -votes))[0]]
    return decisions
