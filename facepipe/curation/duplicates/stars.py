"""Find the copies of pictures that a corpus holds a hundred times: more copies than a face has edges in the graph."""

from collections.abc import Callable

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from facepipe.curation.duplicates.images import RankedImages
from facepipe.curation.duplicates.rule import DuplicateRule
from facepipe.curation.graph import Graph
from facepipe.nearest.distances import compute_pair_distances
from facepipe.nearest.similarity import Pairs
from facepipe.types import Bool, Float32, Int64

ReadVectors = Callable[[Int64], Float32]
"""Reads the vectors (m, dim) of nodes (m,)."""

_MAX_CENTRES = 1000  # pictures that are looked for in one crowd


def find_face_pairs(graph: Graph, images: RankedImages, row_of_node: Int64, rule: DuplicateRule) -> Pairs:
    """Find all pairs of nodes within the rule's radius that matter for duplicates.

    These are the graph's edges. If a face has as many edges as the graph allows, they also include the edges to the
    face of its crowd that would be kept.

    Args:
        graph: the face graph, n nodes.
        images: images of the table of `gather_faces`, ranked by the rule.
        row_of_node: row of each node in that table, (n,).
        rule: what counts as a duplicate, and which copy is kept.
    """
    edges = graph.edges.read_within(rule.radius)
    rank = images.of_face[row_of_node]
    return add_stars(edges, rank, graph.nodes.vectors.__getitem__, graph.info.most, radius=rule.radius)


def add_stars(edges: Pairs, rank: Int64, read_vectors: ReadVectors, max_neighbours: int, *, radius: float) -> Pairs:
    """Add the edges to the face of each crowd that would be kept, if a face has as many edges as the graph allows.

    Args:
        edges: pairs of n nodes within the radius.
        rank: the smaller, the sooner a face is kept, (n,).
        read_vectors: reads the vectors (m, dim) of nodes (m,) of crowds.
        max_neighbours: edges that a face has at most.
        radius: distance up to which faces are near.
    """
    is_full = find_full_nodes(edges, len(rank), max_neighbours)
    if not is_full.any():
        return edges
    pairs = Pairs.concatenate([edges, build_stars(read_vectors, rank, edges, is_full, radius=radius)])
    return pairs.take(np.unique(pairs.u * len(rank) + pairs.v, return_index=True)[1])


def find_full_nodes(edges: Pairs, count: int, max_neighbours: int) -> Bool:
    """Find the nodes (count,) that have as many edges as the graph allows, so that some may be missing."""
    degree = np.bincount(edges.u, minlength=count) + np.bincount(edges.v, minlength=count)
    return np.asarray(degree >= max_neighbours)


def find_crowded_nodes(edges: Pairs, is_full: Bool) -> Int64:
    """Find the nodes (m,) of every connected crowd with a full node (n,)."""
    crowd = _find_crowds(edges, len(is_full))
    return np.flatnonzero(np.isin(crowd, np.unique(crowd[is_full])))


def _find_crowds(edges: Pairs, count: int) -> Int64:
    links = coo_array((np.ones(len(edges), np.int8), (edges.u, edges.v)), shape=(count, count))
    return np.asarray(connected_components(links, directed=False)[1], np.int64)


def build_stars(read_vectors: ReadVectors, rank: Int64, edges: Pairs, is_full: Bool, *, radius: float) -> Pairs:
    """Build the edges from the face that would be kept to all its copies, in every crowd with missing edges.

    In every connected crowd with a full face, the first face is joined to all faces near it. Then the first of the
    rest is, and so on.

    Args:
        read_vectors: reads the unit vectors (m, dim) of nodes (m,).
        rank: the smaller, the sooner a face is kept, (n,).
        edges: known pairs.
        is_full: whether edges of the face may be missing, (n,).
        radius: distance up to which faces are near.
    """
    # Find the crowds, and the members of each in the order in which they are kept.
    crowd = _find_crowds(edges, len(rank))
    inside = np.flatnonzero(np.isin(crowd, np.unique(crowd[is_full])))
    inside = inside[np.lexsort((rank[inside], crowd[inside]))]
    lasts = np.flatnonzero(np.diff(crowd[inside], append=-1))
    stars = [_build_crowd_stars(read_vectors(members), members, radius) for members in np.split(inside, lasts[:-1] + 1)]
    return Pairs.concatenate(
        [Pairs(np.minimum(star.u, star.v), np.maximum(star.u, star.v), star.distance) for star in stars]
    )


def _build_crowd_stars(vectors: Float32, members: Int64, radius: float) -> Pairs:
    """Build the stars of one crowd: pairs of a centre and a near member, until no member is left without a centre."""
    rows = np.ascontiguousarray(vectors)
    unassigned = np.arange(len(members))
    parts = []
    for _ in range(_MAX_CENTRES):
        if len(unassigned) < 2:
            break
        centre = unassigned[0]
        rest = unassigned[1:]
        distance = np.sqrt(compute_pair_distances(rows, np.full(len(rest), centre), rows, rest))
        is_near = distance <= radius
        near = rest[is_near]
        parts.append(Pairs(np.full(len(near), centre), near, distance[is_near]))
        unassigned = rest[~is_near]
    star = Pairs.concatenate(parts)
    return Pairs(members[star.u], members[star.v], star.distance)
