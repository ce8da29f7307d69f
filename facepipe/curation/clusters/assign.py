"""Assign new faces to existing clusters: to the most similar one if it is similar enough, else to new clusters."""

from dataclasses import dataclass

import numpy as np

from facepipe.curation.graph.clusters import Clusters
from facepipe.curation.graph.components import renumber_labels
from facepipe.curation.graph.linkage import merge_by_average_linkage
from facepipe.nearest.faiss_engine import faiss
from facepipe.nearest.join import find_candidate_pairs
from facepipe.types import Bool, Float32, Int64

_BLOCK = 65536  # clusters, or pairs, that are compared at a time
_MAX_NEIGHBOURS = 32


@dataclass(frozen=True)
class FacePlacement:
    """Where n new faces belong.

    Attributes:
        known: Position of the existing cluster, (n,), or -1.
        new: Number of the new cluster, (n,), or -1.
    """

    known: Int64
    new: Int64

    @property
    def new_count(self) -> int:
        """Number of new clusters."""
        return int(self.new.max(initial=-1)) + 1


@dataclass(frozen=True)
class NearClusters:
    """Which existing clusters new faces are compared with.

    Attributes:
        face: Position of the face of each pair, (m,).
        cluster: Position of its cluster, (m,).
        is_compared_with_all: Whether a face is compared with all clusters instead, (n,).
    """

    face: Int64
    cluster: Int64
    is_compared_with_all: Bool


def assign_faces(
    faces: Clusters,
    known: Clusters,
    threshold: float,
    different: Int64,
    *,
    excluded: Int64 | None = None,
    near: NearClusters | None = None,
) -> FacePlacement:
    """Assign new faces to clusters.

    First each face joins the existing cluster that it is most similar to, on average over that cluster's faces. The
    rest are clustered among themselves. Existing clusters are never merged.

    Args:
        faces: n new faces, as clusters of one.
        known: k existing clusters.
        threshold: mean similarity from which a face belongs to a cluster.
        different: pairs of new faces that are two persons, (m, 2).
        excluded: pairs of a new face and an existing cluster that it cannot belong to, (m, 2).
        near: which clusters to compare with, all by default.
    """
    best, similarity = _find_best(faces, known) if near is None else _find_best_near(faces, known, near)
    chosen = np.where(similarity >= threshold, best, -1)
    if excluded is not None:
        is_clash = chosen[excluded[:, 0]] == excluded[:, 1]
        chosen[excluded[is_clash, 0]] = -1
    # Of two persons that want the same cluster the more similar one gets it.
    for first, second in different:
        if chosen[first] >= 0 and chosen[first] == chosen[second]:
            chosen[second if similarity[first] >= similarity[second] else first] = -1
    # Cluster the rest.
    unassigned = np.flatnonzero(chosen < 0)
    new = np.full(len(faces), -1, np.int64)
    if len(unassigned):
        rest = _take(faces, unassigned)
        u, v = find_candidate_pairs(rest.means, rest.density, threshold, _MAX_NEIGHBOURS)
        position = np.full(len(faces), -1, np.int64)
        position[unassigned] = np.arange(len(unassigned))
        pairs = position[different]
        forbidden = pairs[(pairs >= 0).all(axis=1)]
        new[unassigned] = renumber_labels(merge_by_average_linkage(rest, u, v, threshold, forbidden)[0])
    return FacePlacement(chosen, new)


def _take(clusters: Clusters, chosen: Int64 | slice) -> Clusters:
    return Clusters(clusters.sums[chosen], clusters.crowd[chosen], clusters.size[chosen])


def _find_best(faces: Clusters, known: Clusters) -> tuple[Int64, Float32]:
    """Find the most similar existing cluster (n,), -1 if there is none, and the similarity (n,)."""
    value = np.full(len(faces), -np.inf, np.float32)
    best = np.full(len(faces), -1, np.int64)
    queries = _widen(faces.sums, np.ones(len(faces), np.float32))
    for start in range(0, len(known) if len(faces) else 0, _BLOCK):
        block = _take(known, slice(start, start + _BLOCK))
        # One column more makes the product of two rows their similarity, except for the face's own density.
        rows = _widen(block.means, np.asarray(block.density / -2, np.float32))
        block_value, block_best = faiss.knn(queries, rows, 1, metric=faiss.METRIC_INNER_PRODUCT)
        is_better = block_value[:, 0] > value
        best = np.where(is_better, block_best[:, 0] + start, best)
        value = np.where(is_better, block_value[:, 0], value)
    return best, np.asarray(value - faces.crowd / 2, np.float32)


def _widen(vectors: Float32, last: Float32) -> Float32:
    """Append a column. The rows get 132 numbers, so that they begin at full registers."""
    wide = np.zeros((len(vectors), vectors.shape[1] + 4), np.float32)
    wide[:, : vectors.shape[1]] = vectors
    wide[:, -1] = last
    return wide


def _find_best_near(faces: Clusters, known: Clusters, near: NearClusters) -> tuple[Int64, Float32]:
    """Do as `_find_best`, among the clusters that are near each face."""
    similarity = np.full(len(faces), -np.inf, np.float32)
    best = np.full(len(faces), -1, np.int64)
    pair_similarity = _compute_similarity(faces, known, near)
    # The most similar cluster of each face comes first, of equal ones the smallest number.
    order = np.lexsort((near.cluster, -pair_similarity, near.face))
    first = order[np.flatnonzero(np.diff(near.face[order], prepend=-1))]
    best[near.face[first]] = near.cluster[first]
    similarity[near.face[first]] = pair_similarity[first]
    # Faces with too few near clusters are compared with all.
    rest = np.flatnonzero(near.is_compared_with_all)
    if len(rest):
        best[rest], similarity[rest] = _find_best(_take(faces, rest), known)
    return best, similarity


def _compute_similarity(faces: Clusters, known: Clusters, near: NearClusters) -> Float32:
    """Compute the mean similarity (m,) of pairs of a face and an existing cluster."""
    similarity = np.empty(len(near.face), np.float32)
    for start in range(0, len(similarity), _BLOCK):
        block = slice(start, start + _BLOCK)
        u = near.face[block]
        v = near.cluster[block]
        size = np.maximum(1, known.size[v])
        product = np.einsum("nd,nd->n", faces.sums[u], known.sums[v]) - known.crowd[v] / 2
        similarity[block] = product / size - faces.crowd[u] / 2
    return similarity
