"""Average linkage on a sparse graph: exact means over all pairs of two clusters, merges in rounds.

The mean similarity of the faces of two clusters is the inner product of their mean vectors less the mean of their mean
densities. So it is exact whatever pairs the graph holds; the graph only says which clusters to look at. A round merges
every two clusters that are each other's nearest. For a reducible linkage this gives the same tree as merging one pair
at a time (Murtagh, 1983; Sumengen et al., arXiv 2105.11653).
"""

from dataclasses import dataclass, replace

import numpy as np

from facepipe.curation.graph.components import find_components
from facepipe.types import Float32, Int64

_CHUNK = 1 << 17  # pairs whose linkage is computed at a time
_STRICT_ROUNDS = 100  # rounds in which only mutual nearest are merged
_SLACK_PER_ROUND = np.float32(0.0002)  # then this much more slack per round: a large cluster takes in many at once


@dataclass(frozen=True)
class Clusters:
    """Clusters by sums over their faces.

    Attributes:
        sums: Sums (k, 128) of the vectors.
        crowd: Sums (k,) of the densities.
        size: Faces (k,).
    """

    sums: Float32
    crowd: Float32
    size: Int64

    @classmethod
    def from_faces(cls, vectors: Float32, density: Float32) -> "Clusters":
        """Make every face a cluster."""
        return cls(np.array(vectors, np.float32), np.array(density, np.float32), np.ones(len(vectors), np.int64))

    def __len__(self) -> int:
        return len(self.size)

    @property
    def means(self) -> Float32:
        """Mean vectors (k, 128). The longer one is, the more alike are the cluster's faces."""
        return np.asarray(self.sums / np.maximum(1, self.size)[:, None], np.float32)

    @property
    def density(self) -> Float32:
        """Mean densities (k,)."""
        return np.asarray(self.crowd / np.maximum(1, self.size), np.float32)

    def compute_linkage(self, u: Int64, v: Int64) -> Float32:
        """Compute the mean similarity (m,) over all pairs of faces between clusters u (m,) and v (m,)."""
        linkage = np.empty(len(u), np.float32)
        for at in range(0, len(u), _CHUNK):
            part = slice(at, at + _CHUNK)
            # The product of two sums is the sum of the products of all pairs.
            product = np.einsum("nd,nd->n", self.sums[u[part]], self.sums[v[part]])
            linkage[part] = product / (self.size[u[part]] * self.size[v[part]])
        return np.asarray(linkage - (self.density[u] + self.density[v]) / 2, np.float32)

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
        sums = self.sums[first]
        crowd = self.crowd[first]
        is_other = np.ones(len(group), bool)
        is_other[first] = False
        others = np.flatnonzero(is_other)
        np.add.at(sums, group[others], self.sums[others])
        np.add.at(crowd, group[others], self.crowd[others])
        return Clusters(sums, crowd, np.bincount(group, self.size, count).astype(np.int64))


def merge_by_average_linkage(
    clusters: Clusters, u: Int64, v: Int64, threshold: float, forbidden: Int64 | None = None
) -> tuple[Int64, Clusters]:
    """Merge clusters while the mean similarity of two that an edge joins reaches the threshold.

    Args:
        clusters: k clusters.
        u: one cluster per edge, (m,).
        v: the other cluster, (m,).
        threshold: similarity.
        forbidden: pairs (p, 2) of clusters that must not come together.

    Returns:
        The group (k,) of each cluster, numbered by its smallest member, and the merged clusters.
    """
    u, v = _tidy_edges(u, v, len(clusters))
    state = _LinkageState(clusters, np.arange(len(clusters)), u, v, clusters.compute_linkage(u, v))
    # Only edges that reach the threshold are kept, now and after each merge.
    state = state.keep_above(threshold)
    apart = np.empty((0, 2), np.int64) if forbidden is None else forbidden
    round_ = 0
    while True:
        state = state.drop_forbidden(apart)
        if not len(state.u):
            return state.group, state.clusters
        # Slack shortens long series of rounds that merge one face each.
        slack = _SLACK_PER_ROUND * max(0, round_ - _STRICT_ROUNDS)
        merged = _find_merges(state, apart, slack)
        apart = merged[apart]
        state = state.merge(merged, threshold)
        round_ += 1


@dataclass(frozen=True)
class _LinkageState:
    """The clusters between two rounds.

    Attributes:
        clusters: k clusters.
        group: The cluster (n,) of each cluster at the start.
        u: One cluster per edge, (m,); u < v.
        v: The other cluster, (m,).
        weight: Mean similarity (m,).
    """

    clusters: Clusters
    group: Int64
    u: Int64
    v: Int64
    weight: Float32

    def keep_above(self, threshold: float) -> "_LinkageState":
        kept = self.weight >= threshold
        return replace(self, u=self.u[kept], v=self.v[kept], weight=self.weight[kept])

    def drop_forbidden(self, apart: Int64) -> "_LinkageState":
        if not len(apart) or not len(self.u):
            return self
        count = len(self.clusters)
        forbidden_keys = apart.min(axis=1) * count + apart.max(axis=1)
        kept = ~np.isin(self.u * count + self.v, forbidden_keys)
        return replace(self, u=self.u[kept], v=self.v[kept], weight=self.weight[kept])

    def merge(self, merged: Int64, threshold: float) -> "_LinkageState":
        """Merge clusters (k,) into new ones. Only the edges of clusters that grew are computed again."""
        clusters = self.clusters.merge(merged)
        has_grown = np.bincount(merged, minlength=len(clusters)) > 1
        u = merged[self.u]
        v = merged[self.v]
        # Edges between unchanged clusters keep their weight; the others are made unique and computed again.
        unchanged = ~(has_grown[u] | has_grown[v])
        fresh_u, fresh_v = _tidy_edges(u[~unchanged], v[~unchanged], len(clusters))
        group = merged[self.group]
        fresh = _LinkageState(clusters, group, fresh_u, fresh_v, clusters.compute_linkage(fresh_u, fresh_v))
        fresh = fresh.keep_above(threshold)
        low = np.minimum(u[unchanged], v[unchanged])
        high = np.maximum(u[unchanged], v[unchanged])
        return _LinkageState(
            clusters,
            group,
            np.concatenate([low, fresh.u]),
            np.concatenate([high, fresh.v]),
            np.concatenate([self.weight[unchanged], fresh.weight]),
        )


def _tidy_edges(u: Int64, v: Int64, count: int) -> tuple[Int64, Int64]:
    """Keep every edge between two different clusters once, the smaller one first."""
    different = u != v
    # One integer per edge, sorted so that repeated ones follow each other.
    keys = np.sort(np.minimum(u, v)[different] * count + np.maximum(u, v)[different])
    keys = keys[np.diff(keys, prepend=-1) > 0]  # numpy's own `unique` hashes, at five times the cost
    return keys // max(1, count), keys % max(1, count)


def _find_merges(state: _LinkageState, apart: Int64, slack: np.float32) -> Int64:
    """Find the clusters to merge in a round: mutual nearest, and with slack those that point at one of these.

    Args:
        state: the clusters and their edges.
        apart: pairs of clusters that must not come together.
        slack: how much less similar a cluster may be to its nearest than that one is to its own nearest.

    Returns:
        The new cluster (k,) of each cluster.
    """
    count = len(state.clusters)
    # The nearest of each cluster over the edges in both directions; of equally near ones the first.
    a = np.concatenate([state.u, state.v])
    b = np.concatenate([state.v, state.u])
    weight = np.concatenate([state.weight, state.weight])
    best = np.full(count, -np.inf, np.float32)
    np.maximum.at(best, a, weight)
    is_best = weight == best[a]
    nearest = np.full(count, count)
    np.minimum.at(nearest, a[is_best], b[is_best])

    active = np.flatnonzero(nearest < count)
    targets = nearest[active]
    is_mutual = np.zeros(count, bool)
    is_mutual[active[nearest[targets] == active]] = True
    if not is_mutual.any():  # equal weights in a ring
        first = int(np.argmax(state.weight))
        return find_components(count, state.u[first : first + 1], state.v[first : first + 1])

    # Leaves point at one of a mutual pair, and are nearly as near to it as the pair is.
    is_leaf = np.zeros(len(active), bool)
    if slack:
        is_leaf = ~is_mutual[active] & is_mutual[targets] & (best[active] >= best[targets] - slack)
    chosen = is_mutual[active] | is_leaf
    group = find_components(count, active[chosen], targets[chosen])
    clashes = np.unique(group[apart[:, 0]][group[apart[:, 0]] == group[apart[:, 1]]])
    if clashes.size:  # two leaves of one star that must not meet: only the mutual ones this time
        chosen &= is_mutual[active] | ~np.isin(group[active], clashes)
        group = find_components(count, active[chosen], targets[chosen])
    return group
