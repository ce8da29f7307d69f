"""Find identities that a doubtful face may belong to although no edge of the graph leads there.

A face may be less similar than the threshold to every single face of its person, and still fit the mean of them: a mean
has less noise than a face. So doubtful faces are compared with the means of all identities. The nearest of these also
show how dense the space around a face is: where strangers reach far, a similarity says less.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from facepipe.curation.cleaning.distributions import MIN_WEIGHT
from facepipe.curation.cleaning.evidence import FaceVectors, IdentityCentres, LabelCandidates
from facepipe.curation.cleaning.model import (
    LabelPosteriors,
    NoiseRates,
    compute_log_ratio,
    estimate_label_posteriors,
)
from facepipe.nearest.faiss_engine import faiss
from facepipe.storage.mapped import TemporaryColumn, make_temporary_array
from facepipe.types import Bool, Float32, Int64

_DOUBTFUL = 0.9  # probability of the own identity below which a face is compared with all identities
_NEAREST = 8  # identities per face
_MIN_ODDS = 1e-3  # of belonging to an identity, against belonging to none, below which it is no candidate
_USUAL = 4.0  # strangers as usual that are added to those counted, because few of them say little
_MIN_DEVIATION = 2.0  # standard deviations: among few identities the nearest do not show how far strangers reach
_MAX_SPREAD = 1.5
_MAX_COUNTED_WEIGHT = 32  # identities of more faces are counted as if they had so many
_ROWS = 1 << 14  # faces compared at a time
# Above so many products the means are searched by cells: 20,000,000,000 take some 40 s of one core.
_MAX_PRODUCTS = 20_000_000_000
_VISITED_CELLS = 64
_LEAST_PRODUCT = -2.0
_SEED = 0
_FIRST_ROUNDS = 8  # of the estimation with the candidates that the graph gives


Settle = Callable[[LabelCandidates], LabelCandidates]


@dataclass(frozen=True)
class IdentityMeans:
    """Means of the identities that rest on faces enough.

    Attributes:
        identity: Number of the identity, (k,), rising.
        vectors: Mean vectors, (k, d + 1); the last column is minus half of the mean density. The inner product of a
            face with a 1 behind it and such a row ranks identities by similarity.
        weight: Number of faces that each rests on, (k,).
        size: Number of faces that have the name of each, (k,).
    """

    identity: Int64
    vectors: Float32
    weight: Float32
    size: Int64

    @classmethod
    def compute(cls, faces: FaceVectors, candidates: LabelCandidates, probability: Float32) -> "IdentityMeans":
        """Compute the means over the faces that bear each name.

        Args:
            faces: n faces.
            candidates: m pairs of a face and an identity.
            probability: probability of each candidate, (m,).
        """
        centres = IdentityCentres.from_shares(faces, candidates, candidates.keep_labels(probability))
        identity = np.flatnonzero(centres.weight >= MIN_WEIGHT)
        weight = centres.weight[identity]
        vectors = make_temporary_array(np.float32, (len(identity), centres.sums.shape[1] + 1))
        for at in range(0, len(identity), _ROWS):
            block = slice(at, at + _ROWS)
            rows = identity[block]
            sums = np.concatenate([centres.sums[rows], -centres.crowd[rows, None] / 2], axis=1)
            vectors[block] = sums / weight[block, None]
        return cls(identity, vectors, weight, candidates.label_counts[identity])

    def build_search(self, queries: int) -> Any:
        """Build what finds the nearest means of so many queries among those of some cells; None if all are compared."""
        dimension = self.vectors.shape[1]
        if queries * len(self.vectors) <= _MAX_PRODUCTS:
            return None
        cells = int(4 * np.sqrt(len(self.vectors)))
        search = faiss.IndexIVFFlat(faiss.IndexFlatIP(dimension), dimension, cells, faiss.METRIC_INNER_PRODUCT)
        # By inner products long centres would draw all means.
        search.cp.spherical = True
        search.cp.seed = _SEED
        search.nprobe = _VISITED_CELLS
        search.train(self.vectors)
        search.add(self.vectors)
        return search

    def find_nearest(self, search: Any, faces: FaceVectors, face: Int64, count: int) -> tuple[Int64, Float32]:
        """Find the means that faces (m,) are most similar to.

        Returns:
            Positions (m, count) among the means, -1 if there are fewer, and the similarities (m, count).
        """
        vectors = faces.vectors[face]
        queries = np.concatenate([vectors, np.ones((len(face), 1), np.float32)], axis=1)
        queries = np.ascontiguousarray(queries)
        if search is None:
            # Straight from the file that the means lie in.
            product, nearest = faiss.knn(queries, self.vectors, count, metric=faiss.METRIC_INNER_PRODUCT)
        else:
            product, nearest = search.search(queries, count)
        # Where means are missing faiss gives the smallest number there is.
        product = np.maximum(product, _LEAST_PRODUCT)
        return nearest, np.asarray(product - faces.density[face][:, None] / 2, np.float32)


def estimate_beyond_graph(
    faces: FaceVectors,
    candidates: LabelCandidates,
    prior: Float32,
    start: Float32,
    *,
    threshold: float,
    seed: int = 0,
    settle: Settle = lambda candidates: candidates,
) -> tuple[LabelCandidates, LabelPosteriors]:
    """Estimate to which identity each face belongs, among those that the graph gives and those with the nearest means.

    Args:
        faces: n faces.
        candidates: m pairs of a face and an identity that the graph gives.
        prior: probability that the label is meant for this face at all, (n,).
        start: probabilities to start with, (m,).
        threshold: similarity at which two faces are as likely one person as two.
        seed: seed of the sample of strangers.
        settle: marks what people have decided on candidates, and drops some of others than the own labels.

    Returns:
        All candidates, and what was estimated for them.
    """
    first = estimate_label_posteriors(
        faces, candidates, prior, start, threshold=threshold, seed=seed, max_rounds=_FIRST_ROUNDS
    )
    near = add_near_identities(faces, candidates, first)
    settled = settle(near.candidates)
    probability = near.probability
    if settled is not near.candidates:
        probability = probability[near.candidates.find(settled.face, settled.identity)]
    posteriors = estimate_label_posteriors(
        faces,
        settled,
        prior,
        probability,
        threshold=threshold,
        seed=seed,
        rates=first.rates,
        spread=near.spread,
    )
    return settled, posteriors


@dataclass(frozen=True)
class NearIdentities:
    """Candidates with those that the means gave.

    Attributes:
        candidates: p pairs of a face and an identity.
        probability: Their probabilities so far, (p,), 0 for new ones.
        spread: How many times as far as usual the strangers of each face reach, (n,). 1 if it is not known.
    """

    candidates: LabelCandidates
    probability: Float32
    spread: Float32


def add_near_identities(faces: FaceVectors, candidates: LabelCandidates, posteriors: LabelPosteriors) -> NearIdentities:
    """Add the identities whose means are nearest to doubtful faces to their candidates.

    Args:
        faces: n faces.
        candidates: m pairs of a face and an identity.
        posteriors: what was estimated for them.
    """
    spread = np.ones(len(faces.density), np.float32)
    means = IdentityMeans.compute(faces, candidates, posteriors.probability)
    rates = posteriors.rates
    if rates is None or len(means.identity) < 2:
        return NearIdentities(candidates, posteriors.probability, spread)
    # Right labels without a neighbour show what share of the identities the means do not find either.
    is_near = _copy_near(candidates)
    asked = candidates.select(
        lambda block: (
            block.candidates.is_own & ((posteriors.probability[block.pairs] < _DOUBTFUL) | ~is_near[block.pairs])
        )
    )
    search = means.build_search(len(asked))
    most = len(asked) * (_NEAREST + 1)
    new_face = TemporaryColumn(np.int64, most)
    new_identity = TemporaryColumn(np.int64, most)
    for at in range(0, len(asked), _ROWS):
        own = asked[at : at + _ROWS]
        face = candidates.face[own]
        # One more than wanted, because the own identity may be among them.
        nearest, similarity = means.find_nearest(search, faces, face, min(_NEAREST + 1, len(means.identity)))
        is_other = (nearest >= 0) & (means.identity[nearest] != candidates.identity[own][:, None])
        is_near[own] |= _would_be_found(posteriors.similarity[own], similarity, is_other)
        spread[face] = _measure_spread(posteriors, means, similarity, is_other)
        odds = _compute_odds(posteriors, rates, means, face, nearest, similarity)
        row, column = np.nonzero(is_other & (odds >= _MIN_ODDS))
        new_face.append(face[row])
        new_identity.append(means.identity[nearest[row, column]])
    near = _Pairs(new_face.array, new_identity.array)
    extended, probability = _extend(candidates, posteriors.probability, is_near, near, face_count=len(faces.density))
    return NearIdentities(extended, probability, spread)


def _copy_near(candidates: LabelCandidates) -> Bool:
    """Copy which candidates (m,) are near."""
    is_near = make_temporary_array(np.bool_, (len(candidates),))
    is_near[:] = True if candidates.is_near is None else candidates.is_near
    return is_near


@dataclass(frozen=True)
class _Pairs:
    """Pairs of a face and an identity."""

    face: Int64
    identity: Int64


def _would_be_found(own: Float32, others: Float32, is_other: Bool) -> Bool:
    """Say whether faces (m,) would be found by the mean of their own identity if they did not bear its name.

    Args:
        own: similarity to the rest of the own identity, (m,).
        others: similarities to the nearest means, (m, k).
        is_other: whether these are of other identities, (m, k).
    """
    ranked = -np.sort(-np.where(is_other, others, -np.inf), axis=1)
    if ranked.shape[1] < _NEAREST:
        return np.ones(len(own), bool)
    return np.asarray(own > ranked[:, _NEAREST - 1], bool)


def _measure_spread(posteriors: LabelPosteriors, means: IdentityMeans, similarity: Float32, is_other: Bool) -> Float32:
    """Measure how far the strangers of faces (m,) reach, by the similarity of the last of the nearest means.

    Returns:
        How many times as far as usual they reach, (m,).
    """
    ranked = -np.sort(-np.where(is_other, similarity, -np.inf), axis=1)
    if posteriors.tail is None or ranked.shape[1] < _NEAREST:
        return np.ones(len(similarity), np.float32)
    last = ranked[:, _NEAREST - 1]
    # Means that rest on as many faces are counted together.
    weights, counts = np.unique(np.clip(np.rint(means.weight), 1, _MAX_COUNTED_WEIGHT), return_counts=True)
    expected = np.zeros(len(last))
    for weight, count in zip(weights, counts, strict=True):
        deviation = posteriors.impostor.standardise(last, np.full(len(last), weight, np.float32))
        expected += count * posteriors.tail.compute_share_above(np.maximum(deviation, 0))
    # The first of the nearest may be who the face is. The tail says how far as many strangers usually reach.
    total = len(means.identity) + _USUAL
    usual = float(posteriors.tail.find_deviation(np.array([(_NEAREST - 1 + _USUAL) / total]))[0])
    if usual < _MIN_DEVIATION:
        return np.ones(len(similarity), np.float32)
    reached = posteriors.tail.find_deviation((expected + _USUAL) / total)
    return np.clip(reached / usual, 1 / _MAX_SPREAD, _MAX_SPREAD).astype(np.float32)


def _compute_odds(
    posteriors: LabelPosteriors,
    rates: NoiseRates,
    means: IdentityMeans,
    face: Int64,
    nearest: Int64,
    similarity: Float32,
) -> Float32:
    """Compute the odds (m, k) of belonging to one of the nearest identities against belonging to none."""
    weight = means.weight[nearest]
    ratio = compute_log_ratio(
        posteriors.genuine, posteriors.impostor, similarity.ravel(), weight.ravel(), posteriors.tail
    )
    size_class = rates.size_class[face]
    share = rates.swapped[size_class][:, None] * means.size[nearest] / max(1, int(means.size.sum()))
    odds = share * np.exp(ratio.astype(np.float64)).reshape(nearest.shape) / rates.unknown[size_class][:, None]
    return odds.astype(np.float32)


def _extend(
    candidates: LabelCandidates, probability: Float32, is_near: Bool, near: _Pairs, *, face_count: int
) -> tuple[LabelCandidates, Float32]:
    """Add pairs to the candidates, sorted by face and identity, each once. The pairs are sorted by face."""
    stride = max(1, candidates.identity_count)
    most = len(candidates) + len(near.face)
    face = TemporaryColumn(np.int64, most)
    identity = TemporaryColumn(np.int64, most)
    is_own = TemporaryColumn(np.bool_, most)
    all_near = TemporaryColumn(np.bool_, most)
    extended = TemporaryColumn(np.float32, most)
    for block in candidates.iterate_blocks(face_count):
        keys = block.candidates.face * stride + block.candidates.identity
        first = block.faces.start
        added = slice(*np.searchsorted(near.face, (first, block.faces.stop)).tolist())
        all_keys = np.union1d(keys, (near.face[added] - first) * stride + near.identity[added])
        at = np.searchsorted(all_keys, keys)
        columns = {
            extended: (np.float32(0), probability[block.pairs]),
            is_own: (False, block.candidates.is_own),
            all_near: (True, is_near[block.pairs]),
        }
        for column, (default, values) in columns.items():
            part = np.full(len(all_keys), default)
            part[at] = values
            column.append(part)
        face.append(first + all_keys // stride)
        identity.append(all_keys % stride)
    united = LabelCandidates(face.array, identity.array, is_own.array, candidates.identity_count, all_near.array)
    return united, extended.array
