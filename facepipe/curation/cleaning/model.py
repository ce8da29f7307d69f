"""Estimate to which identity each face belongs: expectation maximisation over labels and neighbours' labels.

A face's similarity to an identity is drawn from a normal distribution if it belongs to it. If it does not, it is drawn
from the distribution of strangers, whose tail is far lighter than a normal one: it is fitted to sampled strangers and
extrapolated. Both distributions are estimated from the corpus itself. So are the share of swapped labels and the share
of faces that belong to no identity, from the faces that there is evidence on. The variance falls with the number of
faces that an identity rests on. The posteriors weight the identities' centres, so that each round computes new centres
(Dempster, Laird, Rubin, 1977; label noise as in Natarajan et al., NIPS 2013).
"""

from dataclasses import dataclass, field, replace

import numpy as np

from facepipe.curation.cleaning.evidence import FaceVectors, IdentityCentres, LabelCandidates
from facepipe.types import Bool, Float32, Float64, Int64

MIN_WEIGHT = 0.3  # faces that an identity must rest on before it counts
# Bounds of the weights, to see how the variance falls with them.
_WEIGHT_BINS = np.array([0.3, 1.5, 2.5, 4.5, 8.5, 16.5, np.inf])
_MIN_MASS = 8.0  # faces below which a distribution is not estimated
_MAX_STRANGERS = 200_000  # sampled pairs of a face and another identity, for the distribution of impostors
# Bounds of the log likelihood ratio: about 1 in 400 genuine faces is an outlier as far off as you like (pose, blur).
_MAX_FOR = 30.0
_MAX_AGAINST = 6.0
# Rounds at most, rounds before damping begins, and the change of a probability that ends them.
_MAX_ROUNDS = 40
_UNDAMPED_ROUNDS = 8
_SETTLED_CHANGE = 0.005
# The tail of strangers: bins per standard deviation, begin of the fit, fewest samples behind its end, and in all.
_TAIL_STEP = 0.1
_TAIL_BEGIN = 0.0
_TAIL_END_COUNT = 30
_MIN_TAIL_SAMPLES = 5000
_MIN_TAIL_BINS = 10
_TAIL_DEGREE = 3
_TAIL_REACH = 60.0  # standard deviations
# Starting values of the two rates. A corpus of a few faces does not move them far.
_START_SWAPPED = 0.15
_START_UNKNOWN = 0.05
_MIN_RATE = 1e-3
_CLAIMED = 0.5  # probability of other identities above which a face is left out of its own one's parts
_LOG_ODDS_ONE_PERSON = 2.0  # that two parts of an identity are one person, before they are compared
_LOG_ROOT = np.float32(0.5 * np.log(2 * np.pi))  # the constant of a normal log density


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

    def compute_variance(self, weight: Float32) -> Float32:
        """Compute the variance (m,) of similarities that rest on `weight` faces (m,)."""
        return np.asarray(self.fixed_variance + self.variance_per_face / np.maximum(weight, MIN_WEIGHT), np.float32)

    def standardise(self, similarity: Float32, weight: Float32) -> Float32:
        """Compute the deviations (m,) from the mean, in standard deviations."""
        return np.asarray((similarity - self.mean) / np.sqrt(self.compute_variance(weight)), np.float32)

    def compute_log_density(self, similarity: Float32, weight: Float32) -> Float32:
        """Compute the log density (m,), less a constant."""
        variance = self.compute_variance(weight)
        log_density = -0.5 * (similarity - self.mean) ** 2 / variance - 0.5 * np.log(variance)
        return np.asarray(log_density, np.float32)


@dataclass(frozen=True)
class StrangerTail:
    """The shape of the distribution of strangers, in standard deviations from its mean, above the mean.

    Attributes:
        log_density: Logarithm of the density in bins of 0.1 from 0 on, falling.
    """

    log_density: Float64

    @classmethod
    def fit(cls, similarity: Float32, weight: Float32, normal: Normal) -> "StrangerTail | None":
        """Fit a falling cubic to the logarithms of the counts of sampled strangers.

        Returns:
            None if they are too few. Then the normal distribution has to do.
        """
        deviation = normal.standardise(similarity, weight)
        bins = np.arange(_TAIL_BEGIN, _TAIL_REACH + _TAIL_STEP, _TAIL_STEP)
        counts, _ = np.histogram(deviation, bins)
        above = counts[::-1].cumsum()[::-1]
        if len(similarity) < _MIN_TAIL_SAMPLES or above[0] < _MIN_TAIL_SAMPLES / 4:
            return None
        # Fit where there are samples enough, weighted by how precise each count is.
        used = np.flatnonzero((above >= _TAIL_END_COUNT) & (counts > 0))
        if len(used) < _MIN_TAIL_BINS:
            return None
        position = bins[used]
        curve = np.polynomial.Polynomial.fit(position, np.log(counts[used]), _TAIL_DEGREE, w=np.sqrt(counts[used]))
        fitted = curve(bins[:-1])
        # Behind the samples the curve falls on at least as steeply as at their end: a cubic may bend up.
        last = int(used[-1])
        slope = min(0.0, float(curve.deriv()(bins[last])))
        beyond = np.arange(last + 1, len(fitted))
        fitted[beyond] = np.minimum(fitted[beyond], fitted[last] + slope * (bins[beyond] - bins[last]))
        fitted = np.minimum.accumulate(fitted)
        return cls(fitted - np.log(len(similarity) * _TAIL_STEP))

    def compute_log_density(self, deviation: Float32) -> Float32:
        """Compute the log density (m,) at deviations (m,) above 0."""
        at = np.clip(deviation / _TAIL_STEP, 0, len(self.log_density) - 1)
        return np.asarray(np.interp(at, np.arange(len(self.log_density)), self.log_density), np.float32)


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
        impostor: Distribution of similarities of faces to other identities: its mean and variance.
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
        strangers = _fit_normal(stranger_similarity, stranger_weight, np.ones(len(stranger_faces), np.float32))
        genuine, impostor = _fit_distributions(_fit_normal(similarity, weight, probability), strangers, threshold)
        tail = None
        if strangers is impostor:
            has_rest = stranger_weight >= MIN_WEIGHT
            tail = StrangerTail.fit(stranger_similarity[has_rest], stranger_weight[has_rest], impostor)
        # Expectation: new probabilities. Damping stops two faces that pull each other's identities to and fro.
        ratio = compute_log_ratio(genuine, impostor, similarity, weight, tail)
        before = probability
        probability, no_identity = _compute_posteriors(candidates, ratio, prior, swapped=swapped, unknown=unknown)
        if n >= _UNDAMPED_ROUNDS:
            probability = np.asarray((probability + before) / 2, np.float32)
        # New rates, from labels that there is evidence on: those whose identity has other faces.
        judged = np.flatnonzero(own & (weight >= MIN_WEIGHT))
        if not len(judged):
            judged = np.flatnonzero(own)
        if len(judged):
            face = candidates.face[judged]
            correct = float(probability[judged].mean())
            expected = float(prior[face].mean())
            unknown = float(np.clip(no_identity[face].mean() - (1 - expected), _MIN_RATE, 0.5))
            swapped = float(np.clip(expected - correct - unknown, _MIN_RATE, 0.9))
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


def compute_log_ratio(
    genuine: Normal, impostor: Normal, similarity: Float32, weight: Float32, tail: StrangerTail | None = None
) -> Float32:
    """Compute the log likelihood ratio (m,) of belonging to the identity against not belonging to it.

    Above the mean of the genuine faces a face cannot become less likely: their density stays at its value there. It is
    0 if an identity rests on too few faces.

    Args:
        genuine: distribution of faces to their own identity.
        impostor: mean and variance of strangers.
        similarity: mean similarity to the identity, (m,).
        weight: number of faces that this rests on, (m,).
        tail: shape of the distribution of strangers; by default it is normal, and counts up to the genuine mean only.
    """
    capped = np.minimum(similarity, np.float32(genuine.mean))
    ratio = genuine.compute_log_density(capped, weight) - impostor.compute_log_density(capped, weight)
    if tail is not None:
        # Compare both with the normal density of strangers, which the ratio above holds without its constant.
        deviation = impostor.standardise(similarity, weight)
        above = deviation > 0
        log_genuine = genuine.compute_log_density(capped, weight) - _LOG_ROOT
        log_scale = 0.5 * np.log(impostor.compute_variance(weight))
        ratio = np.where(above, log_genuine + log_scale - tail.compute_log_density(deviation), ratio)
    return np.where(weight >= MIN_WEIGHT, np.clip(ratio, -_MAX_AGAINST, _MAX_FOR), 0).astype(np.float32)


def weigh_names(
    faces: FaceVectors,
    candidates: LabelCandidates,
    posteriors: LabelPosteriors,
    part: Int64,
    prior: Float32,
    *,
    threshold: float,
) -> LabelPosteriors:
    """Weigh which part of an identity bears its name, where it falls into two parts that may be two persons.

    Faces of two persons under one name vouch for their own part each, so that the estimation finds both right. The
    name is the first part's with a probability that grows with its size: n1^2 / (n1^2 + n2^2).

    Args:
        faces: n faces.
        candidates: m pairs of a face and an identity.
        posteriors: what was estimated for them.
        part: part of each face within its identity, (n,), 0 is the largest, -1 for none.
        prior: probability that the label is meant for this face at all, (n,). Faces that share photo and label are left
            out.
        threshold: similarity at which two faces are as likely one person as two.
    """
    own = np.flatnonzero(candidates.is_own)
    face = candidates.face[own]
    identity = candidates.identity[own]
    claimed = _sum_others(candidates, posteriors, len(part))
    # Sums of the two largest parts, without faces that another identity claims.
    is_unclaimed = (claimed[face] < _CLAIMED) & (prior[face] == 1)
    first = _sum_part(faces, face, identity, (part[face] == 0) & is_unclaimed, candidates.identity_count)
    second = _sum_part(faces, face, identity, (part[face] == 1) & is_unclaimed, candidates.identity_count)
    is_pair = (first.weight == 1) & (second.weight == 1)
    is_open = is_pair | ((second.weight >= 2) & (first.weight >= 1))
    if not is_open.any():
        return posteriors
    # How likely the parts are two persons, by the distributions of faces inside parts and of strangers.
    genuine, impostor = _fit_parts(faces, candidates, part, posteriors, threshold)
    at = np.flatnonzero(is_open)
    size = np.stack([first.weight[at], second.weight[at]])
    product = np.einsum("nd,nd->n", first.sums[at], second.sums[at]) / (size[0] * size[1])
    similarity = product - (first.crowd[at] / size[0] + second.crowd[at] / size[1]) / 2
    weight = np.maximum(1, 2 * size[0] * size[1] / (size[0] + size[1]))
    ratio = compute_log_ratio(genuine, impostor, similarity.astype(np.float32), weight.astype(np.float32))
    apart = np.zeros(candidates.identity_count)
    apart[at] = 1 / (1 + np.exp(ratio.astype(np.float64) + _LOG_ODDS_ONE_PERSON))
    bears = np.ones(candidates.identity_count)
    bears[at] = size[0] ** 2 / (size[0] ** 2 + size[1] ** 2)
    # If the parts are one person, what was estimated holds, and a face of either part bears the name.
    probability = posteriors.probability.astype(np.float64)
    no_identity = posteriors.no_identity.astype(np.float64)
    is_first = part[face] == 0
    is_weighed = is_open[identity] & ((part[face] == 0) | (part[face] == 1)) & (prior[face] == 1)
    share = np.where(is_first, bears[identity], 1 - bears[identity]) * (1 - claimed[face])
    if_one = np.where(is_pair[identity], 1 - claimed[face], probability[own])
    weighed = (1 - apart[identity]) * if_one + apart[identity] * share
    probability[own] = np.where(is_weighed, weighed, probability[own])
    no_identity[face] = np.where(is_weighed, np.maximum(0, 1 - claimed[face] - weighed), no_identity[face])
    # Each face of a pair rests on the other one, whatever their probabilities.
    rest = posteriors.weight.copy()
    rest[own] = np.where(is_pair[identity], 1, rest[own])
    between = np.zeros(candidates.identity_count, np.float32)
    between[at] = similarity
    to_rest = posteriors.similarity.copy()
    to_rest[own] = np.where(is_pair[identity], between[identity], to_rest[own])
    return replace(
        posteriors,
        probability=probability.astype(np.float32),
        no_identity=no_identity.astype(np.float32),
        similarity=to_rest,
        weight=rest,
    )


def _sum_others(candidates: LabelCandidates, posteriors: LabelPosteriors, count: int) -> Float64:
    """Sum the probabilities (n,) that a face belongs to another identity than its label's."""
    others = ~candidates.is_own
    sums = np.bincount(candidates.face[others], posteriors.probability[others], count)
    return np.asarray(sums, np.float64)


def _sum_part(faces: FaceVectors, face: Int64, identity: Int64, chosen: Bool, identity_count: int) -> IdentityCentres:
    """Sum the chosen faces of each identity."""
    pairs = LabelCandidates(face, identity, np.ones(len(face), bool), identity_count)
    return IdentityCentres.from_shares(faces, pairs, chosen.astype(np.float32))


def _fit_parts(
    faces: FaceVectors, candidates: LabelCandidates, part: Int64, posteriors: LabelPosteriors, threshold: float
) -> tuple[Normal, Normal]:
    """Fit the distribution of faces to the rest of their part, which no second person widens, and take strangers'."""
    is_core = candidates.is_own & (part[candidates.face] == 0)
    share = is_core.astype(np.float32)
    centres = IdentityCentres.from_shares(faces, candidates, share)
    similarity, weight = centres.compute_fit(faces, candidates.face, candidates.identity, share)
    return _fit_distributions(_fit_normal(similarity, weight, share), posteriors.impostor, threshold)


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
