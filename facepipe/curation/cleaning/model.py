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

from facepipe.curation.cleaning.distributions import MIN_WEIGHT, Normal, add_to_bins, fit_distributions, fit_normal
from facepipe.curation.cleaning.evidence import FaceBlock, FaceVectors, IdentityCentres, LabelCandidates
from facepipe.curation.cleaning.strangers import NearStrangers, StrangerPairs, StrangerTail
from facepipe.storage.mapped import TemporaryColumn, copy_column, make_temporary_array
from facepipe.types import Bool, Float32, Float64, Int8, Int64

_MIN_RIGHT = 8.0  # right labels below which it is not estimated how many have no neighbour
_TWO_FACES = 1.5  # an identity that rests on less has one face
# Bounds of the log likelihood ratio: about 1 in 1,000 genuine faces is an outlier as far off as you like (pose, blur).
_MAX_FOR = 30.0
_MAX_AGAINST = 7.0
# Rounds at most, rounds before damping begins, and the change of a probability that ends them.
_MAX_ROUNDS = 40
_UNDAMPED_ROUNDS = 3
_SETTLED_CHANGE = 0.01
_TRUSTED_ROUNDS = 3  # rounds before the probabilities tell which candidates are strangers
# Starting values of the two rates. A corpus of a few faces does not move them far.
_START_SWAPPED = 0.15
_START_UNKNOWN = 0.05
_MIN_RATE = 1e-3
_RATE_MASS = 20.0  # faces that the rate of all counts as, for the rate of identities of one size
_CLAIMED = 0.5  # probability of other identities above which a face is left out of its own one's parts
_SURE = 0.8  # probability from which a part bears the name without a person's look
_OPEN = 0.01
_LOG_ODDS_ONE_PERSON = 2.0  # that two parts of an identity are one person, before they are compared
_ROWS = 1 << 16  # candidates that are handled at a time
_LOG_ROOT = np.float32(0.5 * np.log(2 * np.pi))  # the constant of a normal log density


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
        swapped: Share of labels that are another identity's, of those that there is evidence on.
        unknown: Share of faces that belong to no identity, of those that there is evidence on.
        rounds: One entry per round.
        tail: Shape of the distribution of impostors; None if it is normal.
        rates: The shares, by the number of faces that have a label.
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
    tail: StrangerTail | None = None
    rates: "NoiseRates | None" = None

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
    max_rounds: int = _MAX_ROUNDS,
    rates: "NoiseRates | None" = None,
    spread: Float32 | None = None,
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
        max_rounds: rounds at most.
        rates: shares of wrong labels from an earlier estimation, whose probabilities are the start.
        spread: how many times as far as usual the strangers of each face reach, (n,). By default 1.
    """
    # Pairs of strangers show how similar faces are to identities that are not theirs.
    strangers = StrangerPairs.sample(candidates, seed)
    no_share = np.zeros(len(strangers.face), np.float32)
    current = _Probabilities.start(candidates, start, len(prior))
    # The probabilities of an earlier estimation tell from the first round which candidates are strangers.
    trusted_from = _TRUSTED_ROUNDS if rates is None else 0
    rates = rates or NoiseRates.start(candidates, len(prior))
    rounds: list[EstimationRound] = []
    for n in range(max_rounds):
        # Maximisation: centres and distributions from the current probabilities.
        labelled = candidates.keep_labels(current.probability, current.labelled)
        centres = IdentityCentres.from_shares(faces, candidates, labelled)
        similarity, weight = centres.compute_fit(faces, candidates.face, candidates.identity, labelled)
        stranger_similarity, stranger_weight = centres.compute_fit(faces, strangers.face, strangers.identity, no_share)
        is_stranger = strangers.compute_share(current.probability, is_known=n >= trusted_from)
        stranger_normal = fit_normal(stranger_similarity, stranger_weight, is_stranger)
        genuine, impostor = fit_distributions(
            fit_normal(similarity, weight, current.probability), stranger_normal, threshold
        )
        tail = None
        if stranger_normal is impostor:
            has_rest = (stranger_weight >= MIN_WEIGHT) & (is_stranger > 0)
            tail = StrangerTail.fit(
                stranger_similarity[has_rest], stranger_weight[has_rest], impostor, is_stranger[has_rest]
            )
        measured = None
        if tail is not None and n >= trusted_from:
            near = NearStrangers.count(
                candidates, current.probability, similarity, weight, impostor, threshold, face_count=len(prior)
            )
            measured = None if near is None else StrangerTail(near.continue_tail(tail.log_density))
        # Expectation: new probabilities, some faces at a time.
        change = 0.0
        for block in candidates.iterate_blocks(len(prior)):
            pairs = block.pairs
            reach = None if spread is None else spread[block.faces][block.candidates.face]
            fit = similarity[pairs]
            rest = weight[pairs]
            ratio = compute_log_ratio(genuine, impostor, fit, rest, tail, reach)
            if measured is not None:
                ratio = _weigh_alone(block.candidates, ratio, fit, rest, genuine, impostor, measured, reach)
            probability, no_identity = _compute_posteriors(
                block.candidates, ratio, rest, prior[block.faces], rates.select(block.faces), candidates.label_counts
            )
            moved = current.move(block, probability, no_identity, is_damped=n >= _UNDAMPED_ROUNDS)
            change = max(change, moved)
        rates = rates.update(candidates, current.probability, current.no_identity, weight, prior)
        rounds.append(EstimationRound(rates.overall_swapped, rates.overall_unknown, change))
        if change < _SETTLED_CHANGE:
            break
    return LabelPosteriors(
        probability=current.probability,
        no_identity=current.no_identity,
        similarity=similarity,
        weight=weight,
        genuine=genuine,
        impostor=impostor,
        swapped=rates.overall_swapped,
        unknown=rates.overall_unknown,
        rounds=rounds,
        tail=tail,
        rates=rates,
    )


@dataclass(frozen=True)
class _Probabilities:
    """Probabilities of n faces and m candidates, and how they move from round to round. They lie in temporary files.

    Attributes:
        probability: Probability that the face belongs to the identity, (m,).
        no_identity: Probability that the face belongs to none of its candidates, (n,).
        labelled: Room for the probabilities of the labels, (m,).
        step: By what share of a move each probability is changed, (m,).
        last_move: The last moves, (m,).
    """

    probability: Float32
    no_identity: Float32
    labelled: Float32
    step: Float32
    last_move: Float32

    @classmethod
    def start(cls, candidates: LabelCandidates, start: Float32, face_count: int) -> "_Probabilities":
        """Start with probabilities (m,)."""
        columns = [make_temporary_array(np.float32, (len(start),)) for _ in range(4)]
        no_identity = make_temporary_array(np.float32, (face_count,))
        current = cls(columns[0], no_identity, *columns[1:])
        for block in candidates.iterate_blocks(face_count):
            part = start[block.pairs].astype(np.float32)
            current.probability[block.pairs], _ = block.candidates.settle(part, no_identity[block.faces])
        current.step[:] = 1
        return current

    def move(self, block: FaceBlock, probability: Float32, no_identity: Float32, *, is_damped: bool) -> float:
        """Move to new probabilities of a block, and return the largest change of a candidate's.

        Two faces may pull each other's identities to and fro. With damping, what turns back moves half as far each
        time.
        """
        pairs = block.pairs
        before = self.probability[pairs].copy()
        if is_damped:
            move = probability - before
            step = self.step[pairs]
            step[move * self.last_move[pairs] < 0] /= 2
            self.last_move[pairs] = move
            probability = before + step * move
        self.probability[pairs] = probability
        self.no_identity[block.faces] = no_identity
        return float(np.abs(probability - before).max(initial=0))


@dataclass(frozen=True)
class NoiseRates:
    """How often labels are wrong, by how many faces have the label.

    The identities of one face, of 2 and 3, of 4 to 7 and so on have rates of their own: what is wrong with large
    identities says little of small ones. Classes of few faces follow the rate of all.

    Attributes:
        size_class: Class of each face's label, (n,).
        swapped: Share of labels that are another identity's, by class.
        unknown: Share of faces that belong to no identity, by class.
        overall_swapped: Share of labels that are another identity's, of all that there is evidence on.
        overall_unknown: Share of faces that belong to no identity, likewise.
        missed: Share of faces that have no neighbour in their own identity, so that it is no candidate.
    """

    size_class: Int8
    swapped: Float64
    unknown: Float64
    overall_swapped: float
    overall_unknown: float
    missed: float

    @classmethod
    def start(cls, candidates: LabelCandidates, face_count: int) -> "NoiseRates":
        """Return the rates before anything is known."""
        class_of_identity = np.log2(np.maximum(1, candidates.label_counts)).astype(np.int8)
        size_class = np.zeros(face_count, np.int8)
        for block in candidates.iterate_blocks(face_count):
            own = block.candidates.is_own
            size_class[block.faces][block.candidates.face[own]] = class_of_identity[block.candidates.identity[own]]
        class_count = int(size_class.max(initial=0)) + 1
        return cls(
            size_class=size_class,
            swapped=np.full(class_count, _START_SWAPPED),
            unknown=np.full(class_count, _START_UNKNOWN),
            overall_swapped=_START_SWAPPED,
            overall_unknown=_START_UNKNOWN,
            missed=0.0,
        )

    def update(
        self,
        candidates: LabelCandidates,
        probability: Float32,
        no_identity: Float32,
        weight: Float32,
        prior: Float32,
    ) -> "NoiseRates":
        """Return the rates that the probabilities of all candidates show.

        Args:
            candidates: m pairs of a face and an identity.
            probability: probability of each candidate, (m,).
            no_identity: probability that the face belongs to none of them, (n,).
            weight: number of faces that each candidate's similarity rests on, (m,).
            prior: probability that the label is meant for this face at all, (n,).
        """
        # There is evidence on labels whose identity has other faces.
        own = candidates.own
        with_rest = TemporaryColumn(np.int64, len(own))
        for at in range(0, len(own), _ROWS):
            pairs = own[at : at + _ROWS]
            with_rest.append(pairs[weight[pairs] >= MIN_WEIGHT])
        judged = with_rest.array if len(with_rest.array) else own
        if not len(judged):
            return self
        class_count = len(self.swapped)
        all_nobody = TemporaryColumn(np.float64, len(judged))
        all_swapped = TemporaryColumn(np.float64, len(judged))
        nobody_by_class = np.zeros(class_count)
        swapped_by_class = np.zeros(class_count)
        mass = np.zeros(class_count, np.int64)
        for at in range(0, len(judged), _ROWS):
            pairs = judged[at : at + _ROWS]
            face = candidates.face[pairs]
            correct = probability[pairs].astype(np.float64)
            # Who fits no candidate is nobody's, or of an identity that is none.
            classes = self.size_class[face]
            share = self.unknown[classes] / (self.unknown[classes] + self.swapped[classes] * self.missed)
            nobody = (no_identity[face] - (1.0 - prior[face])) * share
            swapped = prior[face] - correct - nobody
            all_nobody.append(nobody)
            all_swapped.append(swapped)
            nobody_by_class = add_to_bins(nobody_by_class, classes, nobody)
            swapped_by_class = add_to_bins(swapped_by_class, classes, swapped)
            mass += np.bincount(classes, minlength=class_count)
        overall_unknown = float(np.clip(all_nobody.array.mean(), _MIN_RATE, 0.5))
        overall_swapped = float(np.clip(all_swapped.array.mean(), _MIN_RATE, 0.9))
        # Faces of a class, and of all classes as if they were some faces more.
        by_class = nobody_by_class + _RATE_MASS * overall_unknown
        unknown = np.clip(by_class / (mass + _RATE_MASS), _MIN_RATE, 0.5)
        by_class = swapped_by_class + _RATE_MASS * overall_swapped
        swapped_rates = np.clip(by_class / (mass + _RATE_MASS), _MIN_RATE, 0.9)
        # Of labels that one face has, those are known to be swapped that fit another identity.
        elsewhere = TemporaryColumn(np.float32, len(own))
        for at in range(0, len(own), _ROWS):
            pairs = own[at : at + _ROWS]
            alone = pairs[self.size_class[candidates.face[pairs]] == 0]
            elsewhere.append(1.0 - probability[alone] - no_identity[candidates.face[alone]])
        unknown[0] = overall_unknown
        rate = (elsewhere.array.sum() + _RATE_MASS * overall_swapped) / (len(elsewhere.array) + _RATE_MASS)
        swapped_rates[0] = np.clip(rate, _MIN_RATE, 0.9)
        return replace(
            self,
            swapped=swapped_rates,
            unknown=unknown,
            overall_swapped=overall_swapped,
            overall_unknown=overall_unknown,
            missed=_estimate_missed(candidates, probability, weight),
        )

    def select(self, faces: slice) -> "NoiseRates":
        """Return the rates of some faces that follow each other."""
        return replace(self, size_class=self.size_class[faces])


def _estimate_missed(candidates: LabelCandidates, probability: Float32, weight: Float32) -> float:
    """Estimate the share of faces without a neighbour in their own identity, from right labels."""
    if candidates.is_near is None:
        return 0.0
    right = TemporaryColumn(np.float64, len(candidates.own))
    missed = TemporaryColumn(np.float64, len(candidates.own))
    for at in range(0, len(candidates.own), _ROWS):
        pairs = candidates.own[at : at + _ROWS]
        solid = pairs[weight[pairs] >= 1]
        right.append(probability[solid])
        missed.append(probability[solid[~candidates.is_near[solid]]])
    total = right.array.sum()
    if total < _MIN_RIGHT:
        return 0.0
    return float(missed.array.sum() / total)


def compute_log_ratio(
    genuine: Normal,
    impostor: Normal,
    similarity: Float32,
    weight: Float32,
    tail: StrangerTail | None = None,
    spread: Float32 | None = None,
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
        spread: how many times as far as usual the strangers of the face reach, (m,). By default 1.
    """
    capped = np.minimum(similarity, np.float32(genuine.mean))
    ratio = genuine.compute_log_density(capped, weight) - impostor.compute_log_density(capped, weight)
    if tail is not None:
        # Compare both with the normal density of strangers, which the ratio above holds without its constant.
        deviation = impostor.standardise(similarity, weight)
        above = deviation > 0
        log_genuine = genuine.compute_log_density(capped, weight) - _LOG_ROOT
        log_scale = 0.5 * np.log(impostor.compute_variance(weight))
        if spread is None:
            log_strangers = tail.compute_log_density(deviation)
        else:
            log_strangers = tail.compute_log_density(deviation / spread) - np.log(spread)
        ratio = np.where(above, log_genuine + log_scale - log_strangers, ratio)
    ratio = np.clip(ratio, -_MAX_AGAINST, _MAX_FOR)
    # An identity that rests on less than a face says as much less: without the face it would say nothing.
    weight = np.minimum(weight, 1)
    partial = np.log(np.maximum(weight * np.exp(ratio.astype(np.float64)) + (1 - weight), 1e-9))
    return np.where(weight >= 1, ratio, partial).astype(np.float32)


def _weigh_alone(
    candidates: LabelCandidates,
    ratio: Float32,
    similarity: Float32,
    weight: Float32,
    genuine: Normal,
    impostor: Normal,
    tail: StrangerTail,
    reach: Float32 | None,
) -> Float32:
    """Weigh the candidates of faces whose own label nothing can be compared with by how near strangers are.

    Nothing speaks against such a label but how well another identity fits, and many persons have a look-alike. A label
    that its own identity speaks against is somebody else's. Then the steeper tail that is sampled tells the names that
    come into question apart, which are not independent: who resembles one of two look-alikes resembles the other.

    Returns:
        The log likelihood ratios (m,).
    """
    own = np.flatnonzero(candidates.is_own & (weight < MIN_WEIGHT))
    is_alone = np.zeros(int(candidates.face.max(initial=-1)) + 1, bool)
    is_alone[candidates.face[own]] = True
    at = np.flatnonzero(is_alone[candidates.face] & ~candidates.is_own)
    weighed = ratio.copy()
    spread = None if reach is None else reach[at]
    weighed[at] = compute_log_ratio(genuine, impostor, similarity[at], weight[at], tail, spread)
    return weighed


def weigh_names(
    faces: FaceVectors,
    candidates: LabelCandidates,
    posteriors: LabelPosteriors,
    part: Int64,
    prior: Float32,
    *,
    threshold: float,
    pictures: Int64 | None = None,
    is_further_person: Bool | None = None,
) -> LabelPosteriors:
    """Weigh which part of an identity bears its name, where it falls into two parts that may be two persons.

    Faces of two persons under one name vouch for their own part each, so that the estimation finds both right. The
    name is the first part's with a probability that grows with its size: n1^2 / (n1^2 + n2^2). Faces that look like one
    picture count once. Further persons of the name count as the second part does.

    Args:
        faces: n faces.
        candidates: m pairs of a face and an identity.
        posteriors: what was estimated for them.
        part: part of each face within its identity, (n,), 0 is the largest, -1 for none.
        prior: probability that the label is meant for this face at all, (n,). Faces that share photo and label are left
            out.
        threshold: similarity at which two faces are as likely one person as two.
        pictures: number of pictures of the face's part, (n,). By default each face is a picture of its own.
        is_further_person: whether the face's part is a further person of the name, (n,). By default none is.
    """
    # All labels, whose columns lie in temporary files.
    own = candidates.own
    labels = candidates.take(own)
    claimed = _sum_others(candidates, posteriors, len(part))
    # Sums of the two largest parts, without faces that another identity claims.
    first = IdentityCentres.from_shares(faces, labels, _choose_part(labels, part, 0, claimed, prior))
    second = IdentityCentres.from_shares(faces, labels, _choose_part(labels, part, 1, claimed, prior))
    first_pictures = _limit_pictures(first, labels, part, 0, pictures)
    second_pictures = _limit_pictures(second, labels, part, 1, pictures)
    is_pair = (first_pictures == 1) & (second_pictures == 1)
    is_open = is_pair | ((second.weight >= 2) & (first.weight >= 1))
    if not is_open.any():
        return posteriors
    # How likely the parts are two persons, by the distributions of faces inside parts and of strangers.
    genuine, impostor = _fit_parts(faces, labels, part, posteriors, threshold)
    at = np.flatnonzero(is_open)
    size = np.stack([first.weight[at], second.weight[at]])
    product = np.einsum("nd,nd->n", first.sums[at], second.sums[at]) / (size[0] * size[1])
    similarity = product - (first.crowd[at] / size[0] + second.crowd[at] / size[1]) / 2
    weight = np.maximum(1, 2 * size[0] * size[1] / (size[0] + size[1]))
    ratio = compute_log_ratio(genuine, impostor, similarity.astype(np.float32), weight.astype(np.float32))
    apart = np.zeros(candidates.identity_count)
    apart[at] = 1 / (1 + np.exp(ratio.astype(np.float64) + _LOG_ODDS_ONE_PERSON))
    # From here on only the labels of these identities count.
    chosen = labels.select(lambda block: is_open[block.candidates.identity])
    own = own[chosen]
    face = labels.face[chosen]
    identity = labels.identity[chosen]
    is_unclaimed = (claimed[face] < _CLAIMED) & (prior[face] == 1)
    # Persons beyond the second one of a name may bear it too.
    is_third = np.zeros(len(part), bool) if is_further_person is None else is_further_person & (part > 1)
    is_third_own = is_third[face] & is_unclaimed
    third = _sum_squares(identity, part[face], is_third_own, candidates.identity_count, pictures, face)
    squares = np.stack([first_pictures[at], second_pictures[at]]) ** 2
    total = squares.sum(axis=0) + third[at]
    bears = np.ones(candidates.identity_count)
    bears[at] = squares[0] / total
    bears_second = np.zeros(candidates.identity_count)
    bears_second[at] = squares[1] / total
    # If the parts are one person, what was estimated holds, and a face of either part bears the name.
    before = posteriors.probability[own].astype(np.float64)
    is_first = part[face] == 0
    is_weighed = ((part[face] == 0) | (part[face] == 1)) & (prior[face] == 1)
    share = np.where(is_first, bears[identity], bears_second[identity]) * (1 - claimed[face])
    if_one = np.where(is_pair[identity], 1 - claimed[face], before)
    weighed = (1 - apart[identity]) * if_one + apart[identity] * share
    # A face of a further part that fits the person of the nearer part is as doubtful as they.
    is_further = (part[face] > 1) & (prior[face] == 1)
    is_near_first, ratio = _compare_parts(faces, face, identity, first, second, genuine=genuine, impostor=impostor)
    fits = 1 / (1 + np.exp(-ratio.astype(np.float64) - _LOG_ODDS_ONE_PERSON))
    share = np.where(is_near_first, bears[identity], bears_second[identity]) * (1 - claimed[face]) * fits
    # If it is one of another person of the name, it bears the name as likely as its part does.
    own_square = np.ones(len(face)) if pictures is None else pictures[face].astype(np.float64) ** 2
    total_of = np.ones(candidates.identity_count)
    total_of[at] = total
    share = np.where(is_third[face], own_square / total_of[identity] * (1 - claimed[face]), share)
    further = (1 - apart[identity]) * before + apart[identity] * share
    # Whoever finds out which part bears the name looks at the other faces too.
    is_undecided = (apart[identity] > _CLAIMED) & (bears[identity] < _SURE) & (claimed[face] < _CLAIMED)
    further = np.where(is_undecided, np.maximum(further, 1 - _SURE + _OPEN), further)
    weighed = np.where(is_further, further, weighed)
    is_weighed |= is_further
    probability = copy_column(posteriors.probability)
    no_identity = copy_column(posteriors.no_identity)
    probability[own] = np.where(is_weighed, weighed, before)
    no_identity[face] = np.where(is_weighed, np.maximum(0, 1 - claimed[face] - weighed), no_identity[face])
    # Each face of a pair rests on the other one, whatever their probabilities.
    rest = copy_column(posteriors.weight)
    rest[own] = np.where(is_pair[identity], 1, rest[own])
    between = np.zeros(candidates.identity_count, np.float32)
    between[at] = similarity
    to_rest = copy_column(posteriors.similarity)
    to_rest[own] = np.where(is_pair[identity], between[identity], to_rest[own])
    settled, nobody = candidates.settle(probability, no_identity)
    return replace(
        posteriors,
        probability=settled,
        no_identity=nobody,
        similarity=to_rest,
        weight=rest,
    )


def _choose_part(labels: LabelCandidates, part: Int64, number: int, claimed: Float64, prior: Float32) -> Float32:
    """Choose the labels of faces of a part that no other identity claims: 1 for these, else 0, (l,)."""
    share = make_temporary_array(np.float32, (len(labels),))
    for at in range(0, len(labels), _ROWS):
        face = labels.face[at : at + _ROWS]
        share[at : at + _ROWS] = (part[face] == number) & (claimed[face] < _CLAIMED) & (prior[face] == 1)
    return share


def _limit_pictures(
    sums: IdentityCentres, labels: LabelCandidates, part: Int64, number: int, pictures: Int64 | None
) -> Float64:
    """Count the pictures (k,) of a part of each identity: at most as many as there are faces in its sums."""
    count = sums.weight.astype(np.float64)
    if pictures is None:
        return count
    known = np.zeros(len(count))
    for at in range(0, len(labels), _ROWS):
        face = labels.face[at : at + _ROWS]
        identity = labels.identity[at : at + _ROWS]
        chosen = part[face] == number
        known[identity[chosen]] = pictures[face[chosen]]
    return np.minimum(count, known)


def _sum_squares(
    identity: Int64, part: Int64, chosen: Bool, identity_count: int, pictures: Int64 | None, face: Int64
) -> Float64:
    """Sum the squares (k,) of the numbers of pictures of some parts of each identity."""
    keys, at, count = np.unique(
        np.stack([identity[chosen], part[chosen]], axis=1), axis=0, return_index=True, return_counts=True
    )
    number = count.astype(np.float64)
    if pictures is not None:
        number = np.minimum(number, pictures[face[chosen][at]])
    return np.asarray(np.bincount(keys[:, 0], number**2, identity_count), np.float64)


def _compare_parts(
    faces: FaceVectors,
    face: Int64,
    identity: Int64,
    first: IdentityCentres,
    second: IdentityCentres,
    *,
    genuine: Normal,
    impostor: Normal,
) -> tuple[Bool, Float32]:
    """Compare faces with the two parts of their identities.

    Args:
        faces: n faces.
        face: position of each face, (m,).
        identity: number of each face's identity, (m,).
        first: sums of the first part of each identity.
        second: sums of the second part.
        genuine: distribution of faces to their own part.
        impostor: distribution of strangers.

    Returns:
        Whether the first part is nearer (m,), and the log likelihood ratio (m,) of belonging to the nearer one.
    """
    no_share = np.zeros(len(face), np.float32)
    to_first, first_size = first.compute_fit(faces, face, identity, no_share)
    to_second, second_size = second.compute_fit(faces, face, identity, no_share)
    is_near_first = np.asarray(to_first >= to_second)
    similarity = np.maximum(to_first, to_second)
    size = np.where(is_near_first, first_size, second_size).astype(np.float32)
    return is_near_first, compute_log_ratio(genuine, impostor, similarity, size)


def _sum_others(candidates: LabelCandidates, posteriors: LabelPosteriors, count: int) -> Float64:
    """Sum the probabilities (n,) that a face belongs to another identity than its label's."""
    sums = make_temporary_array(np.float64, (count,))
    for block in candidates.iterate_blocks(count):
        others = ~block.candidates.is_own
        probability = posteriors.probability[block.pairs][others]
        sums[block.faces] = np.bincount(
            block.candidates.face[others], probability, block.faces.stop - block.faces.start
        )
    return sums


def _fit_parts(
    faces: FaceVectors, labels: LabelCandidates, part: Int64, posteriors: LabelPosteriors, threshold: float
) -> tuple[Normal, Normal]:
    """Fit the distribution of faces to the rest of their part, which no second person widens, and take strangers'."""
    share = make_temporary_array(np.float32, (len(labels),))
    for at in range(0, len(labels), _ROWS):
        share[at : at + _ROWS] = part[labels.face[at : at + _ROWS]] == 0
    centres = IdentityCentres.from_shares(faces, labels, share)
    similarity, weight = centres.compute_fit(faces, labels.face, labels.identity, share)
    return fit_distributions(fit_normal(similarity, weight, share), posteriors.impostor, threshold)


def _compute_posteriors(
    candidates: LabelCandidates,
    ratio: Float32,
    weight: Float32,
    prior: Float32,
    rates: NoiseRates,
    label_counts: Int64,
) -> tuple[Float32, Float32]:
    """Compute the probability of each candidate (m,), and of belonging to none of them (n,)."""
    face = candidates.face
    swapped = rates.swapped[rates.size_class]
    unknown = rates.unknown[rates.size_class]
    correct = 1 - swapped - unknown
    # A face with a wrong label is anybody's, and of those more often who have many faces.
    own = candidates.is_own
    other = swapped[face] * label_counts[candidates.identity] / max(1, label_counts.sum() - 1)
    # Prior times likelihood for each candidate, and for no identity; then divide by the sum per face.
    likelihood = np.where(own, (correct * prior)[face], other) * np.exp(ratio.astype(np.float64))
    # Of two labels of a face each that are one person's, either may be the wrong one.
    is_alone = np.zeros(len(prior), bool)
    is_alone[face[own]] = weight[own] < MIN_WEIGHT
    is_mutual = ~own & is_alone[face] & (weight < _TWO_FACES)
    mutual = np.bincount(face[is_mutual], likelihood[is_mutual], len(prior))
    likelihood[own] += mutual[face[own]]
    no_identity = unknown + swapped * rates.missed + correct * (1 - prior)
    total = no_identity + np.bincount(face, likelihood, len(prior))
    probability = (likelihood / total[face]).astype(np.float32)
    return candidates.settle(probability, (no_identity / total).astype(np.float32))
