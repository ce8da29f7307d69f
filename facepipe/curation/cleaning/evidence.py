"""How well each face fits the identities it might belong to: its own, and those of the faces that are near it."""

from dataclasses import dataclass

import numpy as np

from facepipe.nearest.similarity import Pairs
from facepipe.types import Bool, Float32, Int64

_BLOCK = 1 << 17
_NOBODY = np.float32(1e-3)


@dataclass(frozen=True)
class Candidates:
    """m pairs of a face and an identity it might belong to, sorted by face: face (m,), identity (m,), own (m,) whether
    it is the label given; count: of identities."""

    face: Int64
    identity: Int64
    own: Bool
    count: int

    def __len__(self) -> int:
        return len(self.face)


def candidates(label: Int64, pairs: Pairs) -> Candidates:
    """The label of each face (n,), -1 for none, and those of its neighbours."""
    count = int(label.max(initial=-1)) + 1
    faces = np.concatenate([np.arange(len(label)), pairs.u, pairs.v])
    names = np.concatenate([label, label[pairs.v], label[pairs.u]])
    key = np.unique((faces * max(1, count) + names)[names >= 0])
    face, identity = key // max(1, count), key % max(1, count)
    labelled = label[face] >= 0
    face, identity = face[labelled], identity[labelled]
    return Candidates(face, identity, identity == label[face], count)


@dataclass(frozen=True)
class Faces:
    """n faces: vectors (n, 128) of unit norm, density (n,)."""

    vectors: Float32
    density: Float32


@dataclass(frozen=True)
class Centres:
    """k identities: weighted sums (k, 128) of the vectors that belong to them, crowd (k,) of densities, weight (k,)."""

    sums: Float32
    crowd: Float32
    weight: Float32

    @classmethod
    def of(cls, faces: Faces, members: Candidates, share: Float32) -> "Centres":
        """Sums over candidates, each with the share (m,) to which the face belongs to the identity."""
        order = np.argsort(members.identity, kind="stable")
        order = order[share[order] > _NOBODY]
        sums = np.zeros((members.count, faces.vectors.shape[1]), np.float32)
        crowd, weight = np.zeros(members.count, np.float32), np.zeros(members.count, np.float32)
        for at in range(0, len(order), _BLOCK):
            part = order[at : at + _BLOCK]
            who, whose, much = members.face[part], members.identity[part], share[part]
            begins = np.flatnonzero(np.diff(whose, prepend=-1))
            sums[whose[begins]] += np.add.reduceat(faces.vectors[who] * much[:, None], begins, axis=0)
            crowd[whose[begins]] += np.add.reduceat(faces.density[who] * much, begins)
            weight[whose[begins]] += np.add.reduceat(much, begins)
        return cls(sums, crowd, weight)

    def fit(self, faces: Faces, face: Int64, identity: Int64, share: Float32) -> tuple[Float32, Float32]:
        """(mean similarity (m,) of faces to the rest of identities, weight (m,) of that rest); share (m,) is what each
        face itself has in the identity and is taken out."""
        similarity, rest = np.zeros(len(face), np.float32), np.zeros(len(face), np.float32)
        share = np.where(share > _NOBODY, share, np.float32(0))
        for at in range(0, len(face), _BLOCK):
            part = slice(at, at + _BLOCK)
            who, whose, much = face[part], identity[part], share[part]
            product = np.einsum("nd,nd->n", faces.vectors[who], self.sums[whose]) - much
            weight = np.maximum(self.weight[whose] - much, 0)
            solid = np.maximum(weight, _NOBODY)
            crowd = (self.crowd[whose] - much * faces.density[who]) / solid
            similarity[part] = product / solid - (faces.density[who] + crowd) / 2
            rest[part] = weight
        return similarity, rest
