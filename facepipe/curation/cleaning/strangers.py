"""How similar strangers are: sampled pairs, and all pairs of a face and another identity that are near.

A sample of pairs shows the body of the distribution, and little of its tail: among thousands of identities many persons
have a look-alike, and a pair of them is rarely drawn. The candidates of faces with right labels hold all near pairs
there are, so that they show the tail itself.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from facepipe.curation.cleaning.distributions import MIN_WEIGHT, Normal
from facepipe.curation.cleaning.evidence import LabelCandidates
from facepipe.types import Float32, Float64, Int64

_MAX_STRANGERS = 200_000  # sampled pairs of a face and another identity, for the distribution of impostors
# The tail of strangers: bins per standard deviation, begin of the fit, fewest samples behind its end, and in all.
_TAIL_STEP = 0.1
_TAIL_BEGIN = 0.0
_TAIL_END_COUNT = 30
_MIN_TAIL_SAMPLES = 5000
_MIN_TAIL_BINS = 10
_TAIL_DEGREE = 3
_TAIL_REACH = 60.0  # standard deviations
_MIN_SHARE_ABOVE = 1e-300
RIGHT = 0.9
"""Probability of a label from which the face shows how similar strangers are."""

# Near pairs behind the end of the fit, fewest bins, and the least slope of the logarithm behind it.
_NEAR_END_COUNT = 100
_MIN_NEAR_BINS = 3
_MIN_NEAR_SLOPE = 3.0


@dataclass(frozen=True)
class StrangerTail:
    """The shape of the distribution of strangers, in standard deviations from its mean, above the mean.

    Attributes:
        log_density: Logarithm of the density in bins of 0.1 from 0 on, falling.
    """

    log_density: Float64

    @classmethod
    def fit(
        cls, similarity: Float32, weight: Float32, normal: Normal, share: Float32 | None = None
    ) -> "StrangerTail | None":
        """Fit a falling cubic to the logarithms of the counts of sampled strangers.

        Args:
            similarity: mean similarity of faces to identities, (m,).
            weight: number of faces that each rests on, (m,).
            normal: mean and variance of strangers.
            share: probability that the two are strangers, (m,). By default they all are.

        Returns:
            None if they are too few. Then the normal distribution has to do.
        """
        deviation = normal.standardise(similarity, weight)
        bins = np.arange(_TAIL_BEGIN, _TAIL_REACH + _TAIL_STEP, _TAIL_STEP)
        counts, _ = np.histogram(deviation, bins, weights=share)
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
        total = float(len(similarity) if share is None else share.sum())
        log_density = fitted - np.log(total * _TAIL_STEP)
        return cls(log_density)

    @cached_property
    def log_share_above(self) -> Float64:
        """Logarithm of the share of strangers above the begin of each bin."""
        share = np.exp(self.log_density)[::-1].cumsum()[::-1] * _TAIL_STEP
        return np.asarray(np.log(np.maximum(share, _MIN_SHARE_ABOVE)))

    def compute_share_above(self, deviation: Float32) -> Float64:
        """Compute the share (m,) of strangers above deviations (m,)."""
        at = np.clip(deviation / _TAIL_STEP, 0, len(self.log_density) - 1)
        return np.asarray(np.exp(np.interp(at, np.arange(len(self.log_density)), self.log_share_above)))

    def find_deviation(self, share: Float64) -> Float64:
        """Find the deviations (m,) above which a share (m,) of strangers lies."""
        # The share falls with the deviation; np.interp wants it rising.
        at = np.interp(-np.log(share), -self.log_share_above, np.arange(len(self.log_density)))
        return np.asarray(at * _TAIL_STEP)

    def compute_log_density(self, deviation: Float32) -> Float32:
        """Compute the log density (m,) at deviations (m,) above 0."""
        at = np.clip(deviation / _TAIL_STEP, 0, len(self.log_density) - 1)
        return np.asarray(np.interp(at, np.arange(len(self.log_density)), self.log_density), np.float32)


@dataclass(frozen=True)
class NearStrangers:
    """All pairs of faces with right labels and other identities that are similar enough to be candidates.

    Attributes:
        counts: Pairs by deviation in the bins of a tail.
        weights: The same, each pair weighted by the size of its identity.
        total: The weight of all pairs that there are, near or not.
        first: First bin from which on no pair is missing.
    """

    counts: Float64
    weights: Float64
    total: float
    first: int

    @classmethod
    def count(
        cls,
        candidates: LabelCandidates,
        probability: Float32,
        similarity: Float32,
        weight: Float32,
        normal: Normal,
        threshold: float,
        *,
        face_count: int,
    ) -> "NearStrangers | None":
        """Count the near strangers of faces with right labels.

        Args:
            candidates: m pairs of a face and an identity; none is missing that is similar enough.
            probability: probability of each candidate, (m,).
            similarity: mean similarity of each, (m,).
            weight: number of faces that this rests on, (m,).
            normal: mean and variance of strangers.
            threshold: similarity from which no pair is missing: such a face has an edge to one of the identity's.
            face_count: number of faces.

        Returns:
            None if no label is known to be right.
        """
        bins = np.arange(_TAIL_BEGIN, _TAIL_REACH + _TAIL_STEP, _TAIL_STEP)
        counts = np.zeros(len(bins) - 1, np.int64)
        weights = np.zeros(len(bins) - 1, np.int64)
        right_count = 0
        namesakes = 0
        size = candidates.label_counts
        for block in candidates.iterate_blocks(face_count):
            pairs = block.candidates
            fit = similarity[block.pairs]
            rest = weight[block.pairs]
            right = np.flatnonzero(pairs.is_own & (probability[block.pairs] > RIGHT) & (rest >= 1))
            right_count += len(right)
            namesakes += int(size[pairs.identity[right]].sum())
            is_right = np.zeros(block.faces.stop - block.faces.start, bool)
            is_right[pairs.face[right]] = True
            chosen = np.flatnonzero(is_right[pairs.face] & ~pairs.is_own & (rest >= MIN_WEIGHT) & (fit >= threshold))
            deviation = normal.standardise(fit[chosen], rest[chosen])
            counts += np.histogram(deviation, bins)[0]
            weights += np.histogram(deviation, bins, weights=size[pairs.identity[chosen]])[0]
        total = right_count * float(size.sum()) - float(namesakes)
        if total <= 0:
            return None
        edge = (threshold - normal.mean) / np.sqrt(normal.fixed_variance)
        first = max(0, int(np.ceil(edge / _TAIL_STEP)))
        return cls(counts.astype(np.float64), weights.astype(np.float64), total, first)

    def continue_tail(self, log_density: Float64) -> Float64:
        """Raise the log density of a tail to what the near strangers show, from where none is missing."""
        above = self.counts[::-1].cumsum()[::-1]
        used = np.flatnonzero((above >= _NEAR_END_COUNT) & (self.counts > 0))
        used = used[used >= self.first]
        if len(used) < _MIN_NEAR_BINS:
            return log_density
        position = used * _TAIL_STEP
        measured = np.log(self.weights[used] / (self.total * _TAIL_STEP))
        degree = min(_TAIL_DEGREE, 1 + len(used) // 6)
        curve = np.polynomial.Polynomial.fit(position, measured, degree, w=np.sqrt(self.counts[used]))
        bins = np.arange(len(log_density)) * _TAIL_STEP
        joined = log_density.copy()
        last = int(used[-1])
        inside = np.arange(self.first, last + 1)
        joined[inside] = curve(bins[inside])
        slope = min(float(curve.deriv()(bins[last])), -_MIN_NEAR_SLOPE)
        beyond = np.arange(last + 1, len(bins))
        joined[beyond] = joined[last] + slope * (bins[beyond] - bins[last])
        # What is sampled may be heavier, where few pairs are near.
        return np.asarray(np.maximum.accumulate(np.maximum(joined, log_density)[::-1])[::-1], np.float64)


@dataclass(frozen=True)
class StrangerPairs:
    """Sampled pairs of a face and an identity that is not its label's.

    Attributes:
        face: Position of the face, (s,).
        identity: Number of the identity, (s,).
        candidate: Position of the pair among the candidates, (s,), -1 if it is none.
    """

    face: Int64
    identity: Int64
    candidate: Int64

    @classmethod
    def sample(cls, candidates: LabelCandidates, seed: int) -> "StrangerPairs":
        """Sample pairs. There are none if there is one identity only."""
        rng = np.random.default_rng(seed)
        nothing = np.empty(0, np.int64)
        if candidates.identity_count < 2 or not len(candidates):
            return cls(nothing, nothing, nothing)
        # The first pair of each face.
        first = candidates.select(lambda block: np.diff(block.candidates.face, prepend=-1) > 0)
        own = candidates.own
        size = min(_MAX_STRANGERS, 4 * len(first) * candidates.identity_count)
        face = candidates.face[first[rng.choice(len(first), size)]]
        # Identities are drawn as often as they have labels, so that they rest on as many faces as the candidates do.
        identity = candidates.identity[own[rng.choice(len(own), size)]]
        candidate = candidates.find(face, identity)
        is_own = (candidate >= 0) & candidates.is_own[candidate]
        return cls(face[~is_own], identity[~is_own], candidate[~is_own])

    def compute_share(self, probability: Float32, *, is_known: bool) -> Float32:
        """Compute how likely the pairs are strangers, (s,).

        Args:
            probability: probability of each candidate, (m,).
            is_known: whether the probabilities can be trusted. If not, candidates are left out.
        """
        is_candidate = self.candidate >= 0
        stranger = 1 - probability[self.candidate] if is_known else np.float32(0)
        return np.where(is_candidate, stranger, np.float32(1)).astype(np.float32)
