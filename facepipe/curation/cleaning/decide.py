"""Decide what to do with each label, and say why, from the label posteriors."""

from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from facepipe.curation.cleaning.distributions import MIN_WEIGHT
from facepipe.curation.cleaning.evidence import FaceBlock, LabelCandidates
from facepipe.curation.cleaning.model import LabelPosteriors
from facepipe.storage.mapped import copy_column, make_temporary_array
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
        return LabelVerdicts(**{item.name: copy_column(getattr(self, item.name), chosen) for item in fields(self)})

    @classmethod
    def make(cls, face_count: int) -> "LabelVerdicts":
        """Make room for verdicts on so many faces, in temporary files."""
        dtypes = {"other": np.int64, "decision": np.int8, "reason": np.int8}
        columns = {
            item.name: make_temporary_array(dtypes.get(item.name, np.float32), (face_count,)) for item in fields(cls)
        }
        return cls(**columns)

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
    verdicts = LabelVerdicts.make(len(photo))
    # Evidence for and against each label, some faces at a time.
    for block in candidates.iterate_blocks(len(photo)):
        _gather_evidence(verdicts, block, posteriors)

    # Of an image's faces the likeliest bears the label. If none of them seems to, the likeliest from the outset does.
    bystander, bearer = _find_bystanders(verdicts, candidates, photo, prior)
    is_bystander = np.zeros(len(photo), bool)
    is_bystander[bystander] = True
    label_counts = _count_labels(candidates, is_bystander)
    for block in candidates.iterate_blocks(len(photo)):
        _decide_block(verdicts, block, posteriors, is_bystander[block.faces], label_counts)
    verdicts.noise[bystander] = np.maximum(verdicts.noise[bystander], 1 - verdicts.noise[bearer])
    return verdicts


def _gather_evidence(verdicts: LabelVerdicts, block: FaceBlock, posteriors: LabelPosteriors) -> None:
    """Fill in the evidence on the labels of a block of faces, each as if it were alone in its image."""
    faces = block.faces
    is_own = block.candidates.is_own
    own_face = block.candidates.face[is_own]
    noise = verdicts.noise[faces]
    noise[:] = np.nan
    noise[own_face] = 1 - posteriors.probability[block.pairs][is_own]
    # The one face of an image is wrong with the same probability, but for rounding.
    verdicts.image_noise[faces] = np.clip(1 - (1 - noise).astype(np.float64), 0, 1)
    own_weight = verdicts.own_weight[faces]
    own_weight[:] = np.nan
    own_weight[own_face] = posteriors.weight[block.pairs][is_own]
    own_similarity = verdicts.own_similarity[faces]
    own_similarity[:] = np.nan
    is_known = own_weight[own_face] >= MIN_WEIGHT
    own_similarity[own_face] = np.where(is_known, posteriors.similarity[block.pairs][is_own], np.nan)
    # Evidence against it.
    other, probability, similarity = _find_best_other(
        block.candidates,
        posteriors.probability[block.pairs],
        posteriors.similarity[block.pairs],
        faces.stop - faces.start,
    )
    verdicts.other[faces] = other
    verdicts.other_probability[faces] = probability
    verdicts.other_similarity[faces] = similarity


def _decide_block(
    verdicts: LabelVerdicts, block: FaceBlock, posteriors: LabelPosteriors, is_bystander: Bool, label_counts: Int64
) -> None:
    """Decide on the labels of a block of faces.

    Args:
        verdicts: the evidence, which the decisions are added to.
        block: b faces.
        posteriors: what was estimated.
        is_bystander: which of them are bystanders, (b,).
        label_counts: number of images with each label, (k,).
    """
    faces = block.faces
    noise = verdicts.noise[faces]
    image_noise = verdicts.image_noise[faces]
    other_probability = verdicts.other_probability[faces]
    no_identity = posteriors.no_identity[faces]
    is_labelled = ~np.isnan(noise)
    is_wrong = is_labelled & (image_noise > _WRONG)
    is_moved = is_wrong & (other_probability >= no_identity) & (other_probability > 1 - noise)

    # How sure the decision that follows is.
    certainty_if_wrong = np.where(is_moved, other_probability, no_identity)
    is_sure = np.where(is_wrong, certainty_if_wrong, 1 - image_noise) >= _SURE
    # A label that no other image has.
    own = block.candidates.is_own
    is_only = np.zeros(len(noise), bool)
    is_only[block.candidates.face[own]] = label_counts[block.candidates.identity[own]] == 1
    is_alone = is_labelled & ~is_moved & (np.nan_to_num(verdicts.own_weight[faces]) < _WRONG) & (is_only | ~is_wrong)

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
    verdicts.decision[faces] = np.select(conditions, decisions, DECISIONS.index(KEEP))
    verdicts.reason[faces] = np.select(conditions, reasons, FITS)


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
    candidates: LabelCandidates, likely: Float32, similar: Float32, face_count: int
) -> tuple[Int64, Float32, Float32]:
    """Find the most likely identity that is not the label's: identity (n,), probability (n,), similarity (n,).

    Args:
        candidates: m pairs of a face and an identity.
        likely: probability of each, (m,).
        similar: similarity of each, (m,).
        face_count: number of faces n.
    """
    identity = np.full(face_count, -1)
    probability = np.zeros(face_count, np.float32)
    similarity = np.full(face_count, np.nan, np.float32)
    others = np.flatnonzero(~candidates.is_own)
    # Sort by face, then by falling probability and similarity: the first of each face is the best.
    order = others[np.lexsort((-similar[others], -likely[others], candidates.face[others]))]
    best = order[np.diff(candidates.face[order], prepend=-1) > 0]
    face = candidates.face[best]
    identity[face] = candidates.identity[best]
    probability[face] = likely[best]
    similarity[face] = similar[best]
    return identity, probability, similarity


def _find_bystanders(
    verdicts: LabelVerdicts, candidates: LabelCandidates, photo: Int64, prior: Float32
) -> tuple[Int64, Int64]:
    """Find which faces with the label of an image do not bear it, and set the noise of images with several faces.

    Returns:
        The faces that do not bear their label (b,), and the face of the same image that does (b,).
    """
    shares_photo = np.bincount(photo, minlength=len(photo))[photo] > 1
    own = candidates.select(lambda block: block.candidates.is_own & shares_photo[block.faces][block.candidates.face])
    face = candidates.face[own]
    identity = candidates.identity[own]
    # Of one image and label, the face that probably fits comes first, else the one that the label was likely meant for.
    noise = verdicts.noise[face]
    doubt = np.where(noise <= _WRONG, noise, 2 - prior[face])
    order = np.lexsort((face, doubt, identity, photo[face]))
    face = face[order]
    is_first = (np.diff(photo[face], prepend=-1) != 0) | (np.diff(identity[order], prepend=-1) != 0)
    group = np.cumsum(is_first) - 1
    bearer = face[is_first][group]
    # At most one of them bears it, so that their probabilities add up.
    fit = np.bincount(group, 1 - noise[order])
    verdicts.image_noise[face] = np.clip(1 - fit, 0, 1)[group]
    is_bystander = bearer != face
    return face[is_bystander], bearer[is_bystander]


def _count_labels(candidates: LabelCandidates, is_bystander: Bool) -> Int64:
    """Count the images (k,) that have each label."""
    counts = np.zeros(candidates.identity_count, np.int64)
    for block in candidates.iterate_blocks(len(is_bystander)):
        pairs = block.candidates
        counted = pairs.is_own & ~is_bystander[block.faces][pairs.face]
        np.add.at(counts, pairs.identity[counted], 1)
    return counts
