"""What a gallery itself tells about its faces: how crowded each is, and from which similarity two are one person."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from facepipe.curation.graph.cohort import Cohort
from facepipe.curation.graph.dendrogram import cut_at, cut_into, find_clear_gap, find_gap, find_group_gap
from facepipe.curation.graph.neighbourhoods import gather_neighbourhoods
from facepipe.curation.graph.threshold import (
    ImpostorCurve,
    Threshold,
    count_similarities,
    count_stranger_pairs,
    estimate_curve,
)
from facepipe.curation.graph.truth import draw_sample
from facepipe.errors import ThresholdError
from facepipe.types import Bool, Float32, Float64, Int32, Int64

# An estimated distance is plausible between these multiples of the model's own.
_MIN_PLAUSIBLE = 0.7
_MAX_PLAUSIBLE = 1.3
_MIN_FACES = 300  # to estimate a threshold
_MAX_PER_PERSON = 5  # faces in the cohort
# Fewer faces or persons in the thinned cohort hardly show what strangers look like: better take the model's threshold.
_MIN_COHORT = 400
_MIN_PERSONS = 200
# The same for a model that states none.
_MIN_COHORT_ALONE = 250
_MIN_PERSONS_ALONE = 60
_MIN_REPEATED = 0.35  # share of the faces with a neighbour, below which only the model can say who is one person
_MAX_LOST = 0.02  # share of the faces that may lose their last neighbour where the threshold is raised
_MIN_KEPT = 0.75  # of the pairs of one person, there
# Without any threshold the first guess at the cohort's persons is a tree of faces, cut into so many.
_TREE_FACES = 2000
_TREE_PERSONS = (400, 200, 100, 60)  # fewer if more cut persons apart
_MAX_ROUNDS = 4
_SETTLED = 0.002  # change of the threshold that ends the rounds


@dataclass(frozen=True)
class CalibrationOptions:
    """What is known before the data are looked at.

    Attributes:
        threshold: Requested distance, if there is one.
        impostors: Share of the neighbours of a face that may be strangers.
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
        impostors: Expected share of strangers among a face's neighbours, by threshold; empty if it is not known.
        threshold: From which similarity two faces are one person.
        curve: What the share was taken from, if it is known.
    """

    cohort: Cohort
    density: Float32
    counts: Int64
    impostors: Float64
    threshold: Threshold
    curve: ImpostorCurve | None = None


ComputeDensity = Callable[[Cohort, Float32], Float32]
"""Computes the densities (n,) of vectors (n, 128) against a cohort, anywhere."""


def compute_density_here(cohort: Cohort, vectors: Float32) -> Float32:
    """Compute densities in this process."""
    return cohort.compute_density(vectors)


def calibrate(
    vectors: Float32,
    options: CalibrationOptions,
    unfit: Bool | None = None,
    compute_density: ComputeDensity = compute_density_here,
) -> Calibration:
    """Compute the densities and the threshold of n faces.

    The threshold is estimated from the data if they hold enough persons to show what strangers look like. Otherwise it
    is the model's own; of a model without one it is the middle of a wide gap between the persons, if there is one. Then
    the cohort is empty.

    Args:
        vectors: unit vectors (n, dim).
        options: what is known already.
        unfit: whether a face is too poor to show what persons and strangers look like, (n,). Poor faces are near to
            each other whoever they show: as a crowd of strangers they would raise the threshold of all others.
        compute_density: computes the densities of all faces, in each of some rounds.

    Raises:
        ThresholdError: the model has no threshold of its own.
    """
    is_fit = np.ones(len(vectors), bool) if unfit is None or unfit.all() else ~unfit
    guide = _GuideFaces.draw(is_fit, options.seed)
    calibration = _estimate(vectors, guide, options, compute_density)
    if calibration is None and not is_fit.all() and not (options.threshold or options.model_threshold):
        # The fit faces are too few. All faces are a poorer guide, but the only one.
        guide = _GuideFaces.draw(np.ones(len(vectors), bool), options.seed)
        calibration = _estimate(vectors, guide, options, compute_density)
    if calibration is not None:
        return calibration
    # Otherwise use a given distance, with densities of zero.
    density = np.zeros(len(vectors), np.float32)
    counts = count_similarities(vectors, density, guide.sample).sum(axis=0, dtype=np.int64)
    threshold = _choose_known(vectors, guide.positions, options)
    return Calibration(Cohort.create_empty(vectors.shape[1]), density, counts, np.empty(0), threshold)


def _choose_known(vectors: Float32, fit: Int64, options: CalibrationOptions) -> Threshold:
    """Choose a threshold without knowing what strangers look like.

    Raises:
        ThresholdError: there is none.
    """
    if options.threshold is not None:
        return Threshold.from_distance(options.threshold, 0.0)
    part = draw_part(vectors, options.seed, fit)
    # Of few persons with many faces each the groups are apart.
    gap = find_group_gap(part)
    found = Threshold(gap.similarity, gap.genuine, 0.0) if gap and gap.is_between_persons else None
    if options.model_threshold is not None:
        if found is not None and _is_plausible(found, 0.0, options.model_threshold):
            return found
        return Threshold.from_distance(options.model_threshold, 0.0)
    gap = find_gap(part) or find_clear_gap(part)
    if gap is not None:
        return Threshold(gap.similarity, gap.genuine, 0.0)
    if found is not None:
        return found
    raise ThresholdError(
        "too few faces, or too few persons, to estimate from which distance two faces are of one person, and the "
        f"model {options.embedder!r} has no default: set a distance with --threshold, or --set graph.threshold=0.4"
    )


def draw_part(vectors: Float32, seed: int, fit: Int64 | None = None) -> Float32:
    """Draw as many faces, of all or of those at some positions (m,), as a tree of all of them is made of."""
    positions = np.arange(len(vectors)) if fit is None else fit
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(len(positions), min(_TREE_FACES, len(positions)), replace=False))
    return np.ascontiguousarray(vectors[positions[chosen]])


@dataclass(frozen=True)
class _GuideFaces:
    """The faces that show what persons and strangers look like.

    Attributes:
        is_guide: Whether a face is one of them, (n,).
        positions: Their positions, (m,).
        sample: Positions, sorted, of a sample of them.
    """

    is_guide: Bool
    positions: Int64
    sample: Int64

    @classmethod
    def draw(cls, is_guide: Bool, seed: int) -> "_GuideFaces":
        """Draw the sample."""
        positions = np.flatnonzero(is_guide)
        return cls(is_guide, positions, positions[draw_sample(len(positions), seed)])


def _estimate(
    vectors: Float32, guide: _GuideFaces, options: CalibrationOptions, compute_density: ComputeDensity
) -> Calibration | None:
    """Estimate densities and threshold by fit faces; None if they do not show what strangers look like.

    A threshold that is given replaces the one found. The densities stay those of the persons that the data show.
    """
    if len(guide.positions) < _MIN_FACES:
        return None
    if options.threshold:
        found = _estimate(vectors, guide, replace(options, threshold=None), compute_density)
        if found is not None:
            given = Threshold.from_distance(options.threshold, float(found.density.mean()))
            return replace(found, threshold=given)
    whole = Cohort.draw(vectors, options.seed, guide.positions).vectors
    part = draw_part(whole, options.seed)
    # Guesses at the persons of the cohort: by the model's own distance, and by a tree that is cut.
    guesses: list[Callable[[], _CohortPersons]] = []
    if options.model_threshold is not None:
        known = Threshold.from_distance(options.model_threshold, 0.0)
        density = np.zeros(len(whole), np.float32)
        guesses.append(lambda: _CohortPersons(whole, cut_at(whole, density, known.similarity)))
    guesses += [partial(_cut_part, part, count) for count in _TREE_PERSONS]
    for guess in guesses:
        calibration = _refine(vectors, guide, whole, guess(), options, compute_density)
        if calibration:
            return _raise_over_look_alikes(vectors, guide, calibration, options)
    return None


def _cut_part(part: Float32, count: int) -> "_CohortPersons":
    return _CohortPersons(part, cut_into(part, count))


def _refine(
    vectors: Float32,
    guide: _GuideFaces,
    whole: Float32,
    guess: "_CohortPersons",
    options: CalibrationOptions,
    compute_density: ComputeDensity,
) -> Calibration | None:
    """Estimate densities and threshold from a first guess at the persons of a cohort.

    Persons thin the cohort, the cohort gives the threshold, and the threshold gives the persons of the whole cohort
    (m, dim). Some rounds of this settle, because only few pairs of strangers lie near the threshold.
    """
    persons = guess
    calibration: Calibration | None = None
    for _ in range(_MAX_ROUNDS):
        thinned = persons.thin()
        if not thinned.is_enough(is_alone=options.model_threshold is None):
            return None
        before = calibration
        calibration = _measure(vectors, guide, thinned, options, compute_density)
        if calibration is None or options.threshold:
            return calibration
        if before and abs(calibration.threshold.similarity - before.threshold.similarity) < _SETTLED:
            break
        density = calibration.cohort.compute_density(whole)
        persons = _CohortPersons(whole, cut_at(whole, density, calibration.threshold.similarity))
    return calibration


def _measure(
    vectors: Float32,
    guide: _GuideFaces,
    persons: "_CohortPersons",
    options: CalibrationOptions,
    compute_density: ComputeDensity,
) -> Calibration | None:
    """Measure densities and threshold against the strangers of a thinned cohort."""
    cohort = Cohort(persons.vectors)
    density = compute_density(cohort, vectors)
    neighbours = count_similarities(vectors, density, guide.sample)
    curve = _estimate_curve(persons, cohort, neighbours, len(vectors))
    mean_density = float(density.mean())
    if options.threshold:
        threshold = Threshold.from_distance(options.threshold, mean_density)
    else:
        estimated = curve.find_threshold(options.impostors) if curve else None
        if estimated is None or curve is None or not _is_plausible(estimated, mean_density, options.model_threshold):
            return None
        # Photos of one session look like the persons of a gallery in which nobody or one person only is repeated.
        if options.model_threshold is None and curve.get_connected(estimated) < _MIN_REPEATED:
            return None
        threshold = estimated
    counts = neighbours.sum(axis=0, dtype=np.int64)
    return Calibration(cohort, density, counts, curve.share if curve else np.empty(0), threshold, curve)


def _raise_over_look_alikes(
    vectors: Float32, guide: _GuideFaces, calibration: Calibration, options: CalibrationOptions
) -> Calibration:
    """Raise the threshold if a gap between persons lies above it.

    Persons who look alike are more than the null foresees. Networks with an angular margin leave a gap above them:
    between groups of several faces each, or one so clear that persons may have two.
    """
    threshold = calibration.threshold
    density = calibration.density
    if calibration.curve is None:
        return calibration
    near = gather_neighbourhoods(vectors, density, guide.sample, threshold.similarity, guide.is_guide, options.seed)
    part = np.ascontiguousarray(vectors[near])
    group_gap = find_group_gap(part, density[near], threshold.similarity)
    gap = group_gap or find_clear_gap(part, density[near])
    if gap is None:
        return calibration
    raised = calibration.curve.raise_threshold(threshold, gap.similarity)
    # In a gap between persons hardly a face loses its last neighbour, and few pairs of one person lie.
    lost = calibration.curve.get_connected(threshold) - calibration.curve.get_connected(raised)
    is_cut = lost > _MAX_LOST or raised.genuine < _MIN_KEPT * threshold.genuine
    if not _is_plausible(raised, float(density.mean()), options.model_threshold):
        return calibration
    if is_cut:
        if group_gap is None:
            return calibration
        # Single faces of a person lie in the gap as well: only groups must be above it.
        return replace(calibration, threshold=calibration.curve.widen_margin(threshold, gap.similarity))
    return replace(calibration, threshold=raised)


def _estimate_curve(persons: "_CohortPersons", cohort: Cohort, neighbours: Int32, faces: int) -> ImpostorCurve | None:
    pairs = count_stranger_pairs(persons.vectors, cohort.compute_density(persons.vectors), persons.person)
    return estimate_curve(neighbours, pairs, faces)


def _is_plausible(threshold: Threshold, mean_density: float, model_threshold: float | None) -> bool:
    """Say whether a threshold is near enough to the model's own."""
    if model_threshold is None:
        return True
    distance = np.sqrt(max(0.0, 2 - 2 * (threshold.similarity + mean_density)))
    return bool(_MIN_PLAUSIBLE * model_threshold <= distance <= _MAX_PLAUSIBLE * model_threshold)


@dataclass(frozen=True)
class _CohortPersons:
    """The faces of a cohort, and which are of one person.

    Attributes:
        vectors: Unit vectors (m, dim).
        person: Number of each face's person, (m,).
    """

    vectors: Float32
    person: Int64

    def thin(self) -> "_CohortPersons":
        """Keep at most five faces per person: a person with a large share of the gallery would count as a crowd."""
        order = np.argsort(self.person, kind="stable")
        rank = np.arange(len(order)) - np.searchsorted(self.person[order], self.person[order])
        kept = np.sort(order[rank < _MAX_PER_PERSON])
        return _CohortPersons(np.ascontiguousarray(self.vectors[kept]), self.person[kept])

    def is_enough(self, *, is_alone: bool) -> bool:
        """Say whether these are enough faces and persons to show what strangers look like.

        Args:
            is_alone: whether the model states no threshold that could be used instead.
        """
        min_faces = _MIN_COHORT_ALONE if is_alone else _MIN_COHORT
        min_persons = _MIN_PERSONS_ALONE if is_alone else _MIN_PERSONS
        return len(self.person) >= min_faces and len(np.unique(self.person)) >= min_persons
