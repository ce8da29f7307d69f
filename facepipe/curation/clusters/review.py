"""What a person should look at first: how well faces fit, clusters that may be one person, clusters that may be two."""

from dataclasses import dataclass

import numpy as np

from facepipe.curation.graph import Graph
from facepipe.curation.graph.components import numbered
from facepipe.curation.graph.linkage import Clusters, average_linkage
from facepipe.nearest.similarity import Pairs
from facepipe.types import Float32, Int64

_BLOCK = 65536


@dataclass(frozen=True)
class Suspects:
    """Pairs of clusters (m,) with what makes them suspect (m,), most suspicious first.

    Of merges: two clusters and their mean similarity. Of splits: a cluster, how many of its faces would leave, and the
    mean similarity between those that stay and those that leave.
    """

    left: Int64
    right: Int64
    similarity: Float32

    def __len__(self) -> int:
        return len(self.left)


def fit(graph: Graph, labels: Int64, clusters: Clusters) -> Float32:
    """(n,) mean similarity of each face to the rest of its cluster; NaN for a face that is alone."""
    out = np.full(len(labels), np.nan, np.float32)
    for at in range(0, len(labels), _BLOCK):
        part = slice(at, at + _BLOCK)
        of, density, vectors = labels[part], graph.density[part], np.asarray(graph.nodes.vectors[part])
        others = clusters.size[of] - 1
        product = np.einsum("nd,nd->n", vectors, clusters.sums[of]) - np.einsum("nd,nd->n", vectors, vectors)
        with np.errstate(divide="ignore", invalid="ignore"):
            value = product / others - (density + (clusters.crowd[of] - density) / others) / 2
        out[part] = np.where(others > 0, value, np.nan)
    return out


def medoids(labels: Int64, fits: Float32, count: int) -> Int64:
    """(k,) the node of each cluster that fits it best, the first of equals."""
    order = np.lexsort((np.arange(len(labels)), -np.nan_to_num(fits), labels))
    return np.asarray(order[np.searchsorted(labels[order], np.arange(count))], np.int64)


def merges(clusters: Clusters, labels: Int64, pairs: Pairs, most: int) -> Suspects:
    """Clusters that edges join and that are nevertheless two: the most similar first."""
    u, v = labels[pairs.u], labels[pairs.v]
    across = u != v
    key = np.unique(np.minimum(u, v)[across] * len(clusters) + np.maximum(u, v)[across])
    left, right = key // max(1, len(clusters)), key % max(1, len(clusters))
    similarity = clusters.linkage(left, right)
    order = np.lexsort((right, left, -similarity))[:most]
    return Suspects(left[order], right[order], similarity[order])


def splits(
    graph: Graph, labels: Int64, clusters: Clusters, pairs: Pairs, strict: float, most: int
) -> tuple[Suspects, Int64]:
    """Clusters that fall into parts of several faces at a stricter threshold, the least similar parts first.

    Suspects hold the cluster (left) and how many faces its second part has (right); with them the part (n,) of each
    node, 0 for the largest of its cluster.
    """
    inside = labels[pairs.u] == labels[pairs.v]
    single = Clusters.single(graph.nodes.vectors, graph.density)
    copies = numbered(graph.representatives)
    parts, made = average_linkage(single.merged(copies), copies[pairs.u[inside]], copies[pairs.v[inside]], strict)
    parts = parts[copies]
    owner = np.zeros(len(made), np.int64)
    owner[parts] = labels
    order = np.lexsort((np.arange(len(made)), -made.size, owner))
    rank = np.arange(len(order)) - np.searchsorted(owner[order], owner[order])
    first, second = order[rank == 0], order[rank == 1]
    second = second[made.size[second] >= 2]
    largest = np.zeros(len(clusters), np.int64)
    largest[owner[first]] = first
    similarity = made.linkage(largest[owner[second]], second)
    chosen = np.lexsort((owner[second], similarity))[:most]
    place = np.empty(len(made), np.int64)
    place[order] = rank
    found = Suspects(owner[second][chosen], made.size[second][chosen], similarity[chosen])
    return found, np.asarray(place[parts], np.int64)
