"""Find what a person should look at first: how well faces fit, and clusters that may be one person or two."""

from dataclasses import dataclass, field

import numpy as np

from facepipe.curation.graph import Graph
from facepipe.curation.graph.cannot_links import CannotLinks
from facepipe.curation.graph.clusters import Clusters
from facepipe.curation.graph.components import renumber_labels
from facepipe.curation.graph.edges import select_ends
from facepipe.curation.graph.linkage import merge_by_average_linkage
from facepipe.curation.graph.rounds import make_edge_keys
from facepipe.types import Float32, Int32, Int64

_BLOCK = 8192


@dataclass(frozen=True)
class SuspectedMerges:
    """Pairs of clusters that may be one person.

    Attributes:
        left: First cluster, (m,).
        right: Second cluster, (m,).
        similarity: Mean similarity, (m,).
        probability: Probability that they are one person, (m,); empty before `rank_merges`.
    """

    left: Int64
    right: Int64
    similarity: Float32
    probability: Float32 = field(default_factory=lambda: np.empty(0, np.float32))

    def __len__(self) -> int:
        return len(self.left)


@dataclass(frozen=True)
class SuspectedSplits:
    """Clusters that may be two persons.

    Attributes:
        cluster: The cluster, (m,).
        leaving: Number of faces in its second part, (m,).
        similarity: Mean similarity between its two largest parts, (m,).
        part: Part of each node within its cluster, (n,), 0 for the largest.
        probability: Probability that they are two persons, (m,); empty before `rank_splits`.
    """

    cluster: Int64
    leaving: Int64
    similarity: Float32
    part: Int64
    probability: Float32 = field(default_factory=lambda: np.empty(0, np.float32))

    def __len__(self) -> int:
        return len(self.cluster)


def compute_fits(graph: Graph, labels: Int64, clusters: Clusters) -> Float32:
    """Compute the mean similarity (n,) of each face to the rest of its cluster; NaN for a face that is alone.

    Args:
        graph: the face graph, n nodes.
        labels: cluster of each node, (n,).
        clusters: the clusters.
    """
    fits = np.full(len(labels), np.nan, np.float32)
    for start in range(0, len(labels), _BLOCK):
        block = slice(start, start + _BLOCK)
        cluster = labels[block]
        density = graph.density[block]
        vectors = np.asarray(graph.nodes.vectors[block])
        # Take the face itself out of the sums of its cluster.
        others = clusters.size[cluster] - 1
        product = np.einsum("nd,nd->n", vectors, clusters.sums[cluster]) - np.einsum("nd,nd->n", vectors, vectors)
        # For a face that is alone this divides by zero.
        with np.errstate(divide="ignore", invalid="ignore"):
            fit = product / others - (density + (clusters.crowd[cluster] - density) / others) / 2
        fits[block] = np.where(others > 0, fit, np.nan)
    return fits


def find_medoids(labels: Int64, fits: Float32, count: int) -> Int64:
    """Find the node that fits each cluster (count,) best, the first of equals."""
    order = np.lexsort((np.arange(len(labels)), -np.nan_to_num(fits), labels))
    return np.asarray(order[np.searchsorted(labels[order], np.arange(count))], np.int64)


def find_suspected_merges(
    clusters: Clusters, labels: Int64, u: Int32, v: Int32, max_suspects: int, apart: CannotLinks | None = None
) -> SuspectedMerges:
    """Find pairs of clusters that edges join although they are two, the most similar first.

    Args:
        clusters: the clusters.
        labels: cluster of each node, (n,).
        u: one node per edge, (m,).
        v: the other node, (m,).
        max_suspects: number of pairs to return at most.
        apart: what people have said is two persons, by cluster. It is not suggested again.
    """
    # Pairs of clusters that an edge joins.
    keys = make_edge_keys(u, v, len(clusters), labels)
    left = keys // max(1, len(clusters))
    right = keys % max(1, len(clusters))
    if apart:
        is_open = ~apart.forbid(left, right, len(clusters))
        left = left[is_open]
        right = right[is_open]
    similarity = clusters.compute_linkage(left, right)
    order = np.lexsort((right, left, -similarity))[:max_suspects]
    return SuspectedMerges(left[order], right[order], similarity[order])


def find_suspected_splits(
    graph: Graph,
    labels: Int64,
    clusters: Clusters,
    u: Int32,
    v: Int32,
    *,
    strict_threshold: float,
    max_suspects: int,
    start: Int64 | None = None,
) -> SuspectedSplits:
    """Find clusters that fall into parts at a stricter threshold, the least similar parts first.

    Args:
        graph: the face graph, n nodes.
        labels: cluster of each node, (n,).
        clusters: the clusters.
        u: one node per edge, (m,).
        v: the other node, (m,).
        strict_threshold: mean similarity from which two parts are one.
        max_suspects: number of clusters to return at most.
        start: groups (n,) of nodes that are known to be one person; by default those with equal vectors.
    """
    # Cluster again inside each cluster; what is known to be one person stays together.
    inside = select_ends(u, v, lambda left, right: labels[left] == labels[right])
    single = Clusters.from_faces(graph.nodes.vectors, graph.density)
    known = renumber_labels(graph.representatives) if start is None else start
    group, parts = merge_by_average_linkage(single, *inside, strict_threshold, start=known)
    # Rank the parts of each cluster by falling size.
    owner = np.zeros(len(parts), np.int64)
    owner[group] = labels
    order = np.lexsort((np.arange(len(parts)), -parts.size, owner))
    rank = np.arange(len(order)) - np.searchsorted(owner[order], owner[order])
    part_rank = np.empty(len(parts), np.int64)
    part_rank[order] = rank
    # Most wrong faces are alone in their cluster, so a second part of one face is suspicious as well.
    first = order[rank == 0]
    second = order[rank == 1]
    largest = np.zeros(len(clusters), np.int64)
    largest[owner[first]] = first
    similarity = parts.compute_linkage(largest[owner[second]], second)
    chosen = np.lexsort((owner[second], similarity))[:max_suspects]
    return SuspectedSplits(
        cluster=owner[second][chosen],
        leaving=parts.size[second][chosen],
        similarity=similarity[chosen],
        part=np.asarray(part_rank[group], np.int64),
    )
