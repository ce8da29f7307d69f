"""From a graph of faces to clusters of persons, by one of several algorithms."""

import tempfile
from collections.abc import Callable
from typing import Literal

import numpy as np

from facepipe.curation.clusters.chinese_whispers import whispers
from facepipe.curation.clusters.louvain import communities
from facepipe.curation.graph import Graph
from facepipe.curation.graph.cells import Layout, train
from facepipe.curation.graph.components import components, numbered
from facepipe.curation.graph.linkage import Clusters, average_linkage
from facepipe.nearest.join import candidates
from facepipe.types import Int64

Algorithm = Literal["linkage", "components", "whispers", "communities"]
_ON_EDGES: dict[str, Callable[..., Int64]] = {
    "components": components,
    "whispers": whispers,
    "communities": communities,
}
_NEIGHBOURS = 32  # clusters a cluster is compared with, in a cell
_FARTHEST = 2.0
_PASSES = 4


def cluster(
    graph: Graph, algorithm: Algorithm, apart: Int64 | None = None, together: Int64 | None = None
) -> tuple[Int64, Clusters]:
    """(cluster (n,) of each node, the clusters), numbered by their smallest node.

    apart: pairs (m, 2) of nodes that are two persons; together: a number (n,) for each node, -1 for none: nodes of one
    number are one person, and so are nodes with equal vectors, whatever `apart` says. Both count for average linkage
    only; the other algorithms see edges and nothing else.
    """
    pairs = graph.edges.within(_FARTHEST)
    similar = graph.similarity(pairs)
    above = similar >= graph.info.threshold.similarity
    pairs, weight = pairs.take(above), similar[above] - np.float32(graph.info.threshold.similarity)
    single = Clusters.single(graph.nodes.vectors, graph.density)
    if algorithm != "linkage":
        labels = _ON_EDGES[algorithm](len(single), pairs.u, pairs.v, weight + np.float32(1e-6))
        return labels, single.merged(labels)
    labels = _given(graph, together)
    clusters = single.merged(labels)
    del single
    return _linked(labels, clusters, labels[pairs.u], labels[pairs.v], graph.info.threshold.similarity, apart)


def _given(graph: Graph, together: Int64 | None) -> Int64:
    """What is one person from the start: vectors that are equal in every bit, and what was said to be."""
    count = len(graph.nodes)
    copies = graph.representatives
    if together is None:
        return numbered(copies)
    labelled = np.flatnonzero(together >= 0)
    first = np.full(int(together.max(initial=-1)) + 1, count)
    np.minimum.at(first, together[labelled], labelled)
    u, v = np.concatenate([copies, first[together[labelled]]]), np.concatenate([np.arange(count), labelled])
    return components(count, np.minimum(u, v), np.maximum(u, v), np.ones(len(u), np.float32))


def _linked(
    labels: Int64, clusters: Clusters, u: Int64, v: Int64, threshold: float, apart: Int64 | None
) -> tuple[Int64, Clusters]:
    """Average linkage along edges, and then along those that the clusters' means have: edges are capped and cells miss
    a few, so two halves of a person may share no edge."""
    for n in range(_PASSES):
        group, merged = average_linkage(clusters, u, v, threshold, _forbidden(labels, apart))
        labels = group[labels]
        if n and len(merged) == len(clusters):
            break
        clusters = merged
        u, v = near_means(clusters, threshold)
    return labels, clusters


def _forbidden(labels: Int64, apart: Int64 | None) -> Int64 | None:
    if apart is None:
        return None
    pairs = np.sort(labels[apart], axis=1)
    return np.asarray(pairs[pairs[:, 0] != pairs[:, 1]], np.int64)


def near_means(clusters: Clusters, threshold: float) -> tuple[Int64, Int64]:
    """Pairs (u (m,), v (m,)) of clusters of several faces whose mean similarity reaches about the threshold.

    Single faces are left out: what the graph did not find for them, as many comparisons would not find now.
    """
    several = np.flatnonzero(clusters.size > 1)
    means, density = clusters.means[several], clusters.density[several]
    cells = train(means, seed=0)
    if len(cells.centres) == 1:
        u, v = candidates(means, density, threshold, _NEIGHBOURS)
        return several[u], several[v]
    found = []
    with tempfile.TemporaryDirectory(prefix="facepipe-") as folder:
        layout = Layout.make(means, cells, folder)
        for cell in range(len(cells.centres)):
            inside = layout.inside(cell)
            u, v = candidates(means[inside], density[inside], threshold, _NEIGHBOURS)
            new = layout.first_met(cell, inside, u, v)
            found.append((inside[u[new]], inside[v[new]]))
    u, v = (np.concatenate(column) for column in zip(*found, strict=True))
    return several[u], several[v]
