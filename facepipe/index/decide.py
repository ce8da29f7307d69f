"""Who is it: an identity or `Unknown`, from the nearest faces and a threshold."""

from typing import Literal

import numpy as np
import numpy.typing as npt

from facepipe.types import Float32

UNKNOWN = "Unknown"
Rule = Literal["nearest", "vote"]


def decide(
    identities: npt.NDArray[np.object_], distances: Float32, threshold: float, rule: Rule = "nearest"
) -> npt.NDArray[np.object_]:
    """(n,) identities or `Unknown` from those of the k nearest faces (n, k), None where a face has none.

    nearest: of the nearest face that has an identity, if it is within the threshold. vote: the identity that most faces
    within the threshold have, the nearer one of two that are equal.
    """
    counts = (distances <= threshold) & (identities != None)  # noqa: E711  elementwise
    chosen = np.full(len(identities), UNKNOWN, object)
    for n in np.flatnonzero(counts.any(axis=1)):
        near = identities[n][counts[n]]
        if rule == "nearest":
            chosen[n] = near[0]
        else:
            names, first, votes = np.unique(near.astype(str), return_index=True, return_counts=True)
            chosen[n] = names[np.lexsort((first, -votes))[0]]
    return chosen
