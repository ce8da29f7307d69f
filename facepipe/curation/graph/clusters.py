"""Clusters of faces as sums, from which the mean similarity of any two of them is computed exactly."""

from dataclasses import dataclass

import numpy as np

from facepipe.types import Float32, Int32, Int64

_CHUNK = 1 << 13  # pairs whose linkage is computed at a time


@dataclass(frozen=True)
class Clusters:
    """Clusters by sums over their faces.

    Attributes:
        sums: Sums (k, dim) of the vectors.
        crowd: Sums (k,) of the densities.
        size: Faces (k,).
    """

    sums: Float32
    crowd: Float32
    size: Int64

    @classmethod
    def from_faces(cls, vectors: Float32, density: Float32) -> "Clusters":
        """Make every face a cluster. The vectors (n, dim) are not copied; they may be mapped from a file."""
        return cls(vectors, density, np.ones(len(vectors), np.int64))

    def __len__(self) -> int:
        return len(self.size)

    @property
    def means(self) -> Float32:
        """Mean vectors (k, dim). The longer one is, the more alike are the cluster's faces."""
        return np.asarray(self.sums / np.maximum(1, self.size)[:, None], np.float32)

    @property
    def density(self) -> Float32:
        """Mean densities (k,)."""
        return np.asarray(self.crowd / np.maximum(1, self.size), np.float32)

    def compute_linkage(self, u: Int64, v: Int64, margin: float = 0.0) -> Float32:
        """Compute the mean similarity (m,) over all pairs of faces between clusters u (m,) and v (m,).

        Args:
            u: one cluster per pair.
            v: the other cluster.
            margin: what large groups must have above single faces; see `compute_paired_linkage`.
        """
        linkage = np.empty(len(u), np.float32)
        for at in range(0, len(u), _CHUNK):
            part = slice(at, at + _CHUNK)
            linkage[part] = compute_paired_linkage(self.take(u[part]), self.take(v[part]), margin)
        return linkage

    def take(self, numbers: Int64 | Int32) -> "Clusters":
        """Copy some clusters (m,)."""
        return Clusters(np.asarray(self.sums[numbers]), self.crowd[numbers], self.size[numbers])

    def compute_cohesion(self) -> Float32:
        """Compute the mean cosine (k,) between two different faces of a cluster; 1 for single faces."""
        # The square of a sum holds every face with itself, 1 per face; the rest are pairs of different faces.
        squared = np.einsum("nd,nd->n", self.sums, self.sums)
        pairs = np.maximum(1, self.size * (self.size - 1))
        return np.where(self.size > 1, (squared - self.size) / pairs, 1).astype(np.float32)

    def merge(self, group: Int64) -> "Clusters":
        """Merge the clusters of each group. Groups (k,) are numbered from 0; so are the merged clusters."""
        count = int(group.max(initial=-1)) + 1
        order = np.argsort(group, kind="stable")
        first = order[np.searchsorted(group[order], np.arange(count))]
        # Most groups are of one cluster: start with the first of each, and add the others.
        sums = np.asarray(self.sums[first])
        crowd = self.crowd[first]
        is_other = np.ones(len(group), bool)
        is_other[first] = False
        others = np.flatnonzero(is_other)
        np.add.at(sums, group[others], self.sums[others])
        np.add.at(crowd, group[others], self.crowd[others])
        return Clusters(sums, crowd, np.bincount(group, self.size, count).astype(np.int64))


def compute_paired_linkage(left: Clusters, right: Clusters, margin: float = 0.0) -> Float32:
    """Compute the mean similarity (m,) over all pairs of faces between the clusters of each pair of rows.

    The mean between two large groups of one person hardly varies. The similarity of two single faces does. So a mean
    that makes one person of single faces may tell two large groups apart. Its variance falls with the faces of the
    smaller group. The margin is subtracted in that measure. It only grows as clusters do, so that the linkage stays
    reducible.

    Args:
        left: k clusters.
        right: k clusters.
        margin: what is subtracted for two groups of very many faces, nothing if one is a single face.
    """
    # The product of two sums is the sum of the products of all pairs.
    product = np.einsum("nd,nd->n", left.sums, right.sums)
    mean = (product / (left.size * right.size)).astype(np.float32)
    similarity = np.asarray(mean - (left.density + right.density) / 2, np.float32)
    if not margin:
        return similarity
    smaller = np.minimum(left.size, right.size).astype(np.float32)
    return np.asarray(similarity - np.float32(margin) * (1 - 1 / smaller), np.float32)
