"""What people have decided on labels: confirmed ones are certain evidence, rejected ones are no candidates."""

from dataclasses import dataclass, fields, replace

import numpy as np
import pyarrow as pa

from facepipe.curation.cleaning.decide import CONFIRMED, DECISIONS, KEEP, LabelVerdicts
from facepipe.curation.cleaning.evidence import LabelCandidates
from facepipe.decisions.persons import DecidedFaces
from facepipe.types import Bool, Int64


@dataclass(frozen=True)
class DecidedLabels:
    """What people have decided on the labels of n faces.

    Attributes:
        decided: What people have decided.
        ids: Ids of the faces, (n,).
        names: Names of the identities, (k,).
        is_confirmed: Whether they have confirmed the label of a face, (n,).
        is_kept: Whether they have said that a face is right as it is, (n,).
    """

    decided: DecidedFaces
    ids: Int64
    names: pa.Array
    is_confirmed: Bool
    is_kept: Bool

    @classmethod
    def locate(cls, decided: DecidedFaces, ids: Int64, labels: Int64, names: pa.Array) -> "DecidedLabels":
        """Find what is decided on faces with the labels (n,), -1 for none, which are numbers of the names."""
        has_label = labels >= 0
        is_confirmed = decided.is_confirmed(ids) & has_label
        return cls(decided, ids, names, is_confirmed, np.isin(ids, decided.kept) & has_label)

    def settle(self, candidates: LabelCandidates, voter: Int64) -> LabelCandidates:
        """Mark confirmed candidates as certain, and drop those that people have rejected.

        Args:
            candidates: m pairs of a face and an identity, sorted by face. The faces are voters.
            voter: face that votes for each face, (n,). What is decided on one of its faces is decided on it.
        """
        if not self.decided:
            return candidates
        is_certain = np.zeros(len(voter), bool)
        is_certain[voter[self.is_confirmed]] = True
        is_certain = is_certain[candidates.face]
        is_rejected = is_certain | self._find_rejected(candidates, voter)
        kept = candidates.is_own | ~is_rejected
        columns = {
            item.name: getattr(candidates, item.name)[kept]
            for item in fields(candidates)
            if isinstance(getattr(candidates, item.name), np.ndarray)
        }
        return replace(candidates, **columns | {"is_certain": (is_certain & candidates.is_own)[kept]})

    def _find_rejected(self, candidates: LabelCandidates, voter: Int64) -> Bool:
        """Find the candidates (m,) of which people have said that the face is not this person."""
        is_rejected = np.zeros(len(candidates), bool)
        # Every decided face with all candidates of the face that votes for it.
        members = np.flatnonzero(self.decided.find_groups(self.ids) >= 0)
        begin = np.searchsorted(candidates.face, voter[members])
        count = np.searchsorted(candidates.face, voter[members], side="right") - begin
        at = np.repeat(begin - np.cumsum(count) + count, count) + np.arange(int(count.sum()))
        names = self.names.take(pa.array(candidates.identity[at]))
        is_rejected[at[self.decided.reject_names(self.ids[np.repeat(members, count)], names)]] = True
        return is_rejected


def confirm_labels(verdicts: LabelVerdicts, chosen: Bool) -> LabelVerdicts:
    """Keep the chosen faces (n,) with their labels, without any doubt."""
    if not chosen.any():
        return verdicts
    zero = np.float32(0)
    return replace(
        verdicts,
        noise=np.where(chosen, zero, verdicts.noise),
        image_noise=np.where(chosen, zero, verdicts.image_noise),
        other=np.where(chosen, -1, verdicts.other),
        other_probability=np.where(chosen, zero, verdicts.other_probability),
        other_similarity=np.where(chosen, np.float32(np.nan), verdicts.other_similarity),
        decision=np.where(chosen, DECISIONS.index(KEEP), verdicts.decision).astype(np.int8),
        reason=np.where(chosen, CONFIRMED, verdicts.reason).astype(np.int8),
    )
