"""Pictures that a corpus holds a hundred times: more copies than a face has neighbours in the graph."""

import numpy as np
import pyarrow as pa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from facepipe.curation.duplicates.images import images_of
from facepipe.curation.duplicates.rule import DuplicateRule
from facepipe.curation.graph import Graph
from facepipe.curation.graph.edges import joined
from facepipe.nearest.distances import compute_pair_distances
from facepipe.nearest.similarity import Pairs
from facepipe.types import Bool, Float32, Int64

_CENTRES = 1000  # pictures that are looked for in one crowd


def face_pairs(graph: Graph, table: pa.Table, row_of_node: Int64, rule: DuplicateRule) -> Pairs:
    """A graph's edges within the rule's radius, and where they stop at the most that a face has, those to the face
    that would be kept of each crowd. table and row_of_node (n,): see `gather`."""
    near = graph.edges.within(rule.radius)
    count = len(graph.nodes)
    degree = np.bincount(near.u, minlength=count) + np.bincount(near.v, minlength=count)
    full = degree >= graph.info.most
    if not full.any():
        return near
    order = images_of(table, rule.keep).of_face[row_of_node]
    both = joined([near, stars(graph.nodes.vectors, order, near, full, rule.radius)])
    return both.take(np.unique(both.u * count + both.v, return_index=True)[1])


def stars(vectors: Float32, order: Int64, near: Pairs, full: Bool, radius: float) -> Pairs:
    """Edges from the face that would be kept to all its copies.

    vectors (n, 128); order (n,): the smaller, the sooner a face is kept; full (n,): whose edges are not all there. In
    every connected crowd with such a face the first is joined to all that are near it; then the first of the rest.
    """
    links = coo_array((np.ones(len(near), np.int8), (near.u, near.v)), shape=(len(order), len(order)))
    crowd = connected_components(links, directed=False)[1]
    inside = np.flatnonzero(np.isin(crowd, np.unique(crowd[full])))
    inside = inside[np.lexsort((order[inside], crowd[inside]))]
    ends = np.flatnonzero(np.diff(crowd[inside], append=-1))
    found = [_star(vectors, members, radius) for members in np.split(inside, ends[:-1] + 1)]
    u, v, distance = (np.concatenate(column) for column in zip(*found, strict=True))
    return Pairs(np.minimum(u, v), np.maximum(u, v), distance)


def _star(vectors: Float32, members: Int64, radius: float) -> tuple[Int64, Int64, Float32]:
    rows = np.ascontiguousarray(vectors[members])
    left, found = np.arange(len(members)), []
    for _ in range(_CENTRES):
        if len(left) < 2:
            break
        centre, rest = left[0], left[1:]
        distance = np.sqrt(compute_pair_distances(rows, np.full(len(rest), centre), rows, rest))
        close = distance <= radius
        found.append((np.full(int(close.sum()), centre), rest[close], distance[close]))
        left = rest[~close]
    u, v, distance = (np.concatenate(column) for column in zip(*found, strict=True))
    return members[u], members[v], distance
