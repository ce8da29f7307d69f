"""Measure how well each face fits the identities it may belong to: its own label's and its neighbours'."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from facepipe.curation.graph.grouped_sums import BLOCK_ROWS, add_pieces, iterate_pieces
from facepipe.nearest.similarity import Pairs
from facepipe.sorted_lookup import is_in_sorted
from facepipe.types import Bool, Float32, Int32, Int64

_BLOCK = BLOCK_ROWS
_MIN_WAITING = 1 << 20  # keys that are sorted at a time
_MIN_SHARE = np.float32(1e-3)  # a smaller share counts as none


@dataclass(frozen=True)
class LabelCandidates:
    """Pairs of a face and an identity that it may belong to, sorted by face.

    Attributes:
        face: Position of the face, (m,).
        identity: Number of the identity, (m,).
        is_own: Whether the identity is the face's own label, (m,).
        identity_count: Number of identities.
        is_near: Whether the identity is near the face, (m,): it would be a candidate if it were not the label. By
            default all are.
        is_certain: Whether people have confirmed the candidate, (m,). By default none is certain. A face with a certain
            one has no other.
    """

    face: Int64
    identity: Int64
    is_own: Bool
    identity_count: int
    is_near: Bool | None = None
    is_certain: Bool | None = None

    def __len__(self) -> int:
        return len(self.face)

    def settle(self, probability: Float32, no_identity: Float32) -> tuple[Float32, Float32]:
        """Replace the probabilities (m,) of certain candidates by 1, and that of no identity at all (n,) by 0."""
        if self.is_certain is None or not self.is_certain.any():
            return probability, no_identity
        certain = self.face[self.is_certain]
        settled = no_identity.copy()
        settled[certain] = 0
        return np.where(self.is_certain, np.float32(1), probability).astype(np.float32), settled

    @cached_property
    def by_identity(self) -> Int32 | Int64:
        """Positions (m,) of the pairs, sorted by identity."""
        order = np.argsort(self.identity, kind="stable")
        return order.astype(np.int32) if len(order) < np.iinfo(np.int32).max else order


def find_candidates(labels: Int64, pairs: Iterable[Pairs]) -> LabelCandidates:
    """Find the identities that each labelled face may belong to: its own label, and those of its neighbours.

    Args:
        labels: number of each face's identity, (n,), -1 for none.
        pairs: neighbouring faces, in parts. A pair may come more than once.

    Returns:
        Each face and identity once.
    """
    identity_count = int(labels.max(initial=-1)) + 1
    stride = max(1, identity_count)
    # Every face with the labels of its neighbours, and with its own one. Faces without a label have no candidates.
    near = _unite_keys(_list_neighbour_keys(labels, part, stride) for part in pairs)
    labelled = np.flatnonzero(labels >= 0)
    own = labelled * stride + labels[labelled]
    keys = np.concatenate([near, own[~is_in_sorted(near, own)]])
    keys.sort()
    is_near = is_in_sorted(near, keys)
    face = keys // stride
    identity = keys % stride
    return LabelCandidates(face, identity, identity == labels[face], identity_count, is_near)


def _list_neighbour_keys(labels: Int64, pairs: Pairs, stride: int) -> Int64:
    """List face * stride + label of a neighbour, for labelled faces; some come more than once."""
    faces = np.concatenate([pairs.u, pairs.v])
    identities = np.concatenate([labels[pairs.v], labels[pairs.u]])
    return np.asarray((faces * stride + identities)[(identities >= 0) & (labels[faces] >= 0)], np.int64)


def _unite_keys(parts: Iterable[Int64]) -> Int64:
    """Unite parts of keys (any length) into one list, rising, each key once."""
    united = np.empty(0, np.int64)
    pending = [united]
    waiting = 0
    for part in parts:
        pending.append(np.unique(part))
        waiting += len(pending[-1])
        # The list is sorted again when the rest is as long: so that each key is sorted a few times only.
        if waiting > max(len(united), _MIN_WAITING):
            united = np.unique(np.concatenate([united, *pending]))
            pending = []
            waiting = 0
    return np.unique(np.concatenate([united, *pending]))


@dataclass(frozen=True)
class FaceVectors:
    """Vectors of faces and how crowded the space around them is.

    Attributes:
        vectors: Unit vectors, (n, dim).
        density: Local density of each face, (n,).
        photo: Number of the image of each face, (n,). Faces of one image do not vouch for each other's label. Without
            it each face has an image of its own.
    """

    vectors: Float32
    density: Float32
    photo: Int64 | None = None

    @cached_property
    def shares_photo(self) -> Bool:
        """Whether another face is in the image of each face, (n,)."""
        if self.photo is None:
            return np.zeros(len(self.density), bool)
        return np.asarray(np.bincount(self.photo, minlength=len(self.photo))[self.photo] > 1)


@dataclass(frozen=True)
class IdentityCentres:
    """Weighted sums of the faces of k identities.

    Attributes:
        sums: Sums of the vectors, (k, dim), each weighted by the share to which the face belongs.
        crowd: Sums of the densities, (k,), weighted in the same way.
        weight: Sums of the shares, (k,).
    """

    sums: Float32
    crowd: Float32
    weight: Float32

    @classmethod
    def from_shares(cls, faces: FaceVectors, candidates: LabelCandidates, share: Float32) -> "IdentityCentres":
        """Sum the faces of each identity.

        Args:
            faces: n faces.
            candidates: m pairs of a face and an identity.
            share: share to which the face belongs to the identity, (m,).
        """
        order = candidates.by_identity
        order = order[share[order] > _MIN_SHARE]
        vectors = np.asarray(faces.vectors)
        sums = np.zeros((candidates.identity_count, vectors.shape[1]), np.float32)
        crowd = np.zeros(candidates.identity_count, np.float32)
        weight = np.zeros(candidates.identity_count, np.float32)
        groups = candidates.identity[order]
        for block, starts in iterate_pieces(groups, _BLOCK):
            face = candidates.face[order[block]]
            part = share[order[block]]
            add_pieces(sums, groups[block], vectors[face] * part[:, None], starts)
            add_pieces(crowd, groups[block], faces.density[face] * part, starts)
            add_pieces(weight, groups[block], part, starts)
        return cls(sums, crowd, weight)

    def compute_fit(self, faces: FaceVectors, face: Int64, identity: Int64, share: Float32) -> tuple[Float32, Float32]:
        """Compute the mean similarity of faces to the rest of identities.

        The rest has neither the face itself nor others of its image.

        Args:
            faces: n faces.
            face: position of the face of each pair, (m,).
            identity: number of the identity of each pair, (m,).
            share: share of the face in the identity's sums, (m,). It is taken out of them.

        Returns:
            The mean similarity (m,), and the weight (m,) of the faces that it rests on.
        """
        similarity = np.zeros(len(face), np.float32)
        rest = np.zeros(len(face), np.float32)
        share = np.where(share > _MIN_SHARE, share, np.float32(0))
        vectors = np.asarray(faces.vectors)
        for at in range(0, len(face), _BLOCK):
            block = slice(at, at + _BLOCK)
            rows = face[block]
            centres = identity[block]
            # Take the face's own share out of the sums, and compare it with the mean of the rest.
            own = share[block]
            product = np.einsum("nd,nd->n", vectors[rows], self.sums[centres]) - own
            weight = np.maximum(self.weight[centres] - own, 0)
            divisor = np.maximum(weight, _MIN_SHARE)
            crowd = (self.crowd[centres] - own * faces.density[rows]) / divisor
            similarity[block] = product / divisor - (faces.density[rows] + crowd) / 2
            rest[block] = weight
        self._leave_photos_out(faces, face, identity, share, similarity, rest)
        return similarity, rest

    def _leave_photos_out(
        self, faces: FaceVectors, face: Int64, identity: Int64, share: Float32, similarity: Float32, rest: Float32
    ) -> None:
        """Compute similarities and weights of faces that share an image anew, without all faces of their image."""
        shared = np.flatnonzero(faces.shares_photo[face] & (share > 0))
        if faces.photo is None or not len(shared):
            return
        # Sum the faces of each image and identity, to take them out of the identity.
        keys = faces.photo[face[shared]] * len(self.weight) + identity[shared]
        group_keys, group = np.unique(keys, return_inverse=True)
        pairs = LabelCandidates(face[shared], group, np.ones(len(shared), bool), len(group_keys))
        photos = IdentityCentres.from_shares(faces, pairs, share[shared])
        for at in range(0, len(shared), _BLOCK):
            block = shared[at : at + _BLOCK]
            photo = group[at : at + _BLOCK]
            rows = face[block]
            centres = identity[block]
            sums = self.sums[centres] - photos.sums[photo]
            weight = np.maximum(self.weight[centres] - photos.weight[photo], 0)
            divisor = np.maximum(weight, _MIN_SHARE)
            crowd = (self.crowd[centres] - photos.crowd[photo]) / divisor
            product = np.einsum("nd,nd->n", faces.vectors[rows], sums)
            similarity[block] = product / divisor - (faces.density[rows] + crowd) / 2
            rest[block] = weight
