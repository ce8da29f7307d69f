"""Assign new faces to existing clusters: to the most similar one if it is similar enough, else to new clusters."""

from dataclasses import dataclass, replace

import numpy as np

from facepipe.curation.clusters.placement import RUNNERS_UP, stand_out
from facepipe.curation.graph.clusters import Clusters
from facepipe.curation.graph.components import renumber_labels
from facepipe.curation.graph.linkage import merge_by_average_linkage
from facepipe.nearest.faiss_engine import faiss
from facepipe.nearest.join import find_candidate_pairs
from facepipe.types import Bool, Float32, Int32, Int64

_BLOCK = 65536  # clusters, or pairs, that are compared at a time
_MAX_NEIGHBOURS = 32
_RANKS = RUNNERS_UP + 1
_UNREACHABLE = np.float32(1e3)  # the density of a cluster that nothing is near


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

    def take(self, chosen: Int64) -> "NearClusters":
        """Return the pairs of some faces (m,), which are numbered by their place in the choice."""
        position = np.full(len(self.is_compared_with_all), -1, np.int64)
        position[chosen] = np.arange(len(chosen))
        at = position[self.face]
        return NearClusters(at[at >= 0], self.cluster[at >= 0], self.is_compared_with_all[chosen])

    def unite(self, unit: Int64) -> "NearClusters":
        """Renumber the pairs by the units (n,) of the faces. Units of several faces are compared with all clusters."""
        is_several = np.bincount(unit) > 1
        is_compared_with_all = is_several.copy()
        is_compared_with_all[unit[self.is_compared_with_all]] = True
        kept = ~is_several[unit[self.face]]
        return NearClusters(unit[self.face[kept]], self.cluster[kept], is_compared_with_all)


@dataclass(frozen=True)
class DecidedPlaces:
    """What people have decided on n new faces and k existing clusters.

    Attributes:
        cluster: Position of the existing cluster that a face is known to belong to, (n,), -1 if that is not known.
        person: Number of the name of each face, (n,), -1 for none.
        person_of_cluster: Number of the name of each existing cluster, (k,), -1 for none.
        excluded: Pairs of a face and an existing cluster that is another person, (m, 2). Two names need no pair.
    """

    cluster: Int64
    person: Int32
    person_of_cluster: Int32
    excluded: Int64

    @classmethod
    def make_empty(cls, faces: int, clusters: int) -> "DecidedPlaces":
        """Say nothing about any face."""
        nobody = np.full(faces, -1, np.int32)
        return cls(np.full(faces, -1, np.int64), nobody, np.full(clusters, -1, np.int32), np.empty((0, 2), np.int64))

    def find_strangers(self, chosen: Int64) -> Int64:
        """Find the faces (m,) whose chosen cluster (n,) is another person."""
        named = np.flatnonzero((self.person >= 0) & (chosen >= 0))
        owner = self.person_of_cluster[chosen[named]]
        return named[(owner >= 0) & (owner != self.person[named])]

    def find_rivals(self, chosen: Int64, similarity: Float32) -> Int64:
        """Find the faces (m,) that another person outdoes who has chosen (n,) the same cluster, by similarity (n,)."""
        named = np.flatnonzero((self.person >= 0) & (chosen >= 0))
        order = named[np.lexsort((named, -similarity[named], chosen[named]))]
        is_first = np.diff(chosen[order], prepend=-1) > 0
        winner = self.person[order[is_first]][np.cumsum(is_first) - 1]
        return np.asarray(order[self.person[order] != winner], np.int64)


def assign_faces(
    faces: Clusters,
    known: Clusters,
    threshold: float,
    different: Int64,
    *,
    excluded: Int64 | None = None,
    near: NearClusters | None = None,
    min_lead: float = float("-inf"),
    unfit: Bool | None = None,
    waiting: Int64 | None = None,
    decided: DecidedPlaces | None = None,
) -> FacePlacement:
    """Assign new faces to clusters.

    First each face joins the existing cluster that it is most similar to, on average over that cluster's faces. The
    rest are clustered among themselves. Existing clusters are never merged.

    Args:
        faces: n new faces, as clusters of one. Faces that are known to be one person are one cluster.
        known: k existing clusters.
        threshold: mean similarity from which a face belongs to a cluster, and new faces are one person.
        different: pairs of new faces that are two persons, (m, 2).
        excluded: pairs of a new face and an existing cluster that it cannot belong to, (m, 2).
        near: which clusters to compare with, all by default.
        min_lead: how much an existing cluster must stand out from the next ones for a face to join it.
        unfit: whether a face is cut or poor, (n,). Two such faces found no person: they join a cluster with a fit face,
            or are alone.
        waiting: sorted numbers of existing clusters that hold no fit face.
        decided: what people have said about the faces and the clusters. It holds exactly.
    """
    places = decided or DecidedPlaces.make_empty(len(faces), len(known))
    is_unfit = np.zeros(len(faces), bool) if unfit is None else unfit
    best, nearest = _find_nearest_fit(faces, known, near, is_unfit, waiting)
    similarity = nearest[:, 0]
    chosen = np.where((similarity >= threshold) & (stand_out(nearest) >= min_lead), best, -1)
    for pairs in (excluded, places.excluded):
        if pairs is not None:
            is_clash = chosen[pairs[:, 0]] == pairs[:, 1]
            chosen[pairs[is_clash, 0]] = -1
    # Faces whose cluster is known go there, and no face of another person.
    is_fixed = places.cluster >= 0
    chosen = np.where(is_fixed, places.cluster, chosen)
    similarity = np.where(is_fixed, np.float32(np.inf), similarity)
    chosen[places.find_strangers(chosen)] = -1
    # Of two persons that want the same cluster the more similar one gets it.
    chosen[places.find_rivals(chosen, similarity)] = -1
    for first, second in different:
        if chosen[first] >= 0 and chosen[first] == chosen[second]:
            loser = second if similarity[first] >= similarity[second] else first
            if not is_fixed[loser]:
                chosen[loser] = -1
    # Cluster the rest.
    unassigned = np.flatnonzero(chosen < 0)
    new = np.full(len(faces), -1, np.int64)
    if len(unassigned):
        rest = _take(faces, unassigned)
        u, v = find_candidate_pairs(rest.means, rest.density, threshold, _MAX_NEIGHBOURS)
        is_founding = ~(is_unfit[unassigned][u] | is_unfit[unassigned][v])
        u = u[is_founding]
        v = v[is_founding]
        position = np.full(len(faces), -1, np.int64)
        position[unassigned] = np.arange(len(unassigned))
        pairs = position[different]
        forbidden = pairs[(pairs >= 0).all(axis=1)]
        person = places.person[unassigned]
        group, _ = merge_by_average_linkage(rest, u, v, threshold, forbidden, person=person)
        new[unassigned] = renumber_labels(group)
    return FacePlacement(chosen, new)


def _take(clusters: Clusters, chosen: Int64 | slice) -> Clusters:
    return Clusters(clusters.sums[chosen], clusters.crowd[chosen], clusters.size[chosen])


def _find_nearest_fit(
    faces: Clusters, known: Clusters, near: NearClusters | None, is_unfit: Bool, waiting: Int64 | None
) -> tuple[Int64, Float32]:
    """Find the most similar existing cluster (n,), -1 if there is none, and the highest similarities (n, 10), falling.

    Unfit faces are not compared with clusters that hold no fit face.
    """
    if waiting is None or not len(waiting) or not is_unfit.any():
        return _find_nearest(faces, known) if near is None else _find_nearest_listed(faces, known, near)
    best = np.full(len(faces), -1, np.int64)
    nearest = np.full((len(faces), _RANKS), -np.inf, np.float32)
    crowd = known.crowd.copy()
    crowd[waiting] = _UNREACHABLE * known.size[waiting]
    fit_only = replace(known, crowd=crowd)
    for chosen, clusters in ((np.flatnonzero(~is_unfit), known), (np.flatnonzero(is_unfit), fit_only)):
        some = _take(faces, chosen)
        if near is None:
            best[chosen], nearest[chosen] = _find_nearest(some, clusters)
        else:
            best[chosen], nearest[chosen] = _find_nearest_listed(some, clusters, near.take(chosen))
    return best, nearest


def _find_nearest(faces: Clusters, known: Clusters) -> tuple[Int64, Float32]:
    """Compare faces with all clusters: the best (n,), -1 if there is none, and the highest similarities (n, 10)."""
    value = np.full((len(faces), _RANKS), -np.inf, np.float32)
    number = np.full((len(faces), _RANKS), -1, np.int64)
    queries = _widen(faces.means, np.ones(len(faces), np.float32))
    for start in range(0, len(known) if len(faces) else 0, _BLOCK):
        block = _take(known, slice(start, start + _BLOCK))
        # One column more makes the product of two rows their similarity, except for the face's own density.
        rows = _widen(block.means, np.asarray(block.density / -2, np.float32))
        ranks = min(_RANKS, len(block))
        block_value, block_number = faiss.knn(queries, rows, ranks, metric=faiss.METRIC_INNER_PRODUCT)
        values = np.concatenate([value, block_value], axis=1)
        numbers = np.concatenate([number, block_number + start], axis=1)
        order = np.argsort(-values, axis=1, kind="stable")[:, :_RANKS]
        value = np.take_along_axis(values, order, axis=1)
        number = np.take_along_axis(numbers, order, axis=1)
    return number[:, 0], _forget_unreachable(np.asarray(value - faces.density[:, None] / 2, np.float32))


def _forget_unreachable(similarity: Float32) -> Float32:
    """Replace similarities to clusters that nothing is near by minus infinity: they are no competitors."""
    return np.where(similarity < -_UNREACHABLE / 4, np.float32(-np.inf), similarity)


def _widen(vectors: Float32, last: Float32) -> Float32:
    """Append a column. The rows get 132 numbers, so that they begin at full registers."""
    wide = np.zeros((len(vectors), vectors.shape[1] + 4), np.float32)
    wide[:, : vectors.shape[1]] = vectors
    wide[:, -1] = last
    return wide


def _find_nearest_listed(faces: Clusters, known: Clusters, near: NearClusters) -> tuple[Int64, Float32]:
    """Do as `_find_nearest`, among the clusters that are near each face."""
    nearest = np.full((len(faces), _RANKS), -np.inf, np.float32)
    best = np.full(len(faces), -1, np.int64)
    pair_similarity = _compute_similarity(faces, known, near)
    # The most similar cluster of each face comes first, of equal ones the smallest number.
    order = np.lexsort((near.cluster, -pair_similarity, near.face))
    face = near.face[order]
    rank = np.arange(len(order)) - np.searchsorted(face, face)
    first = order[rank == 0]
    best[near.face[first]] = near.cluster[first]
    is_ranked = rank < _RANKS
    nearest[face[is_ranked], rank[is_ranked]] = pair_similarity[order[is_ranked]]
    nearest = _forget_unreachable(nearest)
    # Faces with too few near clusters are compared with all.
    rest = np.flatnonzero(near.is_compared_with_all)
    if len(rest):
        best[rest], nearest[rest] = _find_nearest(_take(faces, rest), known)
    return best, nearest


def _compute_similarity(faces: Clusters, known: Clusters, near: NearClusters) -> Float32:
    """Compute the mean similarity (m,) of pairs of a face and an existing cluster."""
    similarity = np.empty(len(near.face), np.float32)
    means = faces.means
    density = faces.density
    for start in range(0, len(similarity), _BLOCK):
        block = slice(start, start + _BLOCK)
        u = near.face[block]
        v = near.cluster[block]
        size = np.maximum(1, known.size[v])
        product = np.einsum("nd,nd->n", means[u], known.sums[v]) - known.crowd[v] / 2
        similarity[block] = product / size - density[u] / 2
    return similarity
