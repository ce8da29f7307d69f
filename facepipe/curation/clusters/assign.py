"""New faces into clusters that there are: the nearest cluster where it is near enough, otherwise among themselves."""

from dataclasses import dataclass

import numpy as np

from facepipe.curation.graph.components import numbered
from facepipe.curation.graph.linkage import Clusters, average_linkage
from facepipe.nearest.faiss_engine import faiss
from facepipe.nearest.join import find_candidate_pairs
from facepipe.types import Bool, Float32, Int64

_COLUMNS = 65536  # clusters, or pairs, looked at in one go
_NEIGHBOURS = 32


@dataclass(frozen=True)
class Placed:
    """cluster (n,): position among the old clusters, or -1; own (n,): number of a new cluster, or -1."""

    cluster: Int64
    own: Int64


@dataclass(frozen=True)
class Near:
    """Which known clusters new faces are compared with: pairs (face (m,), cluster (m,)); everywhere (n,): faces that
    are compared with all."""

    face: Int64
    cluster: Int64
    everywhere: Bool


def assign(
    faces: Clusters,
    known: Clusters,
    threshold: float,
    apart: Int64,
    taken: Int64 | None = None,
    near: Near | None = None,
) -> Placed:
    """Place n new faces (clusters of one); apart (m, 2) are pairs of them that are two persons, taken (m, 2) pairs of
    a new face and a known cluster that cannot be its own; near: where to look, everywhere by default.

    First each joins the known cluster it is nearest to, on average over that cluster's faces; the rest are clustered
    among themselves. Known clusters are never merged.
    """
    nearest, similarity = _nearest(faces, known) if near is None else _nearest_of(faces, known, near)
    chosen = np.where(similarity >= threshold, nearest, -1)
    if taken is not None:
        clash = chosen[taken[:, 0]] == taken[:, 1]
        chosen[taken[clash, 0]] = -1
    for first, second in apart:  # the better of two that want the same place has it
        if chosen[first] >= 0 and chosen[first] == chosen[second]:
            chosen[second if similarity[first] >= similarity[second] else first] = -1
    left = np.flatnonzero(chosen < 0)
    own = np.full(len(faces), -1, np.int64)
    if len(left):
        rest = Clusters(faces.sums[left], faces.crowd[left], faces.size[left])
        u, v = find_candidate_pairs(rest.means, rest.density, threshold, _NEIGHBOURS)
        place = np.full(len(faces), -1, np.int64)
        place[left] = np.arange(len(left))
        both = place[apart]
        forbidden = both[(both >= 0).all(axis=1)]
        own[left] = numbered(average_linkage(rest, u, v, threshold, forbidden)[0])
    return Placed(chosen, own)


def _nearest(faces: Clusters, known: Clusters) -> tuple[Int64, Float32]:
    """(the most similar known cluster (n,), -1 where there is none; the similarity (n,))."""
    best, at = np.full(len(faces), -np.inf, np.float32), np.full(len(faces), -1, np.int64)
    queries = _widened(faces.sums, np.ones(len(faces), np.float32))
    for column in range(0, len(known) if len(faces) else 0, _COLUMNS):
        part = slice(column, column + _COLUMNS)
        some = Clusters(known.sums[part], known.crowd[part], known.size[part])
        # One column more makes the product of two rows their similarity, but for the face's own density.
        rows = _widened(some.means, np.asarray(some.density / -2, np.float32))
        value, top = faiss.knn(queries, rows, 1, metric=faiss.METRIC_INNER_PRODUCT)
        better = value[:, 0] > best
        best, at = np.where(better, value[:, 0], best), np.where(better, top[:, 0] + column, at)
    return at, np.asarray(best - faces.crowd / 2, np.float32)


def _widened(vectors: Float32, last: Float32) -> Float32:
    out = np.zeros((len(vectors), vectors.shape[1] + 4), np.float32)  # 132 columns: rows begin at full registers
    out[:, : vectors.shape[1]], out[:, -1] = vectors, last
    return out


def _nearest_of(faces: Clusters, known: Clusters, near: Near) -> tuple[Int64, Float32]:
    """The same, among the clusters that are near each face."""
    best, at = np.full(len(faces), -np.inf, np.float32), np.full(len(faces), -1, np.int64)
    value = _similarity(faces, known, near)
    order = np.lexsort((near.cluster, -value, near.face))
    first = order[np.flatnonzero(np.diff(near.face[order], prepend=-1))]
    best[near.face[first]], at[near.face[first]] = value[first], near.cluster[first]
    rest = np.flatnonzero(near.everywhere)
    if len(rest):
        at[rest], best[rest] = _nearest(Clusters(faces.sums[rest], faces.crowd[rest], faces.size[rest]), known)
    return at, best


def _similarity(faces: Clusters, known: Clusters, near: Near) -> Float32:
    """(m,) of pairs of a face and a known cluster."""
    out = np.empty(len(near.face), np.float32)
    for begin in range(0, len(out), _COLUMNS):
        u, v = near.face[begin : begin + _COLUMNS], near.cluster[begin : begin + _COLUMNS]
        size = np.maximum(1, known.size[v])
        product = np.einsum("nd,nd->n", faces.sums[u], known.sums[v]) - known.crowd[v] / 2
        out[begin : begin + _COLUMNS] = product / size - faces.crowd[u] / 2
    return out
