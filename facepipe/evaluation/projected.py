"""Measure what a projection loses: verification on the same pairs with all dimensions and with 128."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from facepipe.evaluation.pairs import MAX_DISTANCE
from facepipe.evaluation.roc import compute_roc, cross_validate, find_best_threshold, find_tar_at_far
from facepipe.models.projection import to_unit_vectors
from facepipe.types import Bool, Float64, Int64

FAR = 1e-3
_FOLDS = 10
_MAX_SAME = 6_000  # pairs: as many as LFW View 2 has
_MAX_DIFFERENT = 100_000


class PairRows(NamedTuple):
    """Pairs as rows of a list of faces.

    Attributes:
        left: Row of the first face, (n,), -1 if it could not be embedded.
        right: Row of the second face, (n,).
        same: Whether they show one person, (n,).
        folds: Fold of each pair, (n,).
    """

    left: Int64
    right: Int64
    same: Bool
    folds: Int64


@dataclass(frozen=True)
class VerificationScores:
    """Figures of verification.

    Attributes:
        accuracy: Cross-validated accuracy over as many different pairs as same ones.
        tar: True accept rate at FAR 1e-3. None below 1,000 different pairs.
        threshold: Distance of unit vectors that tells those pairs apart best.
        same: Number of pairs of one person.
        different: Number of pairs of two persons.
    """

    accuracy: float
    tar: float | None
    threshold: float
    same: int
    different: int


def score_vectors(raw: npt.ArrayLike, pairs: PairRows) -> VerificationScores:
    """Compute the figures of raw vectors (n, d) on pairs of them."""
    same = pairs.same
    distances = _compute_distances(to_unit_vectors(raw), pairs)
    curve = compute_roc(distances, same)
    # As LFW does: otherwise calling every pair different would be right most of the time.
    balanced = np.concatenate([np.flatnonzero(same), np.flatnonzero(~same)[: max(1, int(same.sum()))]])
    different = int((~same).sum())
    return VerificationScores(
        accuracy=cross_validate(distances[balanced], same[balanced], pairs.folds[balanced]).mean,
        tar=find_tar_at_far(curve, FAR)[0] if different * FAR >= 1 else None,
        threshold=find_best_threshold(distances[balanced], same[balanced]),
        same=int(same.sum()),
        different=different,
    )


def _compute_distances(vectors: Float64, pairs: PairRows) -> Float64:
    """Compute the distances; a pair with a face that could not be embedded is as far apart as possible."""
    is_known = (pairs.left >= 0) & (pairs.right >= 0)
    distances = np.full(len(is_known), MAX_DISTANCE)
    left = vectors[pairs.left[is_known]]
    distances[is_known] = np.linalg.norm(left - vectors[pairs.right[is_known]], axis=1)
    return distances


def draw_pairs(persons: Int64, seed: int) -> PairRows | None:
    """Draw pairs of faces.

    Args:
        persons: number of each face's person, (n,).
        seed: random seed.

    Returns:
        None if the faces make no pairs of both kinds.
    """
    rng = np.random.default_rng(seed)
    # All pairs of faces, by the positions above the diagonal of a matrix.
    left, right = np.triu_indices(len(persons), 1)
    same = persons[left] == persons[right]
    # Keep at most so many pairs of each kind: there are far more of different persons.
    chosen = []
    for is_wanted, max_pairs in ((same, _MAX_SAME), (~same, _MAX_DIFFERENT)):
        rows = np.flatnonzero(is_wanted)
        if not len(rows):
            return None
        chosen.append(rng.permutation(rows)[:max_pairs])
    rows = np.concatenate(chosen)
    return PairRows(left[rows], right[rows], same[rows], rng.integers(0, _FOLDS, len(rows)))
