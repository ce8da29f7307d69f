"""Average linkage on a sparse graph: exact means over all pairs of two clusters, merges in rounds.

The mean similarity of the faces of two clusters is the inner product of their mean vectors less the mean of their mean
densities, so it is exact whatever pairs the graph holds; the graph only says which clusters to look at. In a round
every two clusters that are each other's nearest are merged, which for a reducible linkage gives the same tree as
merging one pair at a time (Murtagh, 1983; Sumengen et al., arXiv 2105.11653).
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from facepipe.curation.graph.components import numbered
from facepipe.types import Float32, Int64

_CHUNK = 1 << 17
_PATIENT = 100  # rounds in which only mutual nearest are merged
_HASTE = np.float32(0.0002)  # then this much more slack each round: a large cluster takes in many at once


@dataclass(frozen=True)
class Clusters:
    """k clusters: sums (k, 128) of their faces' vectors, crowd (k,) sums of their densities, size (k,)."""

    sums: Float32
    crowd: Float32
    size: Int64

    @classmethod
    def single(cls, vectors: Float32, density: Float32) -> "Clusters":
        """Every face a cluster."""
        return cls(np.array(vectors, np.float32), np.array(density, np.float32), np.ones(len(vectors), np.int64))

    def __len__(self) -> int:
        return len(self.size)

    @property
    def means(self) -> Float32:
        """(k, 128) mean vectors; the longer, the more alike a cluster's faces are."""
        return np.asarray(self.sums / np.maximum(1, self.size)[:, None], np.float32)

    @property
    def density(self) -> Float32:
        """(k,) mean densities."""
        return np.asarray(self.crowd / np.maximum(1, self.size), np.float32)

    def linkage(self, u: Int64, v: Int64) -> Float32:
        """(m,) mean similarity over all pairs of faces between clusters u (m,) and v (m,)."""
        out = np.empty(len(u), np.float32)
        for at in range(0, len(u), _CHUNK):
            part = slice(at, at + _CHUNK)
            product = np.einsum("nd,nd->n", self.sums[u[part]], self.sums[v[part]])
            out[part] = product / (self.size[u[part]] * self.size[v[part]])
        return np.asarray(out - (self.density[u] + self.density[v]) / 2, np.float32)

    def cohesion(self) -> Float32:
        """(k,) mean cosine between two different faces of a cluster; 1 for single faces."""
        squared = np.einsum("nd,nd->n", self.sums, self.sums)
        pairs = np.maximum(1, self.size * (self.size - 1))
        return np.where(self.size > 1, (squared - self.size) / pairs, 1).astype(np.float32)

    def merged(self, group: Int64) -> "Clusters":
        """Clusters by their group's number (k,), numbered 0 to the largest."""
        count = int(group.max(initial=-1)) + 1
        order = np.argsort(group, kind="stable")
        begins = np.searchsorted(group[order], np.arange(count))
        sums, crowd = self.sums[order[begins]], self.crowd[order[begins]]  # most groups are of one
        rest = np.ones(len(group), bool)
        rest[order[begins]] = False
        more = np.flatnonzero(rest)
        np.add.at(sums, group[more], self.sums[more])
        np.add.at(crowd, group[more], self.crowd[more])
        return Clusters(sums, crowd, np.bincount(group, self.size, count).astype(np.int64))


def average_linkage(
    clusters: Clusters, u: Int64, v: Int64, threshold: float, forbidden: Int64 | None = None
) -> tuple[Int64, Clusters]:
    """Merge clusters while the mean similarity of two that an edge (u, v) joins reaches the threshold.

    `forbidden` (m, 2) are pairs of clusters that must not come together. Returns the group of each given cluster (k,),
    numbered by its smallest member, and the merged clusters.
    """
    state = _State(clusters, np.arange(len(clusters)), *_tidy(u, v, len(clusters)), np.empty(0, np.float32))
    state = replace(state, weight=clusters.linkage(state.u, state.v)).above(threshold)
    apart = np.empty((0, 2), np.int64) if forbidden is None else forbidden
    slack = np.float32(0)
    for round_ in range(1 << 30):
        state = state.without(apart)
        if not len(state.u):
            return state.group, state.clusters
        slack = _HASTE * max(0, round_ - _PATIENT)
        joined = _round(state, apart, slack)
        apart = joined[apart]
        state = state.merged(joined, threshold)
    raise AssertionError("every round merges two clusters")


@dataclass(frozen=True)
class _State:
    clusters: Clusters
    group: Int64
    u: Int64
    v: Int64
    weight: Float32

    def above(self, threshold: float) -> "_State":
        kept = self.weight >= threshold
        return replace(self, u=self.u[kept], v=self.v[kept], weight=self.weight[kept])

    def without(self, apart: Int64) -> "_State":
        if not len(apart) or not len(self.u):
            return self
        low, high = apart.min(axis=1), apart.max(axis=1)
        kept = ~np.isin(self.u * len(self.clusters) + self.v, low * len(self.clusters) + high)
        return replace(self, u=self.u[kept], v=self.v[kept], weight=self.weight[kept])

    def merged(self, joined: Int64, threshold: float) -> "_State":
        """After a merge only the edges of clusters that grew are computed again."""
        clusters = self.clusters.merged(joined)
        grown = np.bincount(joined, minlength=len(clusters)) > 1
        u, v = joined[self.u], joined[self.v]
        old = ~(grown[u] | grown[v])
        fresh_u, fresh_v = _tidy(u[~old], v[~old], len(clusters))
        fresh = _State(clusters, joined[self.group], fresh_u, fresh_v, clusters.linkage(fresh_u, fresh_v))
        fresh = fresh.above(threshold)
        low, high = np.minimum(u[old], v[old]), np.maximum(u[old], v[old])
        weight = np.concatenate([self.weight[old], fresh.weight])
        return _State(clusters, fresh.group, np.concatenate([low, fresh.u]), np.concatenate([high, fresh.v]), weight)


def _tidy(u: Int64, v: Int64, count: int) -> tuple[Int64, Int64]:
    """Every pair of different ends once, the smaller first."""
    different = u != v
    key = np.sort(np.minimum(u, v)[different] * count + np.maximum(u, v)[different])
    key = key[np.diff(key, prepend=-1) > 0]  # numpy's own `unique` hashes, at five times the cost
    return key // max(1, count), key % max(1, count)


def _round(state: _State, apart: Int64, slack: np.float32) -> Int64:
    """The group (k,) of each cluster after mutual nearest have merged, and with slack those that point at them."""
    count = len(state.clusters)
    a, b = np.concatenate([state.u, state.v]), np.concatenate([state.v, state.u])
    weight = np.concatenate([state.weight, state.weight])
    best = np.full(count, -np.inf, np.float32)
    np.maximum.at(best, a, weight)
    top = weight == best[a]
    nearest = np.full(count, count)
    np.minimum.at(nearest, a[top], b[top])  # of equally near ones the first
    open_ = np.flatnonzero(nearest < count)
    to = nearest[open_]
    mutual = np.zeros(count, bool)
    mutual[open_[nearest[to] == open_]] = True
    if not mutual.any():  # equal weights in a ring
        first = int(np.argmax(state.weight))
        return _groups(count, state.u[first : first + 1], state.v[first : first + 1])
    leaf = ~mutual[open_] & mutual[to] & (best[open_] >= best[to] - slack) if slack else np.zeros(len(open_), bool)
    chosen = mutual[open_] | leaf
    group = _groups(count, open_[chosen], to[chosen])
    clash = np.unique(group[apart[:, 0]][group[apart[:, 0]] == group[apart[:, 1]]])
    if clash.size:  # two leaves of one star that must not meet: only the mutual ones this time
        chosen &= mutual[open_] | ~np.isin(group[open_], clash)
        group = _groups(count, open_[chosen], to[chosen])
    return group


def _groups(count: int, u: Int64, v: Int64) -> Int64:
    """Connected components, numbered by their smallest member."""
    edges = coo_array((np.ones(len(u), np.int8), (u, v)), shape=(count, count))
    labels = connected_components(edges, directed=False)[1].astype(np.int64)
    return numbered(labels)
