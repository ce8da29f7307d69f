"""Estimate to which identity each face belongs: expectation maximisation over labels and neighbours' labels.

A face's similarity to an identity is drawn from one normal distribution if it belongs to it, and from another if it
does not. Both distributions are estimated from the corpus itself. So are the share of swapped labels and the share of
faces that belong to no identity. The variance falls with the number of faces that an identity rests on. The posteriors
weight the identities' centres, so that each round computes new centres (Dempster, Laird, Rubin, 1977; label noise as
in Natarajan et al., NIPS 2013).
"""

from dataclasses import dataclass, field

import numpy as np

from facepipe.curation.cleaning.evidence import FaceVectors, IdentityCentres, LabelCandidates
from facepipe.types import Float32, Int64

MIN_WEIGHT = 0.3  # faces that an identity must rest on before it counts
# Bounds of the weights, to see how the variance falls with them.
_WEIGHT_BINS = np.array([0.3, 1.5, 2.5, 4.5, 8.5, 16.5, np.inf])
_MIN_MASS = 8.0  # faces below which a distribution is not estimated
_MAX_STRANGERS = 200_000  # sampled pairs of a face and another identity, for the distribution of impostors
# Bounds of the log likelihood ratio: about 1 in 400 genuine faces is an outlier as far off as you like (pose, blur).
_MAX_FOR = 20.0
_MAX_AGAINST = 6.0
# Rounds at most, rounds before damping begins, and the change of a probability that ends them.
_MAX_ROUNDS = 40
_UNDAMPED_ROUNDS = 8
_SETTLED_CHANGE = 0.005
# Starting values of the two rates. A corpus of a few faces does not move them far.
_START_SWAPPED = 0.15
_START_UNKNOWN = 0.05


@dataclass(frozen=True)
class Normal:
    """A normal distribution whose variance depends on the weight a similarity rests on.

    Attributes:
        mean: Mean.
        fixed_variance: Part of the variance that does not depend on the weight.
        variance_per_face: The variance is `fixed_variance + variance_per_face / weight`.
    """

    mean: float
    fixed_variance: float
    variance_per_face: float

    def compute_log_density(self, similarity: Float32, weight: Float32) -> Float32:
        """Compute the log density (m,), less a constant."""
        variance = self.fixed_variance + self.variance_per_face / np.maximum(weight, MIN_WEIGHT)
        log_density = -0.5 * (similarity - self.mean) ** 2 / variance - 0.5 * np.log(variance)
        return np.asarray(log_density, np.float32)


@dataclass(frozen=True)
class EstimationRound:
    """Figures of one round.

    Attributes:
        swapped: Estimated share of labels that are another identity's.
        unknown: Estimated share of faces that belong to no identity.
        change: Largest change of a probability in this round.
    """

    swapped: float
    unknown: float
    change: float


@dataclass
class LabelPosteriors:
    """Posteriors for n faces and m candidates.

    Attributes:
        probability: Probability that the face belongs to the identity, (m,).
        no_identity: Probability that the face belongs to none of its candidates, (n,).
        similarity: Mean similarity to the rest of the identity, (m,).
        weight: Number of faces that this similarity rests on, (m,).
        genuine: Distribution of similarities of faces to their own identity.
        impostor: Distribution of similarities of faces to other identities.
        swapped: Share of labels that are another identity's.
        unknown: Share of faces that belong to no identity.
        rounds: One entry per round.
    """

    probability: Float32
    no_identity: Float32
    similarity: Float32
    weight: Float32
    genuine: Normal
    impostor: Normal
    swapped: float
    unknown: float
    rounds: list[EstimationRound] = field(default_factory=list)

    @property
    def has_settled(self) -> bool:
        """Whether the last round changed no probability by 0.01 or more."""
        return bool(self.rounds) and self.rounds[-1].change < 0.01


def estimate_label_posteriors(
    faces: FaceVectors,
    candidates: LabelCandidates,
    prior: Float32,
    start: Float32,
    *,
    threshold: float,
    seed: int = 0,
) -> LabelPosteriors:
    """Estimate how likely each face belongs to each of its candidate identities.

    Args:
        faces: n faces.
        candidates: m pairs of a face and an identity.
        prior: probability that the label is meant for this face at all, (n,). A photo with several faces has one label.
        start: probabilities to start with, (m,).
        threshold: similarity at which two faces are as likely one person as two. It is used if the corpus is too small
            or too uniform to show what strangers look like.
        seed: seed of the sample of strangers.
    """
    # Pairs of strangers show how similar faces are to identities that are not theirs.
    stranger_faces, stranger_identities = _sample_strangers(candidates, len(faces.density), seed)
    no_share = np.zeros(len(stranger_faces), np.float32)
    own = candidates.is_own
    probability = start.astype(np.float32)
    swapped = _START_SWAPPED
    unknown = _START_UNKNOWN
    rounds: list[EstimationRound] = []
    for n in range(_MAX_ROUNDS):
        # Maximisation: centres and distributions from the current probabilities.
        centres = IdentityCentres.from_shares(faces, candidates, probability)
        similarity, weight = centres.compute_fit(faces, candidates.face, candidates.identity, probability)
        stranger_similarity, stranger_weight = centres.compute_fit(faces, stranger_faces, stranger_identities, no_share)
        genuine, impostor = _fit_distributions(
            _fit_normal(similarity, weight, probability),
            _fit_normal(stranger_similarity, stranger_weight, np.ones(len(stranger_faces), np.float32)),
            threshold,
        )
        # Expectation: new probabilities. Damping stops two faces that pull each other's identities to and fro.
        ratio = compute_log_ratio(genuine, impostor, similarity, weight)
        before = probability
        probability, no_identity = _compute_posteriors(candidates, ratio, prior, swapped=swapped, unknown=unknown)
        if n >= _UNDAMPED_ROUNDS:
            probability = np.asarray((probability + before) / 2, np.float32)
        # New rates.
        correct = float(probability[own].sum()) / max(1, int(own.sum()))
        expected = 1.0
        if own.any():
            own_face = candidates.face[own]
            expected = float(prior[own_face].mean())
            unknown = float(np.clip(no_identity[own_face].mean() - (1 - expected), 1e-3, 0.5))
        swapped = float(np.clip(expected - correct - unknown, 1e-3, 0.9))
        change = float(np.abs(probability - before).max(initial=0))
        rounds.append(EstimationRound(swapped, unknown, change))
        if change < _SETTLED_CHANGE:
            break
    return LabelPosteriors(
        probability=probability,
        no_identity=no_identity,
        similarity=similarity,
        weight=weight,
        genuine=genuine,
        impostor=impostor,
        swapped=swapped,
        unknown=unknown,
        rounds=rounds,
    )


def compute_log_ratio(genuine: Normal, impostor: Normal, similarity: Float32, weight: Float32) -> Float32:
    """Compute the log likelihood ratio (m,) of belonging to the identity against not belonging to it.

    Above the mean of the genuine faces a face cannot become less likely: the ratio stays at its value there. It is 0 if
    an identity rests on too few faces.
    """
    capped = np.minimum(similarity, np.float32(genuine.mean))
    ratio = genuine.compute_log_density(capped, weight) - impostor.compute_log_density(capped, weight)
    return np.where(weight >= MIN_WEIGHT, np.clip(ratio, -_MAX_AGAINST, _MAX_FOR), 0).astype(np.float32)


def _compute_posteriors(
    candidates: LabelCandidates, ratio: Float32, prior: Float32, *, swapped: float, unknown: float
) -> tuple[Float32, Float32]:
    """Compute the probability of each candidate (m,), and of belonging to none of them (n,)."""
    # Prior times likelihood for each candidate, and for no identity; then divide by the sum per face.
    own = (1 - swapped - unknown) * prior[candidates.face]
    other = np.full(len(candidates), swapped / max(1, candidates.identity_count - 1))
    likelihood = np.where(candidates.is_own, own, other) * np.exp(ratio.astype(np.float64))
    no_identity = unknown + (1 - swapped - unknown) * (1 - prior)
    total = no_identity + np.bincount(candidates.face, likelihood, len(prior))
    probability = (likelihood / total[candidates.face]).astype(np.float32)
    return probability, (no_identity / total).astype(np.float32)


def _sample_strangers(candidates: LabelCandidates, face_count: int, seed: int) -> tuple[Int64, Int64]:
    """Sample faces (s,) and identities (s,) that are not candidates of each other."""
    rng = np.random.default_rng(seed)
    if candidates.identity_count < 2 or not len(candidates):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    labelled = np.unique(candidates.face)
    size = min(_MAX_STRANGERS, 4 * len(labelled) * candidates.identity_count)
    faces = rng.choice(labelled, size)
    # Identities are drawn as often as they have labels, so that they rest on as many faces as the candidates do.
    identities = rng.choice(candidates.identity[candidates.is_own], size)
    keys = candidates.face * candidates.identity_count + candidates.identity
    is_stranger = ~np.isin(faces * candidates.identity_count + identities, keys)
    return faces[is_stranger], identities[is_stranger]


def _fit_distributions(genuine: Normal | None, impostor: Normal | None, threshold: float) -> tuple[Normal, Normal]:
    """Replace a distribution that the corpus does not show by one that mirrors the other at the threshold."""
    if genuine is None:  # no identity has two faces: as far above the threshold as strangers lie below it
        spread = abs(threshold - impostor.mean) if impostor else 0.05
        genuine = Normal(threshold + spread / 2, (spread / 4) ** 2, 0.0)
    if impostor is None or impostor.mean >= genuine.mean:
        impostor = Normal(2 * threshold - genuine.mean, genuine.fixed_variance, genuine.variance_per_face)
    return genuine, impostor


def _fit_normal(similarity: Float32, weight: Float32, share: Float32) -> Normal | None:
    """Fit the mean, and the variance as a line in 1 / weight, of similarities that count by their share.

    Returns:
        None if too few faces count.
    """
    is_usable = (weight >= MIN_WEIGHT) & (share > 0.01)
    x = similarity[is_usable].astype(np.float64)
    weight = weight[is_usable]
    share = share[is_usable].astype(np.float64)
    if share.sum() < _MIN_MASS:
        return None
    mean = float((x * share).sum() / share.sum())
    overall = float((share * (x - mean) ** 2).sum() / share.sum())
    # Mean of 1 / weight and variance in each bin of weights that holds enough faces.
    bins = np.digitize(weight, _WEIGHT_BINS)
    bin_count = len(_WEIGHT_BINS) + 1
    mass = np.bincount(bins, share, bin_count)
    is_solid = mass >= _MIN_MASS
    inverse = np.bincount(bins, share / weight, bin_count)[is_solid] / mass[is_solid]
    variance = np.bincount(bins, share * (x - mean) ** 2, bin_count)[is_solid] / mass[is_solid]
    if is_solid.sum() < 2:
        return Normal(mean, max(overall, 1e-6), 0.0)
    # The variance is a line in 1 / weight, whose two parts must not be negative.
    slope, _ = np.polyfit(inverse, variance, 1, w=np.sqrt(mass[is_solid]))
    per_face = float(np.clip(slope, 0, None))
    fixed = float(np.average(variance - per_face * inverse, weights=mass[is_solid]))
    return Normal(mean, max(fixed, 0.1 * overall, 1e-6), per_face)
