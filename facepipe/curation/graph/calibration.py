"""What a gallery itself says about its faces: how crowded each is, and from which similarity two are one person."""

from dataclasses import dataclass

import numpy as np

from facepipe.curation.graph import truth
from facepipe.curation.graph.cohort import Cohort
from facepipe.curation.graph.linkage import Clusters, average_linkage
from facepipe.curation.graph.threshold import Threshold, estimate, histogram
from facepipe.errors import ThresholdError
from facepipe.nearest.join import find_candidate_pairs
from facepipe.types import Float32, Int64

_PLAUSIBLE = (0.5, 1.3)  # an estimated threshold lies within these times the one of the model's card
_FEWEST = 300  # faces from which a threshold is estimated
_EACH = 3  # faces of a person in the cohort
_FEW_IMPOSTORS = 0.05  # among the pairs by which the cohort's persons are told


@dataclass(frozen=True)
class Asked:
    """threshold: a distance, if one was given; impostors: see `estimate`; card: the model's own distance, if it has
    one; embedder: its name; seed: of the samples."""

    threshold: float | None
    impostors: float
    card: float | None
    embedder: str
    seed: int


@dataclass(frozen=True)
class Calibration:
    """cohort; density (n,) of all faces against it; counts: histogram of similarities of random pairs; threshold."""

    cohort: Cohort
    density: Float32
    counts: Int64
    threshold: Threshold


def calibrate(vectors: Float32, asked: Asked) -> Calibration:
    """Densities and threshold of n faces. Where these are too few to show one, the cohort is left out and the model's
    own is taken. Raises ThresholdError where the model has none."""
    sample = truth.draw(len(vectors), asked.seed)
    if len(vectors) >= _FEWEST:
        cohort = thinned(Cohort.draw(vectors, asked.seed), asked.card)
        density = cohort.density(vectors)
        counts = histogram(vectors, density, sample)
        threshold = _found(counts, len(vectors), float(density.mean()), asked)
        if threshold:
            return Calibration(cohort, density, counts, threshold)
    density = np.zeros(len(vectors), np.float32)
    distance = asked.threshold or asked.card
    if distance is None:
        raise ThresholdError(
            "too few faces, or too few persons, to find from which distance two faces are of one person, and the model "
            f"{asked.embedder!r} says nothing of it: give a distance with --threshold, or --set graph.threshold=0.4"
        )
    return Calibration(Cohort.none(), density, histogram(vectors, density, sample), given(distance, 0.0))


def given(distance: float, density: float) -> Threshold:
    """A distance between faces of the mean density as a threshold."""
    return Threshold(1 - distance**2 / 2 - density, float("nan"), float("nan"), estimated=False)


def _found(counts: Int64, faces: int, density: float, asked: Asked) -> Threshold | None:
    if asked.threshold:
        return given(asked.threshold, density)
    found = estimate(counts, faces, asked.impostors)
    if found is None or asked.card is None:
        return found
    distance = np.sqrt(max(0.0, 2 - 2 * (found.similarity + density)))
    return found if _PLAUSIBLE[0] * asked.card <= distance <= _PLAUSIBLE[1] * asked.card else None


def thinned(cohort: Cohort, card: float | None) -> Cohort:
    """At most three faces of a person: one who makes up much of a gallery would count as a crowd of strangers."""
    vectors = cohort.vectors
    flat = np.zeros(len(vectors), np.float32)
    found = estimate(histogram(vectors, flat, np.arange(len(vectors))), len(vectors), _FEW_IMPOSTORS)
    if found is None and card is None:
        return cohort
    threshold = found.similarity if found else given(card or 0.0, 0.0).similarity
    u, v = find_candidate_pairs(vectors, flat, threshold, len(vectors))
    person, _ = average_linkage(Clusters.single(vectors, flat), u, v, threshold)
    order = np.argsort(person, kind="stable")
    rank = np.arange(len(order)) - np.searchsorted(person[order], person[order])
    return Cohort(np.ascontiguousarray(vectors[np.sort(order[rank < _EACH])]))
