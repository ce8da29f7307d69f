"""What a projection loses: verification on the same pairs with all dimensions and with 128."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from facepipe.evaluation.pairs import FARTHEST
from facepipe.evaluation.roc import best_threshold, cross_validate, roc, tar_at_far
from facepipe.models.projection import to_unit_vectors
from facepipe.types import Bool, Float64, Int64

FAR = 1e-3
_FOLDS = 10
_MOST_SAME = 6_000  # pairs: as many as LFW View 2 has
_MOST_DIFFERENT = 100_000


class PairRows(NamedTuple):
    """Pairs as rows of a list of faces, -1 where a face could not be embedded; same (n,) bool, folds (n,)."""

    left: Int64
    right: Int64
    same: Bool
    folds: Int64


@dataclass(frozen=True)
class Verification:
    """accuracy: over as many different pairs as same ones; tar: at FAR 1e-3, None below 1000 different pairs.

    threshold: distance of unit vectors that tells those pairs apart best
    """

    accuracy: float
    tar: float | None
    threshold: float
    same: int
    different: int


def verification(raw: npt.ArrayLike, pairs: PairRows) -> Verification:
    """Figures of raw vectors (n, d)."""
    distances, same = _distances(to_unit_vectors(raw), pairs), pairs.same
    curve = roc(distances, same)
    # As LFW does: otherwise calling every pair different would be right most of the time.
    rows = np.concatenate([np.flatnonzero(same), np.flatnonzero(~same)[: max(1, int(same.sum()))]])
    cross = cross_validate(distances[rows], same[rows], pairs.folds[rows])
    different = int((~same).sum())
    tar = tar_at_far(curve, FAR)[0] if different * FAR >= 1 else None
    return Verification(cross.mean, tar, best_threshold(distances[rows], same[rows]), int(same.sum()), different)


def _distances(vectors: Float64, pairs: PairRows) -> Float64:
    """A pair with a face that could not be embedded is as far apart as can be."""
    known = (pairs.left >= 0) & (pairs.right >= 0)
    apart = np.full(len(known), FARTHEST)
    apart[known] = np.linalg.norm(vectors[pairs.left[known]] - vectors[pairs.right[known]], axis=1)
    return apart


def drawn_pairs(people: Int64, seed: int) -> PairRows | None:
    """Pairs of faces (n,) whose numbers of persons are given; None where they make no pairs of both kinds."""
    rng = np.random.default_rng(seed)
    left, right = np.triu_indices(len(people), 1)
    same = people[left] == people[right]
    chosen = []
    for wanted, most in ((same, _MOST_SAME), (~same, _MOST_DIFFERENT)):
        rows = np.flatnonzero(wanted)
        if not len(rows):
            return None
        chosen.append(rng.permutation(rows)[:most])
    rows = np.concatenate(chosen)
    return PairRows(left[rows], right[rows], same[rows], rng.integers(0, _FOLDS, len(rows)))
