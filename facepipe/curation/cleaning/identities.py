"""Identities as a whole: how pure they are, which are one person under two names, which hold two persons."""

from dataclasses import dataclass

import numpy as np

from facepipe.curation.cleaning.decide import DECISIONS, KEEP, Verdicts
from facepipe.curation.cleaning.evidence import Faces
from facepipe.curation.graph.linkage import Clusters, average_linkage
from facepipe.nearest.similarity import Pairs
from facepipe.types import Bool, Float32, Int64


@dataclass(frozen=True)
class Parts:
    """Where identities fall apart: part (n,) of each face within its identity, 0 for the largest, -1 if unlabelled."""

    part: Int64
    size: Int64  # (n,) faces of the face's part


def parts(faces: Faces, label: Int64, copies: Int64, pairs: Pairs, threshold: float) -> Parts:
    """Average linkage inside each identity alone."""
    inside = (label[pairs.u] == label[pairs.v]) & (label[pairs.u] >= 0)
    joined = np.flatnonzero((copies != np.arange(len(copies))) & (label == label[copies]) & (label >= 0))
    single = Clusters.single(faces.vectors, faces.density)
    u, v = np.concatenate([pairs.u[inside], copies[joined]]), np.concatenate([pairs.v[inside], joined])
    group, made = average_linkage(single, u, v, threshold)
    owner = np.empty(len(made), np.int64)
    owner[group] = label
    order = np.lexsort((np.arange(len(made)), -made.size, owner))
    rank = np.arange(len(order)) - np.searchsorted(owner[order], owner[order])
    place = np.empty(len(made), np.int64)
    place[order] = rank
    return Parts(np.where(label >= 0, place[group], -1), made.size[group])


def core(found: Parts) -> Bool:
    """(n,) whether a face is in the largest part of its identity."""
    return found.part == 0


@dataclass(frozen=True)
class Summary:
    """k identities: faces, kept, wrong (expected number of wrong labels), apart (faces of the second largest part that
    no other identity claims), distance between the two largest parts as similarity; and pairs that may be one person:
    left, right, similarity."""

    faces: Int64
    kept: Int64
    wrong: Float32
    apart: Int64
    apart_similarity: Float32
    left: Int64
    right: Int64
    similarity: Float32


def summarise(
    faces: Faces, label: Int64, count: int, found: Verdicts, inside: Parts, pairs: Pairs, threshold: float
) -> Summary:
    """Figures of k identities."""
    labelled = np.flatnonzero(label >= 0)
    mine = label[labelled]
    kept = found.decision == DECISIONS.index(KEEP)
    wrong = np.bincount(mine, np.nan_to_num(found.noise[labelled]), count).astype(np.float32)
    left, right, similarity = _one_person(faces, label, count, kept, pairs, threshold)
    apart, apart_similarity = _two_persons(faces, label, count, found, inside)
    faces_of, kept_of = np.bincount(mine, minlength=count), np.bincount(mine[kept[labelled]], minlength=count)
    return Summary(faces_of, kept_of, wrong, apart, apart_similarity, left, right, similarity)


def _one_person(
    faces: Faces, label: Int64, count: int, kept: Bool, pairs: Pairs, threshold: float
) -> tuple[Int64, Int64, Float32]:
    """Pairs of identities whose kept faces are as alike as those of one person, most alike first."""
    usable = kept & (label >= 0)
    clusters = _means(faces, np.where(usable, label, -1), count)
    u, v = label[pairs.u], label[pairs.v]
    across = usable[pairs.u] & usable[pairs.v] & (u != v)
    key = np.unique(np.minimum(u, v)[across] * count + np.maximum(u, v)[across])
    left, right = key // max(1, count), key % max(1, count)
    similarity = clusters.linkage(left, right)
    alike = np.flatnonzero(similarity >= threshold)
    order = alike[np.lexsort((right[alike], left[alike], -similarity[alike]))]
    return left[order], right[order], similarity[order]


def _two_persons(faces: Faces, label: Int64, count: int, found: Verdicts, inside: Parts) -> tuple[Int64, Float32]:
    """(faces of the second part (k,), its mean similarity to the first (k,)) where several faces lie apart together."""
    unclaimed = (label >= 0) & (found.decision != DECISIONS.index("relabel"))
    first = _means(faces, np.where(unclaimed & (inside.part == 0), label, -1), count)
    second = _means(faces, np.where(unclaimed & (inside.part == 1) & (inside.size > 1), label, -1), count)
    size = np.where(second.size >= 2, second.size, 0)
    similarity = np.full(count, np.nan, np.float32)
    both = np.flatnonzero((size > 0) & (first.size > 0))
    stacked = Clusters(*(np.concatenate([getattr(first, n), getattr(second, n)]) for n in ("sums", "crowd", "size")))
    similarity[both] = stacked.linkage(both, both + count)
    return size, similarity


def _means(faces: Faces, label: Int64, count: int) -> Clusters:
    """Sums of faces by label (n,), -1 for those that do not count; empty ones have the size 0."""
    used = np.flatnonzero(label >= 0)
    order = used[np.argsort(label[used], kind="stable")]
    sums, crowd = np.zeros((count, faces.vectors.shape[1]), np.float32), np.zeros(count, np.float32)
    for at in range(0, len(order), 1 << 17):
        part = order[at : at + (1 << 17)]
        begins = np.flatnonzero(np.diff(label[part], prepend=-1))
        sums[label[part][begins]] += np.add.reduceat(faces.vectors[part], begins, axis=0)
        crowd[label[part][begins]] += np.add.reduceat(faces.density[part], begins)
    return Clusters(sums, crowd, np.bincount(label[used], minlength=count))
