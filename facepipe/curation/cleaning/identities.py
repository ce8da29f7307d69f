"""Judge identities as a whole: their purity, one person under two names, and two persons under one name."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from facepipe.curation.cleaning.decide import RELABEL, REVIEW, TWO_NAMES, LabelVerdicts
from facepipe.curation.cleaning.evidence import FaceVectors
from facepipe.curation.graph.clusters import Clusters
from facepipe.curation.graph.components import find_components
from facepipe.curation.graph.linkage import merge_by_average_linkage
from facepipe.curation.one_person.judge import (
    MIN_PROBABILITY,
    MIN_SHOWN,
    NEAR,
    GroupPairs,
    judge_pairs,
    judge_parts,
)
from facepipe.curation.one_person.model import OnePersonModel, sum_groups
from facepipe.nearest.similarity import Pairs
from facepipe.types import Bool, Float32, Int32, Int64

_EXPECTED_SHARE = 0.01  # of the identities, that are a second name of a person, before any face is looked at
_MIN_PART = 2  # faces of a second part: a single face that is apart is a matter of its label


@dataclass(frozen=True)
class IdentityParts:
    """The parts that identities fall into if each is clustered alone.

    Attributes:
        part: Part of each face within its identity, (n,). 0 is the largest, -1 means that the face has no label.
        size: Number of faces of the face's part, (n,).
        pictures: Number of pictures of the face's part, (n,): faces that look like one picture count once.
    """

    part: Int64
    size: Int64
    pictures: Int64

    @property
    def is_largest(self) -> Bool:
        """Whether each face is in the largest part of its identity, (n,)."""
        return np.asarray(self.part == 0)


def split_identities(
    faces: FaceVectors,
    labels: Int64,
    copies: Int64,
    pairs: Iterable[Pairs],
    threshold: float,
    *,
    same_picture: float = 0.0,
) -> IdentityParts:
    """Split each identity into parts by average linkage inside it.

    Args:
        faces: n faces.
        labels: number of each face's identity, (n,), -1 for none.
        copies: first face with the same vector, (n,).
        pairs: neighbouring faces, in parts.
        threshold: mean similarity from which two parts are one.
        same_picture: distance up to which two faces of an identity look like one picture.
    """
    # Edges inside an identity, and from each copy to the first face with its vector.
    u, v, distance = _select_inside(labels, pairs)
    looks_same = distance <= same_picture
    same_u = u[looks_same]
    same_v = v[looks_same]
    is_copy = (copies != np.arange(len(copies))) & (labels == labels[copies]) & (labels >= 0)
    copy = np.flatnonzero(is_copy)
    single = Clusters.from_faces(faces.vectors, faces.density)
    u = np.concatenate([u, copies[copy].astype(np.int32)])
    v = np.concatenate([v, copy.astype(np.int32)])
    group, clusters = merge_by_average_linkage(single, u, v, threshold)
    # Rank the clusters of each identity by falling size.
    owner = np.empty(len(clusters), np.int64)
    owner[group] = labels
    # The part with the most pictures comes first. A picture that was copied often is one.
    picture = find_components(len(labels), np.concatenate([same_u, copies[copy]]), np.concatenate([same_v, copy]))
    _, shown = np.unique(group * len(labels) + picture, return_index=True)
    pictures = np.bincount(group[shown], minlength=len(clusters))
    order = np.lexsort((np.arange(len(clusters)), -clusters.size, -pictures, owner))
    rank = np.empty(len(clusters), np.int64)
    rank[order] = np.arange(len(order)) - np.searchsorted(owner[order], owner[order])
    return IdentityParts(np.where(labels >= 0, rank[group], -1), clusters.size[group], pictures[group])


def _select_inside(labels: Int64, pairs: Iterable[Pairs]) -> tuple[Int32, Int32, Float32]:
    """Select the pairs (u (m,), v (m,)) of faces with one label, and their distances (m,)."""
    left = [np.empty(0, np.int32)]
    right = [np.empty(0, np.int32)]
    distance = [np.empty(0, np.float32)]
    for part in pairs:
        is_inside = (labels[part.u] == labels[part.v]) & (labels[part.u] >= 0)
        left.append(part.u[is_inside].astype(np.int32))
        right.append(part.v[is_inside].astype(np.int32))
        distance.append(np.asarray(part.distance)[is_inside].astype(np.float32))
    return np.concatenate(left), np.concatenate(right), np.concatenate(distance)


@dataclass(frozen=True)
class IdentityPairs:
    """Pairs of identities with near faces, the likeliest to be one person first.

    Attributes:
        left: First identity of each pair, (m,).
        right: Second identity, (m,).
        similarity: Mean similarity of their faces, (m,).
        probability: Probability that they are one person, (m,).
        face_counts: Faces of both on which that rests, (m, 2): those that are kept, or to review.
    """

    left: Int64
    right: Int64
    similarity: Float32
    probability: Float32
    face_counts: Int64

    def __len__(self) -> int:
        return len(self.left)

    def take(self, chosen: Int64 | Bool) -> "IdentityPairs":
        """Return some of the pairs."""
        return IdentityPairs(
            self.left[chosen],
            self.right[chosen],
            self.similarity[chosen],
            self.probability[chosen],
            self.face_counts[chosen],
        )


@dataclass(frozen=True)
class IdentitySummary:
    """Figures of k identities, and pairs of identities that may be one person.

    Attributes:
        face_count: Labelled faces, (k,).
        kept_count: Faces that keep their label, (k,).
        wrong: Expected number of wrong labels, (k,).
        apart_count: Faces of the second largest part, if it is likely another person, (k,), else 0.
        apart_similarity: Mean similarity of the two largest parts, (k,). NaN if there is no second part of several
            faces that no other identity claims.
        apart_probability: Probability that these are two persons, (k,), 0 if there is no second part.
        merges: Pairs that are likely one person.
        look_alikes: Other pairs with near faces.
    """

    face_count: Int64
    kept_count: Int64
    wrong: Float32
    apart_count: Int64
    apart_similarity: Float32
    apart_probability: Float32
    merges: IdentityPairs
    look_alikes: IdentityPairs


def summarise_identities(
    faces: FaceVectors,
    labels: Int64,
    verdicts: LabelVerdicts,
    parts: IdentityParts,
    pairs: Iterable[Pairs],
    *,
    identity_count: int,
    threshold: float,
) -> IdentitySummary:
    """Summarise all identities.

    Args:
        faces: n faces.
        labels: number of each face's identity, (n,), -1 for none.
        verdicts: decisions on the labels.
        parts: parts of the identities.
        pairs: neighbouring faces, in parts.
        identity_count: number of identities k. Some may have no face.
        threshold: similarity from which two faces count as one person. It stands in for what the corpus does not show.
    """
    labelled = np.flatnonzero(labels >= 0)
    identity = labels[labelled]
    # One person under two names is judged by the faces that keep their label, or may. Those of a picture under two
    # names show one person whoever bears the names.
    is_kept = verdicts.is_kept
    is_open = verdicts.is_decided(REVIEW) & (verdicts.reason != TWO_NAMES)
    kept_labels = np.where(is_kept | is_open, labels, -1)
    kept = sum_groups(faces.vectors, faces.density, kept_labels, identity_count)
    ends = _find_near_identities(kept_labels, pairs, identity_count)
    model = OnePersonModel.fit(kept, faces.vectors, faces.density, kept_labels, compared=ends, threshold=threshold)
    near = _judge_near_identities(model, kept, ends)
    is_named = near.probability >= MIN_PROBABILITY
    # Two persons under one name are judged without faces that belong to another identity.
    is_unclaimed = (labels >= 0) & ~verdicts.is_decided(RELABEL)
    second = _judge_second_persons(model, faces, np.where(is_unclaimed, labels, -1), parts, identity_count)
    # The label of an image is not wrong because another face is in it too.
    wrong = np.where(verdicts.is_counted, np.nan_to_num(verdicts.image_noise), 0)[labelled]
    return IdentitySummary(
        face_count=np.bincount(identity, minlength=identity_count),
        kept_count=np.bincount(identity[is_kept[labelled]], minlength=identity_count),
        wrong=np.bincount(identity, wrong, identity_count).astype(np.float32),
        apart_count=np.where(second.probability >= MIN_PROBABILITY, second.size, 0),
        apart_similarity=second.similarity,
        apart_probability=second.probability,
        merges=near.take(is_named),
        look_alikes=near.take(~is_named & (near.probability >= MIN_SHOWN)),
    )


def _find_near_identities(kept_labels: Int64, pairs: Iterable[Pairs], identity_count: int) -> Int64:
    """Find the pairs of identities (m, 2) that an edge between kept faces joins."""
    found = [np.empty(0, np.int64)]
    for part in pairs:
        u = kept_labels[part.u]
        v = kept_labels[part.v]
        is_across = (u >= 0) & (v >= 0) & (u != v)
        found.append(np.unique(np.minimum(u, v)[is_across] * identity_count + np.maximum(u, v)[is_across]))
    keys = np.unique(np.concatenate(found))
    return np.stack([keys // max(1, identity_count), keys % max(1, identity_count)], axis=1)


def _judge_near_identities(model: OnePersonModel, kept: Clusters, ends: Int64) -> IdentityPairs:
    """Judge pairs of identities (m, 2) by their kept faces."""
    similarity = kept.compute_linkage(ends[:, 0], ends[:, 1])
    count = int((kept.size > 0).sum())
    probability = judge_pairs(
        model,
        GroupPairs(
            ends=ends,
            similarity=similarity,
            sizes=kept.size[ends],
            reason=np.full(len(ends), NEAR),
            is_number=np.zeros(len(ends), np.int64),
            total=count * (count - 1) / 2,
            expected=max(1.0, _EXPECTED_SHARE * count),
        ),
    )
    order = np.lexsort((ends[:, 1], ends[:, 0], -similarity, -probability))
    pairs = IdentityPairs(ends[:, 0], ends[:, 1], similarity, probability.astype(np.float32), kept.size[ends])
    return pairs.take(order)


@dataclass(frozen=True)
class _SecondParts:
    """The second part of each of k identities: its faces, similarity to the first, and probability of two persons."""

    size: Int64
    similarity: Float32
    probability: Float32


def _judge_second_persons(
    model: OnePersonModel, faces: FaceVectors, labels: Int64, parts: IdentityParts, identity_count: int
) -> _SecondParts:
    """Judge whether the second part of an identity is another person, if it has several faces."""
    # The two largest parts of each identity, one list below the other as 2 k groups.
    is_first = parts.part == 0
    is_second = (parts.part == 1) & (parts.size > 1)
    part = np.where(is_first, labels, np.where(is_second, labels + identity_count, -1))
    part = np.where(labels >= 0, part, -1)
    groups = sum_groups(faces.vectors, faces.density, part, 2 * identity_count)
    first = groups.size[:identity_count]
    second = np.where(groups.size[identity_count:] >= _MIN_PART, groups.size[identity_count:], 0)
    both = np.flatnonzero((second > 0) & (first > 0))
    similarity = np.full(identity_count, np.nan, np.float32)
    similarity[both] = groups.compute_linkage(both, both + identity_count)
    # Identities that have faces enough for two such parts.
    group_count = int((np.bincount(labels[labels >= 0], minlength=identity_count) >= 2 * _MIN_PART).sum())
    sizes = np.stack([first[both], second[both]], axis=1)
    probability = np.zeros(identity_count, np.float32)
    probability[both] = judge_parts(model, similarity[both], sizes, group_count)
    return _SecondParts(second, similarity, probability)
