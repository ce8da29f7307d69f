"""From beliefs to decisions: what to do with each label, and why."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from facepipe.curation.cleaning.evidence import Candidates
from facepipe.curation.cleaning.model import LEAST, Belief
from facepipe.types import Bool, Float32, Int64

KEEP, OUTLIER, RELABEL, DUPLICATE, LOW_QUALITY, REVIEW = (
    *("keep", "outlier", "relabel", "duplicate", "low_quality", "review"),
)
DECISIONS = (KEEP, OUTLIER, RELABEL, DUPLICATE, LOW_QUALITY, REVIEW)
_WRONG = 0.5  # a label more likely wrong than right is flagged
_UNSURE = 0.8  # what is less likely than this is for a person to decide


@dataclass(frozen=True)
class Verdicts:
    """n faces. noise (n,): probability that the label is wrong, NaN without a label; own (n,): mean similarity to the
    rest of the identity and rest (n,) the faces it rests on; other (n,): the best other identity, -1 for none, with its
    similarity (n,) and probability (n,); decision (n,): index into DECISIONS, -1 without a label; reason (n,): index
    into REASONS."""

    noise: Float32
    own: Float32
    rest: Float32
    other: Int64
    other_similarity: Float32
    other_share: Float32
    decision: npt.NDArray[np.int8]
    reason: npt.NDArray[np.int8]


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
    "no label",
)
FITS, ALONE, NOBODY, OTHER, BYSTANDER, DOUBTFUL, LIKELY, COPY, SMALL, BLURRED, UNLABELLED = range(len(REASONS))


def verdicts(pool: Candidates, belief: Belief, count: int, photo: Int64) -> Verdicts:
    """Judge n faces; photo (n,) numbers the image each face is in: of faces with one label in it one can be right."""
    noise, own, rest = (np.full(count, np.nan, np.float32) for _ in range(3))
    mine = pool.own
    noise[pool.face[mine]] = 1 - belief.share[mine]
    known = belief.weight[mine] >= LEAST
    own[pool.face[mine]] = np.where(known, belief.similarity[mine], np.nan)
    rest[pool.face[mine]] = belief.weight[mine]
    other, likely, similar = _best_other(pool, belief, count)
    labelled = ~np.isnan(noise)
    bystander, fit = _bystanders(pool, noise, photo), 1 - noise
    noise = np.where(bystander, np.maximum(noise, 1 - 1e-3), noise).astype(np.float32)
    wrong = labelled & (noise > _WRONG)
    moved = wrong & (likely >= belief.nobody) & (likely > fit)
    sure = np.where(moved, likely, np.where(wrong, np.maximum(belief.nobody, bystander), 1 - noise)) >= _UNSURE
    alone = labelled & ~wrong & (np.nan_to_num(rest) < _WRONG)
    cases = [
        (~labelled, -1, UNLABELLED),
        (alone, DECISIONS.index(KEEP), ALONE),
        (bystander & ~moved, DECISIONS.index(OUTLIER), BYSTANDER),
        (moved & sure, DECISIONS.index(RELABEL), OTHER),
        (wrong & ~moved & sure, DECISIONS.index(OUTLIER), NOBODY),
        (wrong, DECISIONS.index(REVIEW), DOUBTFUL),
        (~sure, DECISIONS.index(REVIEW), LIKELY),
    ]
    conditions = [case for case, _, _ in cases]
    decision = np.select(conditions, [d for _, d, _ in cases], DECISIONS.index(KEEP)).astype(np.int8)
    reason = np.select(conditions, [r for _, _, r in cases], FITS).astype(np.int8)
    return Verdicts(noise, own, rest, other, similar, likely, decision, reason)


def overruled(found: Verdicts, chosen: Bool, decision: str, reason: int) -> Verdicts:
    """The same, with another decision on those faces (n,) that would have been kept."""
    kept = chosen & (found.decision == DECISIONS.index(KEEP))
    changed = np.where(kept, DECISIONS.index(decision), found.decision).astype(np.int8)
    reasons = np.where(kept, reason, found.reason).astype(np.int8)
    columns = {name: getattr(found, name) for name in Verdicts.__dataclass_fields__}
    return Verdicts(**{**columns, "decision": changed, "reason": reasons})


def expected_errors(found: Verdicts) -> float:
    """How many decisions on labels are wrong, by the probabilities themselves."""
    known = found.noise[~np.isnan(found.noise)]
    return float(np.where(known > _WRONG, 1 - known, known).sum())


def _best_other(pool: Candidates, belief: Belief, count: int) -> tuple[Int64, Float32, Float32]:
    """(identity (n,), share (n,), similarity (n,)) of the most likely identity that is not the label's."""
    other, share, similarity = np.full(count, -1), np.zeros(count, np.float32), np.full(count, np.nan, np.float32)
    theirs = np.flatnonzero(~pool.own)
    order = theirs[np.lexsort((-belief.similarity[theirs], -belief.share[theirs], pool.face[theirs]))]
    first = order[np.diff(pool.face[order], prepend=-1) > 0]
    other[pool.face[first]] = pool.identity[first]
    share[pool.face[first]], similarity[pool.face[first]] = belief.share[first], belief.similarity[first]
    return other, share, similarity


def _bystanders(pool: Candidates, noise: Float32, photo: Int64) -> Bool:
    """Faces (n,) that share photo and label with a face that the label fits better."""
    mine = np.flatnonzero(pool.own)
    face, identity = pool.face[mine], pool.identity[mine]
    order = np.lexsort((face, noise[face], identity, photo[face]))
    face, identity = face[order], identity[order]
    again = (np.diff(photo[face], prepend=-1) == 0) & (np.diff(identity, prepend=-1) == 0)
    out = np.zeros(len(noise), bool)
    out[face[again]] = True
    return out
