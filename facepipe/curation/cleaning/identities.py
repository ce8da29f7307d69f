"""Judge identities as a whole: their purity, one person under two names, and two persons under one name."""

from dataclasses import dataclass

import numpy as np

from facepipe.curation.cleaning.decide import RELABEL, LabelVerdicts
from facepipe.curation.cleaning.evidence import FaceVectors
from facepipe.curation.graph.clusters import Clusters
from facepipe.curation.graph.linkage import merge_by_average_linkage
from facepipe.nearest.similarity import Pairs
from facepipe.types import Bool, Float32, Int64

_BLOCK = 1 << 17


@dataclass(frozen=True)
class IdentityParts:
    """The parts that identities fall into if each is clustered alone.

    Attributes:
        part: Part of each face within its identity, (n,). 0 is the largest, -1 means that the face has no label.
        size: Number of faces of the face's part, (n,).
    """

    part: Int64
    size: Int64

    @property
    def is_largest(self) -> Bool:
        """Whether each face is in the largest part of its identity, (n,)."""
        return np.asarray(self.part == 0)


def split_identities(faces: FaceVectors, labels: Int64, copies: Int64, pairs: Pairs, threshold: float) -> IdentityParts:
    """Split each identity into parts by average linkage inside it.

    Args:
        faces: n faces.
        labels: number of each face's identity, (n,), -1 for none.
        copies: first face with the same vector, (n,).
        pairs: neighbouring faces.
        threshold: mean similarity from which two parts are one.
    """
    # Edges inside an identity, and from each copy to the first face with its vector.
    is_inside = (labels[pairs.u] == labels[pairs.v]) & (labels[pairs.u] >= 0)
    is_copy = (copies != np.arange(len(copies))) & (labels == labels[copies]) & (labels >= 0)
    copy = np.flatnonzero(is_copy)
    single = Clusters.from_faces(faces.vectors, faces.density)
    u = np.concatenate([pairs.u[is_inside], copies[copy]])
    v = np.concatenate([pairs.v[is_inside], copy])
    group, clusters = merge_by_average_linkage(single, u, v, threshold)
    # Rank the clusters of each identity by falling size.
    owner = np.empty(len(clusters), np.int64)
    owner[group] = labels
    order = np.lexsort((np.arange(len(clusters)), -clusters.size, owner))
    rank = np.empty(len(clusters), np.int64)
    rank[order] = np.arange(len(order)) - np.searchsorted(owner[order], owner[order])
    return IdentityParts(np.where(labels >= 0, rank[group], -1), clusters.size[group])


@dataclass(frozen=True)
class IdentitySummary:
    """Figures of k identities, and pairs of identities that may be one person.

    Attributes:
        face_count: Labelled faces, (k,).
        kept_count: Faces that keep their label, (k,).
        wrong: Expected number of wrong labels, (k,).
        apart_count: Faces of the second largest part that no other identity claims, (k,). 0 if fewer than two.
        apart_similarity: Mean similarity of the two largest parts, (k,). NaN if there is no second part.
        left: First identity of each pair, (m,).
        right: Second identity of each pair, (m,).
        similarity: Mean similarity of each pair, (m,), falling.
    """

    face_count: Int64
    kept_count: Int64
    wrong: Float32
    apart_count: Int64
    apart_similarity: Float32
    left: Int64
    right: Int64
    similarity: Float32


def summarise_identities(
    faces: FaceVectors,
    labels: Int64,
    verdicts: LabelVerdicts,
    parts: IdentityParts,
    pairs: Pairs,
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
        pairs: neighbouring faces.
        identity_count: number of identities k. Some may have no face.
        threshold: mean similarity from which two identities may be one person.
    """
    labelled = np.flatnonzero(labels >= 0)
    identity = labels[labelled]
    # One person under two names is judged by kept faces alone.
    is_kept = verdicts.is_kept
    left, right, similarity = _find_same_persons(
        faces, np.where(is_kept, labels, -1), pairs, identity_count=identity_count, threshold=threshold
    )
    # Two persons under one name are judged without faces that belong to another identity.
    is_unclaimed = (labels >= 0) & ~verdicts.is_decided(RELABEL)
    apart_count, apart_similarity = _find_second_persons(
        faces, np.where(is_unclaimed, labels, -1), parts, identity_count
    )
    # The label of an image is not wrong because another face is in it too.
    wrong = np.where(verdicts.is_counted, np.nan_to_num(verdicts.image_noise), 0)[labelled]
    return IdentitySummary(
        face_count=np.bincount(identity, minlength=identity_count),
        kept_count=np.bincount(identity[is_kept[labelled]], minlength=identity_count),
        wrong=np.bincount(identity, wrong, identity_count).astype(np.float32),
        apart_count=apart_count,
        apart_similarity=apart_similarity,
        left=left,
        right=right,
        similarity=similarity,
    )


def _find_same_persons(
    faces: FaceVectors, kept_labels: Int64, pairs: Pairs, *, identity_count: int, threshold: float
) -> tuple[Int64, Int64, Float32]:
    """Find pairs of identities whose kept faces are as similar as those of one person, the most similar first."""
    means = _sum_by_label(faces, kept_labels, identity_count)
    # Pairs of identities that an edge between kept faces joins.
    u = kept_labels[pairs.u]
    v = kept_labels[pairs.v]
    is_across = (u >= 0) & (v >= 0) & (u != v)
    keys = np.unique(np.minimum(u, v)[is_across] * identity_count + np.maximum(u, v)[is_across])
    left = keys // max(1, identity_count)
    right = keys % max(1, identity_count)
    similarity = means.compute_linkage(left, right)
    similar = np.flatnonzero(similarity >= threshold)
    order = similar[np.lexsort((right[similar], left[similar], -similarity[similar]))]
    return left[order], right[order], similarity[order]


def _find_second_persons(
    faces: FaceVectors, labels: Int64, parts: IdentityParts, identity_count: int
) -> tuple[Int64, Float32]:
    """Find identities with a second part of several faces: its size (k,), its mean similarity to the first (k,)."""
    # The two largest parts of each identity, one list below the other as 2 k clusters.
    first = _sum_by_label(faces, np.where(parts.part == 0, labels, -1), identity_count)
    second = _sum_by_label(faces, np.where((parts.part == 1) & (parts.size > 1), labels, -1), identity_count)
    size = np.where(second.size >= 2, second.size, 0)
    both = np.flatnonzero((size > 0) & (first.size > 0))
    stacked = Clusters(
        np.concatenate([first.sums, second.sums]),
        np.concatenate([first.crowd, second.crowd]),
        np.concatenate([first.size, second.size]),
    )
    similarity = np.full(identity_count, np.nan, np.float32)
    similarity[both] = stacked.compute_linkage(both, both + identity_count)
    return size, similarity


def _sum_by_label(faces: FaceVectors, labels: Int64, identity_count: int) -> Clusters:
    """Sum the faces of each identity. A label of -1 (n,) does not count, and an empty identity has size 0."""
    used = np.flatnonzero(labels >= 0)
    # Sort by identity, so that each identity is one run of rows in a block.
    order = used[np.argsort(labels[used], kind="stable")]
    sums = np.zeros((identity_count, faces.vectors.shape[1]), np.float32)
    crowd = np.zeros(identity_count, np.float32)
    for at in range(0, len(order), _BLOCK):
        block = order[at : at + _BLOCK]
        identity = labels[block]
        starts = np.flatnonzero(np.diff(identity, prepend=-1))
        sums[identity[starts]] += np.add.reduceat(faces.vectors[block], starts, axis=0)
        crowd[identity[starts]] += np.add.reduceat(faces.density[block], starts)
    return Clusters(sums, crowd, np.bincount(labels[used], minlength=identity_count))
