"""New faces into clusters that there are: the nearest cluster where it is near enough, otherwise among themselves."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from facepipe.clusters.components import numbered
from facepipe.clusters.linkage import Clusters, average_linkage
from facepipe.graph.pairs import candidates

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
_ROWS, _COLUMNS = 1024, 65536
_NEIGHBOURS = 32


@dataclass(frozen=True)
class Placed:
    """cluster (n,): position among the old clusters, or -1; own (n,): number of a new cluster, or -1."""

    cluster: Ids
    own: Ids


def assign(faces: Clusters, known: Clusters, threshold: float, apart: Ids, taken: Ids | None = None) -> Placed:
    """Place n new faces (clusters of one); apart (m, 2) are pairs of them that are two persons, taken (m, 2) pairs of
    a new face and a known cluster that cannot be its own.

    First each joins the known cluster it is nearest to, on average over that cluster's faces; the rest are clustered
    among themselves. Known clusters are never merged.
    """
    nearest, similarity = _nearest(faces, known)
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
        u, v = candidates(rest.means, rest.density, threshold, _NEIGHBOURS)
        place = np.full(len(faces), -1, np.int64)
        place[left] = np.arange(len(left))
        both = place[apart]
        forbidden = both[(both >= 0).all(axis=1)]
        own[left] = numbered(average_linkage(rest, u, v, threshold, forbidden)[0])
    return Placed(chosen, own)


def _nearest(faces: Clusters, known: Clusters) -> tuple[Ids, Floats]:
    """(the most similar known cluster (n,), -1 where there is none; the similarity (n,))."""
    best, at = np.full(len(faces), -np.inf, np.float32), np.full(len(faces), -1, np.int64)
    for column in range(0, len(known), _COLUMNS):
        part = slice(column, column + _COLUMNS)
        means, density = known.means[part], known.density[part]
        for row in range(0, len(faces), _ROWS):
            rows = slice(row, row + _ROWS)
            product = faces.sums[rows] @ means.T - (faces.crowd[rows, None] + density) / 2
            top = product.argmax(axis=1)
            value = product[np.arange(len(top)), top]
            better = value > best[rows]
            best[rows], at[rows] = np.where(better, value, best[rows]), np.where(better, top + column, at[rows])
    return at, best
