"""Merge clusters in rounds: in each, every two clusters that are each other's nearest.

For a reducible linkage this gives the same tree as merging one pair at a time (Murtagh, 1983; Sumengen et al.,
arXiv 2105.11653).
"""

from dataclasses import dataclass, replace

import numpy as np

from facepipe.curation.graph.cannot_links import CannotLinks
from facepipe.curation.graph.clusters import Clusters
from facepipe.curation.graph.components import find_components
from facepipe.types import Float32, Int32, Int64

_STRICT_ROUNDS = 100  # rounds in which only mutual nearest are merged
_EDGES_PER_BLOCK = 1 << 18  # edges that are numbered at a time
_SLACK_PER_ROUND = np.float32(0.0002)  # then this much more slack per round: a large cluster takes in many at once


def merge_in_rounds(
    clusters: Clusters,
    u: Int64,
    v: Int64,
    weight: Float32,
    threshold: float,
    apart: CannotLinks,
    margin: float = 0.0,
) -> tuple[Int64, Clusters]:
    """Merge clusters while the mean similarity of two that an edge joins reaches the threshold.

    What one connected component becomes does not depend on the others, so that components can be merged apart.

    Args:
        clusters: k clusters.
        u: one cluster per edge, (m,). An edge comes once, and has u < v.
        v: the other cluster, (m,).
        weight: mean similarity of the two, (m,).
        threshold: similarity.
        apart: what must not come together.
        margin: what large groups must have above single faces; the weights are less that.

    Returns:
        The group (k,) of each cluster, numbered by its smallest member, and the merged clusters.
    """
    state = _LinkageState(clusters, np.arange(len(clusters)), u, v, weight, margin)
    # Only edges that reach the threshold are kept, now and after each merge.
    state = state.keep_above(threshold)
    round_ = 0
    while True:
        state = state.drop_forbidden(apart)
        if not len(state.u):
            return state.group, state.clusters
        # Slack shortens long series of rounds that merge one face each. In every round each component that still has
        # an edge merges something: the number of the round is that of each of them.
        slack = _SLACK_PER_ROUND * max(0, round_ - _STRICT_ROUNDS)
        merged = _find_merges(state, apart, slack)
        state = state.merge(merged, threshold)
        apart = apart.contract(merged, len(state.clusters))
        round_ += 1


def tidy_edges(u: Int64, v: Int64, count: int) -> tuple[Int64, Int64]:
    """Keep every edge between two different clusters of `count` once, the smaller one first."""
    keys = make_edge_keys(u, v, count)
    return keys // max(1, count), keys % max(1, count)


def make_edge_keys(u: Int64 | Int32, v: Int64 | Int32, count: int, roots: Int64 | None = None) -> Int64:
    """Make one number per edge between two different clusters: the smaller cluster times `count`, plus the other.

    It takes 17 bytes of memory per edge.

    Args:
        u: one cluster per edge, (m,).
        v: the other cluster, (m,).
        count: number of clusters.
        roots: number of the cluster that each of them is part of, (count,).

    Returns:
        The numbers, rising, each once.
    """
    keys = np.empty(len(u), np.int64)
    filled = 0
    for at in range(0, len(u), _EDGES_PER_BLOCK):
        left = u[at : at + _EDGES_PER_BLOCK]
        right = v[at : at + _EDGES_PER_BLOCK]
        if roots is not None:
            left = roots[left]
            right = roots[right]
        different = left != right
        low = np.minimum(left, right)[different].astype(np.int64)
        keys[filled : filled + len(low)] = low * count + np.maximum(left, right)[different]
        filled += len(low)
    # Sorted, so that repeated ones follow each other: numpy's own `unique` hashes, at five times the cost.
    keys = keys[:filled]
    keys.sort()
    is_first = np.ones(filled, bool)
    np.not_equal(keys[1:], keys[:-1], out=is_first[1:])
    return keys[is_first]


@dataclass(frozen=True)
class _LinkageState:
    """The clusters between two rounds.

    Attributes:
        clusters: k clusters.
        group: The cluster (n,) of each cluster at the start.
        u: One cluster per edge, (m,); u < v.
        v: The other cluster, (m,).
        weight: Mean similarity (m,), less what is subtracted for groups.
        margin: What large groups must have above single faces.
    """

    clusters: Clusters
    group: Int64
    u: Int64
    v: Int64
    weight: Float32
    margin: float

    def keep_above(self, threshold: float) -> "_LinkageState":
        kept = self.weight >= threshold
        return replace(self, u=self.u[kept], v=self.v[kept], weight=self.weight[kept])

    def drop_forbidden(self, apart: CannotLinks) -> "_LinkageState":
        if not apart or not len(self.u):
            return self
        kept = ~apart.forbid(self.u, self.v, len(self.clusters))
        return replace(self, u=self.u[kept], v=self.v[kept], weight=self.weight[kept])

    def merge(self, merged: Int64, threshold: float) -> "_LinkageState":
        """Merge clusters (k,) into new ones. Only the edges of clusters that grew are computed again."""
        clusters = self.clusters.merge(merged)
        has_grown = np.bincount(merged, minlength=len(clusters)) > 1
        u = merged[self.u]
        v = merged[self.v]
        # Edges between unchanged clusters keep their weight; the others are made unique and computed again.
        unchanged = ~(has_grown[u] | has_grown[v])
        fresh_u, fresh_v = tidy_edges(u[~unchanged], v[~unchanged], len(clusters))
        group = merged[self.group]
        weight = clusters.compute_linkage(fresh_u, fresh_v, self.margin)
        fresh = _LinkageState(clusters, group, fresh_u, fresh_v, weight, self.margin)
        fresh = fresh.keep_above(threshold)
        low = np.minimum(u[unchanged], v[unchanged])
        high = np.maximum(u[unchanged], v[unchanged])
        return _LinkageState(
            clusters,
            group,
            np.concatenate([low, fresh.u]),
            np.concatenate([high, fresh.v]),
            np.concatenate([self.weight[unchanged], fresh.weight]),
            self.margin,
        )


def _find_merges(state: _LinkageState, apart: CannotLinks, slack: np.float32) -> Int64:
    """Find the clusters to merge in a round: mutual nearest, and with slack those that point at one of these.

    Args:
        state: the clusters and their edges.
        apart: what must not come together.
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
    clashes = apart.find_clashes(group)
    if clashes.size:  # two leaves of one star that must not meet: only the mutual ones this time
        chosen &= is_mutual[active] | ~np.isin(group[active], clashes)
        group = find_components(count, active[chosen], targets[chosen])
    return group
