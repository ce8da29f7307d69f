"""Decide what to do with each label, and say why, from the label posteriors."""

from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from facepipe.curation.cleaning.evidence import LabelCandidates
from facepipe.curation.cleaning.model import MIN_WEIGHT, LabelPosteriors
from facepipe.types import Bool, Float32, Int64

KEEP = "keep"
OUTLIER = "outlier"
RELABEL = "relabel"
DUPLICATE = "duplicate"
LOW_QUALITY = "low_quality"
REVIEW = "review"
DECISIONS = (KEEP, OUTLIER, RELABEL, DUPLICATE, LOW_QUALITY, REVIEW)
_WRONG = 0.5  # noise above which a label is flagged: it is more likely wrong than right
_SURE = 0.8  # a less likely decision goes to a person for review
# The least noise of a label that fits another face of the photo better.
_BYSTANDER_NOISE = 1 - 1e-3

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
)
(
    FITS,
    ONLY_FACE,
    FITS_NONE,
    FITS_OTHER,
    BYSTANDER,
    PROBABLY_WRONG,
    PROBABLY_RIGHT,
    COPY,
    SMALL,
    BLURRED,
    TWO_NAMES,
    UNLABELLED,
) = range(len(REASONS))


@dataclass(frozen=True)
class LabelVerdicts:
    """Decisions on the labels of n faces, with the evidence for them.

    Attributes:
        noise: Probability that the label is wrong, (n,). NaN without a label.
        own_similarity: Mean similarity to the rest of the face's identity, (n,). NaN if there is no rest.
        own_weight: Number of faces that this similarity rests on, (n,).
        other: The most likely other identity, (n,), -1 for none.
        other_similarity: Mean similarity to that identity, (n,).
        other_probability: Probability that the face belongs to it, (n,).
        decision: Index into DECISIONS, (n,), -1 without a label.
        reason: Index into REASONS, (n,).
    """

    noise: Float32
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


def decide_labels(
    candidates: LabelCandidates, posteriors: LabelPosteriors, face_count: int, photo: Int64
) -> LabelVerdicts:
    """Decide on the labels of all faces.

    Args:
        candidates: m pairs of a face and an identity.
        posteriors: what was estimated for them.
        face_count: number of faces n.
        photo: number of the image of each face, (n,). Of faces with one label in one image only one can be right.
    """
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
    is_bystander = _find_bystanders(candidates, noise, photo)
    fit = 1 - noise
    noise = np.where(is_bystander, np.maximum(noise, _BYSTANDER_NOISE), noise).astype(np.float32)
    is_wrong = is_labelled & (noise > _WRONG)
    is_moved = is_wrong & (other_probability >= posteriors.no_identity) & (other_probability > fit)

    # How sure the decision that follows is.
    certainty_if_kept = 1 - noise
    certainty_if_wrong = np.maximum(posteriors.no_identity, is_bystander)
    certainty = np.where(is_moved, other_probability, np.where(is_wrong, certainty_if_wrong, certainty_if_kept))
    is_sure = certainty >= _SURE
    is_alone = is_labelled & ~is_wrong & (np.nan_to_num(own_weight) < _WRONG)

    # The first case that holds decides.
    cases = [
        (~is_labelled, -1, UNLABELLED),
        (is_alone, DECISIONS.index(KEEP), ONLY_FACE),
        (is_bystander & ~is_moved, DECISIONS.index(OUTLIER), BYSTANDER),
        (is_moved & is_sure, DECISIONS.index(RELABEL), FITS_OTHER),
        (is_wrong & ~is_moved & is_sure, DECISIONS.index(OUTLIER), FITS_NONE),
        (is_wrong, DECISIONS.index(REVIEW), PROBABLY_WRONG),
        (~is_sure, DECISIONS.index(REVIEW), PROBABLY_RIGHT),
    ]
    conditions = [condition for condition, _, _ in cases]
    decisions = [decision for _, decision, _ in cases]
    reasons = [reason for _, _, reason in cases]
    return LabelVerdicts(
        noise=noise,
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
    is_changed = chosen & verdicts.is_decided(KEEP)
    decisions = np.where(is_changed, DECISIONS.index(decision), verdicts.decision).astype(np.int8)
    reasons = np.where(is_changed, reason, verdicts.reason).astype(np.int8)
    return replace(verdicts, decision=decisions, reason=reasons)


def question_kept(verdicts: LabelVerdicts, chosen: Bool, reason: int) -> LabelVerdicts:
    """Send the chosen faces (n,) that are kept so far to review, with a noise of at least a half."""
    is_changed = chosen & verdicts.is_decided(KEEP)
    noise = np.where(is_changed, np.maximum(verdicts.noise, _WRONG), verdicts.noise).astype(np.float32)
    return overrule_kept(replace(verdicts, noise=noise), chosen, REVIEW, reason)


def estimate_wrong(verdicts: LabelVerdicts) -> float:
    """Estimate how many labels are wrong. A label of a photo is not wrong because another face is in it too."""
    is_counted = (verdicts.decision >= 0) & (verdicts.reason != BYSTANDER)
    return float(np.nansum(verdicts.noise[is_counted]))


def estimate_errors(verdicts: LabelVerdicts) -> float:
    """Estimate how many decisions on labels are wrong, from their own probabilities."""
    noise = verdicts.noise[~np.isnan(verdicts.noise)]
    return float(np.where(noise > _WRONG, 1 - noise, noise).sum())


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


def _find_bystanders(candidates: LabelCandidates, noise: Float32, photo: Int64) -> Bool:
    """Find the faces (n,) that share photo and label with a face that the label fits better."""
    own = np.flatnonzero(candidates.is_own)
    face = candidates.face[own]
    identity = candidates.identity[own]
    # Of one photo and label the face with the least noise comes first; the others are bystanders.
    order = np.lexsort((face, noise[face], identity, photo[face]))
    face = face[order]
    identity = identity[order]
    is_repeated = (np.diff(photo[face], prepend=-1) == 0) & (np.diff(identity, prepend=-1) == 0)
    is_bystander = np.zeros(len(noise), bool)
    is_bystander[face[is_repeated]] = True
    return is_bystander
