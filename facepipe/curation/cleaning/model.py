"""Who each face is, as probabilities: expectation maximisation over given labels, neighbours' labels, and nobody.

A face's similarity to an identity is drawn from one normal distribution where it belongs to it, from another where it
does not; both, and the shares of swapped labels and of faces that belong to nobody, are estimated from the corpus
itself. The variance falls with the number of faces an identity rests on. Responsibilities weight the identities'
centres, so that every round centres them anew (Dempster, Laird, Rubin, 1977; label noise as in Natarajan et al., NIPS
2013).
"""

from dataclasses import dataclass, field

import numpy as np

from facepipe.curation.cleaning.evidence import Candidates, Centres, Faces
from facepipe.types import Float32, Int64

_BINS = np.array([0.3, 1.5, 2.5, 4.5, 8.5, 16.5, np.inf])
LEAST = 0.3  # faces an identity must rest on to say anything
_FEW = 8.0  # faces below which a distribution is not estimated
_STRANGERS = 200_000  # pairs of a face and an identity that is not its own, from which the impostors' is
_FOR, _AGAINST = 20.0, 6.0  # bounds of a log likelihood ratio: one face in 400 lies as far off as you like (pose, blur)
_ROUNDS, _DAMPED, _SETTLED = 40, 8, 0.005
_SWAPPED, _NOBODY = 0.15, 0.05  # where the estimate begins; a corpus of a few faces does not move it far


@dataclass(frozen=True)
class Normal:
    """A normal distribution whose variance is fixed + each / weight."""

    mean: float
    fixed: float
    each: float

    def log(self, x: Float32, weight: Float32) -> Float32:
        """Log density (m,), less a constant."""
        variance = self.fixed + self.each / np.maximum(weight, LEAST)
        return np.asarray(-0.5 * (x - self.mean) ** 2 / variance - 0.5 * np.log(variance), np.float32)


@dataclass
class Belief:
    """What is believed of n labelled faces with m candidates.

    share (m,): probability that the face belongs to the identity; nobody (n,): to none of its candidates;
    similarity, weight (m,): to the rest of the identity, and how many faces that rests on
    """

    share: Float32
    nobody: Float32
    similarity: Float32
    weight: Float32
    genuine: Normal
    impostor: Normal
    swapped: float
    lost: float
    rounds: list[dict[str, float]] = field(default_factory=list)


def believe(faces: Faces, pool: Candidates, prior: Float32, start: Float32, threshold: float, seed: int = 0) -> Belief:
    """Estimate from n faces and their candidates.

    prior (n,): how likely the label is meant for this face at all (photos with several faces have one label);
    start (m,): shares to begin with; threshold: similarity at which two faces are as likely one person as two, used
    where the corpus is too small or too uniform to show what strangers look like.
    """
    strangers = _strangers(pool, len(faces.density), seed)
    share, swapped, lost = start.astype(np.float32), _SWAPPED, _NOBODY
    rounds: list[dict[str, float]] = []
    for round_ in range(_ROUNDS):
        centres = Centres.of(faces, pool, share)
        similarity, weight = centres.fit(faces, pool.face, pool.identity, share)
        other, rest = centres.fit(faces, *strangers, np.zeros(len(strangers[0]), np.float32))
        genuine, impostor = _distributions((similarity, weight, share), (other, rest), threshold)
        ratio = log_ratio(genuine, impostor, similarity, weight)
        before = share
        share, nobody = _posterior(pool, ratio, prior, swapped, lost)
        if round_ >= _DAMPED:  # two faces that pull each other's identities to and fro
            share = np.asarray((share + before) / 2, np.float32)
        held = float(share[pool.own].sum()) / max(1, int(pool.own.sum()))
        expected = float(prior[pool.face[pool.own]].mean()) if pool.own.any() else 1.0
        lost = (
            float(np.clip(nobody[pool.face[pool.own]].mean() - (1 - expected), 1e-3, 0.5)) if pool.own.any() else lost
        )
        swapped = float(np.clip(expected - held - lost, 1e-3, 0.9))
        moved = float(np.abs(share - before).max(initial=0))
        rounds.append({"swapped": swapped, "nobody": lost, "moved": moved})
        if moved < _SETTLED:
            break
    return Belief(share, nobody, similarity, weight, genuine, impostor, swapped, lost, rounds)


def log_ratio(genuine: Normal, impostor: Normal, similarity: Float32, weight: Float32) -> Float32:
    """(m,) log likelihood ratio of belonging against not; 0 where an identity rests on nothing.

    Above the mean of those who belong a face cannot become less likely: the ratio stays at its value there.
    """
    capped = np.minimum(similarity, np.float32(genuine.mean))
    ratio = genuine.log(capped, weight) - impostor.log(capped, weight)
    return np.where(weight >= LEAST, np.clip(ratio, -_AGAINST, _FOR), 0).astype(np.float32)


def _posterior(
    pool: Candidates, ratio: Float32, prior: Float32, swapped: float, lost: float
) -> tuple[Float32, Float32]:
    """(share (m,) of candidates, share (n,) of nobody)."""
    own = (1 - swapped - lost) * prior[pool.face]
    other = np.full(len(pool), swapped / max(1, pool.count - 1))
    likely = np.where(pool.own, own, other) * np.exp(ratio.astype(np.float64))
    nobody = lost + (1 - swapped - lost) * (1 - prior)
    total = nobody + np.bincount(pool.face, likely, len(prior))
    return (likely / total[pool.face]).astype(np.float32), (nobody / total).astype(np.float32)


def _strangers(pool: Candidates, count: int, seed: int) -> tuple[Int64, Int64]:
    """Random (faces (s,), identities (s,)) that are no candidates."""
    rng = np.random.default_rng(seed)
    if pool.count < 2 or not len(pool):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    labelled = np.unique(pool.face)
    many = min(_STRANGERS, 4 * len(labelled) * pool.count)
    faces = rng.choice(labelled, many)
    # Identities are drawn as often as they have labels, so that they rest on as many faces as the candidates do.
    names = rng.choice(pool.identity[pool.own], many)
    stranger = ~np.isin(faces * pool.count + names, pool.face * pool.count + pool.identity)
    return faces[stranger], names[stranger]


def _distributions(
    known: tuple[Float32, Float32, Float32], strangers: tuple[Float32, Float32], threshold: float
) -> tuple[Normal, Normal]:
    genuine = _normal(*known)
    impostor = _normal(strangers[0], strangers[1], np.ones(len(strangers[0]), np.float32))
    if genuine is None:  # nobody has two faces: what lies as far above the threshold as strangers lie below it
        spread = abs(threshold - impostor.mean) if impostor else 0.05
        genuine = Normal(threshold + spread / 2, (spread / 4) ** 2, 0.0)
    if impostor is None or impostor.mean >= genuine.mean:
        impostor = Normal(2 * threshold - genuine.mean, genuine.fixed, genuine.each)
    return genuine, impostor


def _normal(x: Float32, weight: Float32, share: Float32) -> Normal | None:
    """Mean, and variance as a line in 1 / weight, of values that count by their share."""
    usable = (weight >= LEAST) & (share > 0.01)
    x, weight, share = x[usable].astype(np.float64), weight[usable], share[usable].astype(np.float64)
    if share.sum() < _FEW:
        return None
    mean = float((x * share).sum() / share.sum())
    place = np.digitize(weight, _BINS)
    mass = np.bincount(place, share, len(_BINS) + 1)
    solid = mass >= _FEW
    inverse = np.bincount(place, share / weight, len(_BINS) + 1)[solid] / mass[solid]
    variance = np.bincount(place, share * (x - mean) ** 2, len(_BINS) + 1)[solid] / mass[solid]
    overall = float((share * (x - mean) ** 2).sum() / share.sum())
    if solid.sum() < 2:
        return Normal(mean, max(overall, 1e-6), 0.0)
    each, fixed = np.polyfit(inverse, variance, 1, w=np.sqrt(mass[solid]))
    each = float(np.clip(each, 0, None))
    fixed = float(np.average(variance - each * inverse, weights=mass[solid]))
    return Normal(mean, max(fixed, 0.1 * overall, 1e-6), each)
