"""What a gallery itself tells about its faces: how crowded each is, and from which similarity two are one person."""

from dataclasses import dataclass

import numpy as np

from facepipe.curation.graph.cohort import Cohort
from facepipe.curation.graph.linkage import Clusters, merge_by_average_linkage
from facepipe.curation.graph.threshold import Threshold, count_similarities, estimate_threshold
from facepipe.curation.graph.truth import draw_sample
from facepipe.errors import ThresholdError
from facepipe.nearest.join import find_candidate_pairs
from facepipe.types import Float32, Int64

# An estimated distance is plausible between these multiples of the model's own.
_MIN_PLAUSIBLE = 0.5
_MAX_PLAUSIBLE = 1.3
_MIN_FACES = 300  # to estimate a threshold
_MAX_PER_PERSON = 3  # faces in the cohort
_COHORT_IMPOSTORS = 0.05  # share among the pairs that tell the cohort's persons apart


@dataclass(frozen=True)
class CalibrationOptions:
    """What is known before the data are looked at.

    Attributes:
        threshold: Requested distance, if there is one.
        impostors: Share of the pairs above the threshold that may be of two persons.
        model_threshold: The model's own distance, if it has one.
        embedder: Name of the model.
        seed: Random seed of the samples.
    """

    threshold: float | None
    impostors: float
    model_threshold: float | None
    embedder: str
    seed: int


@dataclass(frozen=True)
class Calibration:
    """What the data tell.

    Attributes:
        cohort: Faces that densities are measured against.
        density: Densities (n,) of all faces.
        counts: Counts of the similarities of random pairs.
        threshold: From which similarity two faces are one person.
    """

    cohort: Cohort
    density: Float32
    counts: Int64
    threshold: Threshold


def calibrate(vectors: Float32, options: CalibrationOptions) -> Calibration:
    """Compute the densities and the threshold of n faces.

    If there are too few faces to estimate a threshold, the cohort is empty and the model's own threshold is used.

    Args:
        vectors: unit vectors (n, 128).
        options: what is known already.

    Raises:
        ThresholdError: the model has no threshold of its own.
    """
    sample = draw_sample(len(vectors), options.seed)
    # Estimate from the data if there are enough faces.
    if len(vectors) >= _MIN_FACES:
        cohort = thin_cohort(Cohort.draw(vectors, options.seed), options.model_threshold)
        density = cohort.compute_density(vectors)
        counts = count_similarities(vectors, density, sample)
        threshold = _choose_threshold(counts, len(vectors), float(density.mean()), options)
        if threshold:
            return Calibration(cohort, density, counts, threshold)
    # Otherwise use a given distance, with densities of zero.
    density = np.zeros(len(vectors), np.float32)
    distance = options.threshold or options.model_threshold
    if distance is None:
        raise ThresholdError(
            "too few faces, or too few persons, to estimate from which distance two faces are of one person, and the "
            f"model {options.embedder!r} has no default: set a distance with --threshold, or --set graph.threshold=0.4"
        )
    counts = count_similarities(vectors, density, sample)
    return Calibration(Cohort.create_empty(), density, counts, Threshold.from_distance(distance, 0.0))


def _choose_threshold(counts: Int64, faces: int, mean_density: float, options: CalibrationOptions) -> Threshold | None:
    """Return the requested threshold, or the estimated one; None if that is not plausible for the model."""
    if options.threshold:
        return Threshold.from_distance(options.threshold, mean_density)
    threshold = estimate_threshold(counts, faces, options.impostors)
    if threshold is None or options.model_threshold is None:
        return threshold
    distance = np.sqrt(max(0.0, 2 - 2 * (threshold.similarity + mean_density)))
    shortest = _MIN_PLAUSIBLE * options.model_threshold
    longest = _MAX_PLAUSIBLE * options.model_threshold
    return threshold if shortest <= distance <= longest else None


def thin_cohort(cohort: Cohort, model_threshold: float | None) -> Cohort:
    """Keep at most three faces per person: a person with a large share of the gallery would count as a crowd.

    Args:
        cohort: a sample of faces.
        model_threshold: the model's own distance, if the cohort does not show one.
    """
    vectors = cohort.vectors
    # Cluster the cohort by its own threshold, without densities.
    density = np.zeros(len(vectors), np.float32)
    counts = count_similarities(vectors, density, np.arange(len(vectors)))
    estimated = estimate_threshold(counts, len(vectors), _COHORT_IMPOSTORS)
    if estimated is None and model_threshold is None:
        return cohort
    threshold = estimated or Threshold.from_distance(model_threshold or 0.0, 0.0)
    u, v = find_candidate_pairs(vectors, density, threshold.similarity, len(vectors))
    person, _ = merge_by_average_linkage(Clusters.from_faces(vectors, density), u, v, threshold.similarity)
    # Keep the first faces of each person.
    order = np.argsort(person, kind="stable")
    rank = np.arange(len(order)) - np.searchsorted(person[order], person[order])
    return Cohort(np.ascontiguousarray(vectors[np.sort(order[rank < _MAX_PER_PERSON])]))
