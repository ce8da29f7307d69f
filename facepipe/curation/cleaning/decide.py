"""Decide what to do with each label, and say why, from the label posteriors."""

from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from facepipe.curation.cleaning.distributions import MIN_WEIGHT
from facepipe.curation.cleaning.evidence import LabelCandidates
from facepipe.curation.cleaning.model import LabelPosteriors
from facepipe.types import Bool, Float32, Int64

KEEP = "keep"
OUTLIER = "outlier"
RELABEL = "relabel"
DUPLICATE = "duplicate"
LOW_QUALITY = "low_quality"
REVIEW = "review"
BYSTANDER = "bystander"
UNVERIFIED = "unverified"
DECISIONS = (KEEP, OUTLIER, RELABEL, DUPLICATE, LOW_QUALITY, REVIEW, BYSTANDER, UNVERIFIED)
_WRONG = 0.5  # noise above which a label is flagged: it is more likely wrong than right
_SURE = 0.8  # a less likely decision goes to a person for review

REASONS = (
    "fits its identity",
    "nothing to compare with: the only face of its identity",
    "fits no identity",
    "fits another identity",
    "the label is another face's in the same photo",
    "the label is probably wrong, but not surely",
    "the label is probably right, but not surely",
    "the same picture is kept elsewhere in its identity",
    "the face is too small",
    "the face is blurred",
    "the same picture has another name too",
    "no label",
    "people have confirmed it",
    "the label is wrong, but it is open whose face it is",
)
(
    FITS,
    ONLY_FACE,
    FITS_NONE,
    FITS_OTHER,
    OTHER_FACE,
    PROBABLY_WRONG,
    PROBABLY_RIGHT,
    COPY,
    SMALL,
    BLURRED,
    TWO_NAMES,
    UNLABELLED,
    CONFIRMED,
    WRONG_OF_WHOM,
) = range(len(REASONS))


@dataclass(frozen=True)
class LabelVerdicts:
    """Decisions on the labels of n faces, with the evidence for them.

    Attributes:
        noise: Probability that the label is not this face's, (n,). NaN without a label.
        image_noise: Probability that the label is that of no face of the image, (n,). NaN without a label.
        own_similarity: Mean similarity to the rest of the face's identity, (n,). NaN if there is no rest.
        own_weight: Number of faces that this similarity rests on, (n,).
        other: The most likely other identity, (n,), -1 for none.
        other_similarity: Mean similarity to that identity, (n,).
        other_probability: Probability that the face belongs to it, (n,).
        decision: Index into DECISIONS, (n,), -1 without a label.
        reason: Index into REASONS, (n,).
    """

    noise: Float32
    image_noise: Float32
    own_similarity: Float32
    own_weight: Float32
    other: Int64
    other_similarity: Float32
    other_probability: Float32
    decision: npt.NDArray[np.int8]
    reason: npt.NDArray[np.int8]

    def take(self, chosen: Int64) -> "LabelVerdicts":
        """Return the verdicts on the chosen faces, by position."""
        return LabelVerdicts(**{item.name: getattr(self, item.name)[chosen] for item in fields(self)})

    def is_decided(self, decision: str) -> Bool:
        """Mark the faces (n,) with this decision."""
        return np.asarray(self.decision == DECISIONS.index(decision))

    @property
    def is_kept(self) -> Bool:
        """Whether each face keeps its label, (n,): it fits, or there is nothing to compare it with."""
        return self.is_decided(KEEP) | self.is_decided(UNVERIFIED)

    @property
    def is_counted(self) -> Bool:
        """Whether each face stands for a label, (n,): a label of an image counts once, not once per face in it."""
        return np.asarray((self.decision >= 0) & ~self.is_decided(BYSTANDER))


def decide_labels(
    candidates: LabelCandidates, posteriors: LabelPosteriors, photo: Int64, prior: Float32
) -> LabelVerdicts:
    """Decide on the labels of all faces.

    Of the faces with one label in one image one bears the label. The others are bystanders, whoever they are.

    Args:
        candidates: m pairs of a face and an identity.
        posteriors: what was estimated for them.
        photo: number of the image of each face, (n,).
        prior: probability that the label is meant for this face at all, (n,).
    """
    face_count = len(photo)
    # Evidence for the label itself.
    is_own = candidates.is_own
    own_face = candidates.face[is_own]
    noise = np.full(face_count, np.nan, np.float32)
    noise[own_face] = 1 - posteriors.probability[is_own]
    is_known = posteriors.weight[is_own] >= MIN_WEIGHT
    own_similarity = np.full(face_count, np.nan, np.float32)
    own_similarity[own_face] = np.where(is_known, posteriors.similarity[is_own], np.nan)
    own_weight = np.full(face_count, np.nan, np.float32)
    own_weight[own_face] = posteriors.weight[is_own]

    # Evidence against it.
    other, other_probability, other_similarity = _find_best_other(candidates, posteriors, face_count)
    is_labelled = ~np.isnan(noise)
    fit = 1 - noise

    # Of an image's faces the likeliest bears the label. If none of them seems to, the likeliest from the outset does.
    bearer, image_noise = _find_bearers(candidates, noise, photo, prior)
    is_bystander = is_labelled & (bearer != np.arange(face_count))
    noise = np.where(is_bystander, np.maximum(noise, 1 - noise[bearer]), noise).astype(np.float32)
    is_wrong = is_labelled & (image_noise > _WRONG)
    is_moved = is_wrong & (other_probability >= posteriors.no_identity) & (other_probability > fit)

    # How sure the decision that follows is.
    certainty_if_wrong = np.where(is_moved, other_probability, posteriors.no_identity)
    is_sure = np.where(is_wrong, certainty_if_wrong, 1 - image_noise) >= _SURE
    is_only = _find_only_labels(candidates, is_bystander)
    is_alone = is_labelled & ~is_moved & (np.nan_to_num(own_weight) < _WRONG) & (is_only | ~is_wrong)

    # The first case that holds decides.
    cases = [
        (~is_labelled, -1, UNLABELLED),
        (is_bystander, DECISIONS.index(BYSTANDER), OTHER_FACE),
        (is_alone, DECISIONS.index(UNVERIFIED), ONLY_FACE),
        (is_moved & is_sure, DECISIONS.index(RELABEL), FITS_OTHER),
        (is_wrong & ~is_moved & is_sure, DECISIONS.index(OUTLIER), FITS_NONE),
        (is_wrong & (image_noise >= _SURE), DECISIONS.index(REVIEW), WRONG_OF_WHOM),
        (is_wrong, DECISIONS.index(REVIEW), PROBABLY_WRONG),
        (~is_sure, DECISIONS.index(REVIEW), PROBABLY_RIGHT),
    ]
    conditions = [condition for condition, _, _ in cases]
    decisions = [decision for _, decision, _ in cases]
    reasons = [reason for _, _, reason in cases]
    return LabelVerdicts(
        noise=noise,
        image_noise=image_noise,
        own_similarity=own_similarity,
        own_weight=own_weight,
        other=other,
        other_similarity=other_similarity,
        other_probability=other_probability,
        decision=np.select(conditions, decisions, DECISIONS.index(KEEP)).astype(np.int8),
        reason=np.select(conditions, reasons, FITS).astype(np.int8),
    )


def overrule_kept(verdicts: LabelVerdicts, chosen: Bool, decision: str, reason: int) -> LabelVerdicts:
    """Change the decision on the chosen faces (n,) that are kept so far."""
    is_changed = chosen & verdicts.is_kept
    decisions = np.where(is_changed, DECISIONS.index(decision), verdicts.decision).astype(np.int8)
    reasons = np.where(is_changed, reason, verdicts.reason).astype(np.int8)
    return replace(verdicts, decision=decisions, reason=reasons)


def question_kept(verdicts: LabelVerdicts, chosen: Bool, reason: int) -> LabelVerdicts:
    """Send the chosen faces (n,) that are kept so far to review, with a noise of at least a half."""
    is_changed = chosen & verdicts.is_kept
    noise = np.where(is_changed, np.maximum(verdicts.noise, _WRONG), verdicts.noise).astype(np.float32)
    image_noise = np.where(is_changed, np.maximum(verdicts.image_noise, _WRONG), verdicts.image_noise)
    questioned = replace(verdicts, noise=noise, image_noise=image_noise.astype(np.float32))
    return overrule_kept(questioned, chosen, REVIEW, reason)


def estimate_wrong(verdicts: LabelVerdicts) -> float:
    """Estimate how many labels are wrong. A label of an image is not wrong because another face is in it too."""
    return float(verdicts.image_noise[verdicts.is_counted].sum())


def estimate_errors(verdicts: LabelVerdicts) -> float:
    """Estimate how many decisions on labels are wrong, from their own probabilities.

    Labels that a person is asked about, and those that nothing can be compared with, are not decided.
    """
    kept = verdicts.is_decided(KEEP) | verdicts.is_decided(DUPLICATE) | verdicts.is_decided(LOW_QUALITY)
    errors = verdicts.noise[kept].sum(dtype=np.float64)
    errors += (1 - verdicts.noise[verdicts.is_decided(OUTLIER)]).sum(dtype=np.float64)
    # Of a relabelled face the new name may be wrong too.
    errors += (1 - verdicts.other_probability[verdicts.is_decided(RELABEL)]).sum(dtype=np.float64)
    return float(errors)


def _find_best_other(
    candidates: LabelCandidates, posteriors: LabelPosteriors, face_count: int
) -> tuple[Int64, Float32, Float32]:
    """Find the most likely identity that is not the label's: identity (n,), probability (n,), similarity (n,)."""
    identity = np.full(face_count, -1)
    probability = np.zeros(face_count, np.float32)
    similarity = np.full(face_count, np.nan, np.float32)
    others = np.flatnonzero(~candidates.is_own)
    # Sort by face, then by falling probability and similarity: the first of each face is the best.
    keys = (-posteriors.similarity[others], -posteriors.probability[others], candidates.face[others])
    order = others[np.lexsort(keys)]
    best = order[np.diff(candidates.face[order], prepend=-1) > 0]
    face = candidates.face[best]
    identity[face] = candidates.identity[best]
    probability[face] = posteriors.probability[best]
    similarity[face] = posteriors.similarity[best]
    return identity, probability, similarity


def _find_bearers(candidates: LabelCandidates, noise: Float32, photo: Int64, prior: Float32) -> tuple[Int64, Float32]:
    """Find which face bears the label of each face's image.

    Returns:
        The face that bears it (n,), and the probability (n,) that no face of the image does: NaN without a label.
    """
    own = np.flatnonzero(candidates.is_own)
    face = candidates.face[own]
    identity = candidates.identity[own]
    # Of one image and label, the face that probably fits comes first, else the one that the label was likely meant for.
    doubt = np.where(noise[face] <= _WRONG, noise[face], 2 - prior[face])
    order = np.lexsort((face, doubt, identity, photo[face]))
    face = face[order]
    is_first = (np.diff(photo[face], prepend=-1) != 0) | (np.diff(identity[order], prepend=-1) != 0)
    group = np.cumsum(is_first) - 1
    bearer = np.arange(len(noise))
    bearer[face] = face[is_first][group]
    # At most one of them bears it, so that their probabilities add up.
    fit = np.bincount(group, 1 - noise[face])
    image_noise = np.full(len(noise), np.nan, np.float32)
    image_noise[face] = np.clip(1 - fit, 0, 1)[group]
    return bearer, image_noise


def _find_only_labels(candidates: LabelCandidates, is_bystander: Bool) -> Bool:
    """Find the faces (n,) whose label no other image has."""
    own = np.flatnonzero(candidates.is_own & ~is_bystander[candidates.face])
    count = np.bincount(candidates.identity[own], minlength=candidates.identity_count)
    is_only = np.zeros(len(is_bystander), bool)
    is_only[candidates.face[own]] = count[candidates.identity[own]] == 1
    return is_only
