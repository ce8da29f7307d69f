"""Tell the persons apart who share a name, before it is estimated which faces bear their labels rightly.

If faces of two persons bear one name, the mean of them is like neither. Then no face fits its name well, and anybody
may seem to fit better. So each further person of a name is estimated like an identity of its own, and what is found for
the persons of a name is put together again.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from facepipe.curation.cleaning.distributions import Normal, fit_distributions, fit_normal
from facepipe.curation.cleaning.evidence import FaceVectors, IdentityCentres, LabelCandidates
from facepipe.curation.cleaning.identities import IdentityParts
from facepipe.curation.cleaning.model import LabelPosteriors, compute_log_ratio
from facepipe.curation.cleaning.strangers import StrangerPairs
from facepipe.nearest.similarity import Pairs
from facepipe.storage.mapped import TemporaryColumn
from facepipe.types import Bool, Float32, Int64

_PAIRS_PER_BLOCK = 1 << 13  # of groups that are compared at a time
_MIN_FACES = 2  # of a part: a single face that is apart is a matter of its label
_LOG_ODDS_ONE_PERSON = 2.0  # that two parts of an identity are one person, before they are compared
_MORE_THAN_CHANCE = 2.0  # times as often as first parts fit another identity, before that says anything of further ones
_MIN_SHARE = 0.25  # of the further parts
_FITS = 1.5  # standard deviations below the mean of genuine faces up to which a part is another identity's


@dataclass(frozen=True)
class NamedPersons:
    """The persons who bear k names: number k and above are further persons of a name.

    Attributes:
        person: Number of each face's person, (n,), -1 for a face without a label.
        name: Number of the name of each person, (p,). Person i is the first of name i if i < k.
    """

    person: Int64
    name: Int64

    def merge_names(
        self, candidates: LabelCandidates, posteriors: LabelPosteriors, name_count: int
    ) -> tuple[LabelCandidates, LabelPosteriors]:
        """Put together what was estimated for the persons of each name."""
        if len(self.name) == name_count:
            return candidates, posteriors
        # What is found of each block is appended to columns in temporary files.
        most = len(candidates)
        face = TemporaryColumn(np.int64, most)
        identity = TemporaryColumn(np.int64, most)
        is_own = TemporaryColumn(np.bool_, most)
        is_near = TemporaryColumn(np.bool_, most)
        is_certain = TemporaryColumn(np.bool_, most)
        probability = TemporaryColumn(np.float32, most)
        similarity = TemporaryColumn(np.float32, most)
        weight = TemporaryColumn(np.float32, most)
        for block in candidates.iterate_blocks(len(posteriors.no_identity)):
            pairs = block.candidates
            likely = posteriors.probability[block.pairs]
            # Of the persons of one name a face's own one comes first, then the likeliest.
            key = pairs.face * name_count + self.name[pairs.identity]
            order = np.lexsort((-likely, ~pairs.is_own, key))
            first = np.flatnonzero(np.diff(key[order], prepend=-1) != 0)
            if not len(first):
                continue
            chosen = order[first]
            face.append(block.faces.start + pairs.face[chosen])
            identity.append(self.name[pairs.identity[chosen]])
            is_own.append(pairs.is_own[chosen])
            if pairs.is_near is not None:
                is_near.append(np.logical_or.reduceat(pairs.is_near[order], first))
            if pairs.is_certain is not None:
                is_certain.append(pairs.is_certain[chosen])
            probability.append(np.add.reduceat(likely[order], first))
            similarity.append(posteriors.similarity[block.pairs][chosen])
            weight.append(posteriors.weight[block.pairs][chosen])
        merged = LabelCandidates(
            face=face.array,
            identity=identity.array,
            is_own=is_own.array,
            identity_count=name_count,
            is_near=None if candidates.is_near is None else is_near.array,
            is_certain=None if candidates.is_certain is None else is_certain.array,
        )
        return merged, replace(
            posteriors, probability=probability.array, similarity=similarity.array, weight=weight.array
        )


def number_persons(
    faces: FaceVectors,
    labels: Int64,
    parts: IdentityParts,
    pairs: Iterable[Pairs],
    *,
    name_count: int,
    threshold: float,
    seed: int = 0,
) -> NamedPersons:
    """Assign numbers to the persons of each name: parts of several faces that are apart from its first part.

    A part that fits another identity as a whole is left with its name. Its faces are swapped labels.

    Args:
        faces: n faces.
        labels: number of each face's name, (n,), -1 for none.
        parts: parts of the names.
        pairs: neighbouring faces, in parts.
        name_count: number of names k.
        threshold: similarity at which two faces are as likely one person as two.
        seed: seed of the sample of strangers.
    """
    single = NamedPersons(labels, np.arange(name_count))
    is_further = (parts.part > 0) & (parts.size >= _MIN_FACES)
    if not is_further.any():
        return single
    # Number the further parts, and sum the faces of all of them and of the first parts.
    key = np.where(is_further, labels * len(labels) + parts.part, -1)
    part_keys, group = np.unique(key[is_further], return_inverse=True)
    number = np.where(parts.part == 0, labels, -1)
    number[is_further] = name_count + group
    name = np.concatenate([np.arange(name_count), part_keys // len(labels)])
    labelled = np.flatnonzero(number >= 0)
    own = LabelCandidates(labelled, number[labelled], np.ones(len(labelled), bool), len(name))
    share = np.ones(len(labelled), np.float32)
    centres = IdentityCentres.from_shares(faces, own, share)
    genuine, impostor = _fit_parts(faces, own, centres, share, threshold, seed)
    part = np.arange(name_count, len(name))
    is_apart = _compare(centres, part, name[part], genuine, impostor) < -_LOG_ODDS_ONE_PERSON
    is_claimed = _find_claimed(centres, number, name, pairs, genuine, is_apart)
    is_apart &= ~is_claimed[part]
    # Number those that are left.
    renumbered = np.full(len(name), -1)
    renumbered[part[is_apart]] = name_count + np.arange(int(is_apart.sum()))
    person = labels.copy()
    person[is_further] = np.where(
        renumbered[number[is_further]] >= 0, renumbered[number[is_further]], labels[is_further]
    )
    return NamedPersons(person, np.concatenate([np.arange(name_count), name[part[is_apart]]]))


def _fit_parts(
    faces: FaceVectors, own: LabelCandidates, centres: IdentityCentres, share: Float32, threshold: float, seed: int
) -> tuple[Normal, Normal]:
    """Fit the distributions of faces to the rest of their part, and to others."""
    similarity, weight = centres.compute_fit(faces, own.face, own.identity, share)
    strangers = StrangerPairs.sample(own, seed)
    no_share = np.zeros(len(strangers.face), np.float32)
    to_others, rest = centres.compute_fit(faces, strangers.face, strangers.identity, no_share)
    impostor = fit_normal(to_others, rest, np.ones(len(to_others), np.float32))
    return fit_distributions(fit_normal(similarity, weight, share), impostor, threshold)


def _compute_fit(centres: IdentityCentres, left: Int64, right: Int64) -> Float32:
    """Compute the mean similarity (m,) of groups (m,) and others (m,)."""
    size = np.maximum(1, centres.weight)
    crowd = centres.crowd / size
    fit = np.empty(len(left), np.float32)
    for at in range(0, len(left), _PAIRS_PER_BLOCK):
        block = slice(at, at + _PAIRS_PER_BLOCK)
        u = left[block]
        v = right[block]
        product = np.einsum("nd,nd->n", centres.sums[u], centres.sums[v]) / (size[u] * size[v])
        fit[block] = product - (crowd[u] + crowd[v]) / 2
    return fit


def _compute_weight(centres: IdentityCentres, left: Int64, right: Int64) -> Float32:
    """Compute the faces (m,) that a similarity rests on: about twice the smaller group's, if the other is large."""
    size = np.maximum(1, centres.weight)
    return np.asarray(np.maximum(1, 2 * size[left] * size[right] / (size[left] + size[right])), np.float32)


def _compare(centres: IdentityCentres, left: Int64, right: Int64, genuine: Normal, impostor: Normal) -> Float32:
    """Compute the log likelihood ratio (m,) that groups (m,) and others (m,) are one person each."""
    similarity = _compute_fit(centres, left, right)
    return compute_log_ratio(genuine, impostor, similarity, _compute_weight(centres, left, right))


def _find_claimed(
    centres: IdentityCentres,
    number: Int64,
    name: Int64,
    pairs: Iterable[Pairs],
    genuine: Normal,
    is_apart: Bool,
) -> Bool:
    """Find the parts (p,) that fit another identity as a whole, if that says anything.

    Some parts do by chance. First parts show how often, because nearly all of them bear their name rightly.

    Args:
        centres: sums of p parts.
        number: number of each face's part, (n,), -1 for none. First parts come first.
        name: name of each part, (p,).
        pairs: neighbouring faces, in parts.
        genuine: distribution of faces to the rest of their part.
        is_apart: whether each further part is apart from the first part of its name.
    """
    first_count = len(name) - len(is_apart)
    near = _find_near(number, name, pairs, first_count)
    fits = _compute_fit(centres, near[:, 0], near[:, 1])
    weight = _compute_weight(centres, near[:, 0], near[:, 1])
    least = genuine.mean - _FITS * np.sqrt(genuine.compute_variance(weight))
    is_claimed = np.zeros(len(name), bool)
    is_claimed[near[fits >= least, 0]] = True
    is_solid = centres.weight[:first_count] >= _MIN_FACES
    by_chance = (is_claimed[:first_count][is_solid].sum() + 0.5) / (is_solid.sum() + 1)
    share = is_claimed[first_count:][is_apart].sum() / max(1, is_apart.sum())
    return is_claimed if share > max(_MIN_SHARE, _MORE_THAN_CHANCE * by_chance) else np.zeros(len(name), bool)


def _find_near(number: Int64, name: Int64, pairs: Iterable[Pairs], first_count: int) -> Int64:
    """Find the pairs (m, 2) of a part and the first part of another name that an edge joins."""
    found = [np.empty(0, np.int64)]
    for pair in pairs:
        ends = np.concatenate([number[np.stack([pair.u, pair.v])], number[np.stack([pair.v, pair.u])]], axis=1)
        part, first = ends
        is_found = (part >= 0) & (first >= 0) & (first < first_count)
        is_found &= name[np.maximum(part, 0)] != first
        found.append(np.unique(part[is_found] * first_count + first[is_found]))
    keys = np.unique(np.concatenate(found))
    return np.stack([keys // max(1, first_count), keys % max(1, first_count)], axis=1)
