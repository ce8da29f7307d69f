"""The last step: decide on the images of some whole components, as on a gallery of its own."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from facepipe.curation.duplicates import find_copies
from facepipe.curation.duplicates.groups import build_group_table
from facepipe.curation.duplicates.images import RankedImages, rank_images
from facepipe.curation.duplicates.keep import build_decision_rows
from facepipe.curation.duplicates.pairs import (
    build_pair_table,
    link_copies,
    order_pairs,
)
from facepipe.curation.duplicates.partitioned.tables import DECIDED, EDGES, GROUPS, KEPT, PAIRS, CopySearch, to_pairs
from facepipe.curation.duplicates.stars import add_stars
from facepipe.nearest.distances import compute_pair_distances
from facepipe.nearest.similarity import Pairs
from facepipe.sorted_lookup import find_sorted, look_up_sorted
from facepipe.storage.partitions import (
    Tables,
    TableTask,
)
from facepipe.types import Float32, Int64


def judge_components(task: TableTask, search: CopySearch) -> Tables:
    """Decide on the images of some whole components.

    Returns:
        decided: a row per image that is in a group, which is given by the number of the kept image. pairs and groups:
        rows with the numbers of their images.
    """
    component = _Component.open(task, search)
    images = component.images
    copies = find_copies(images, component.faces, component.edges, search.rule, component.measure, component.hash_pairs)
    links = link_copies(images, copies.picture).concat(copies.links)
    pairs = build_pair_table(images, component.faces, links)
    pairs = pairs.append_column("number_a", pa.array(component.number[links.a]))
    pairs = pairs.append_column("number_b", pa.array(component.number[links.b]))
    grouped = np.flatnonzero(copies.groups.group >= 0)
    decided = build_decision_rows(images, copies.groups, grouped, search.rule.keep)
    kept = copies.groups.kept[grouped]
    at = decided.column_names.index("group")
    decided = decided.set_column(at, "group", pa.array(component.number[kept]))
    decided = decided.append_column("number", pa.array(component.number[grouped]))
    groups = build_group_table(images, copies.groups)
    number = np.zeros(groups.num_rows, np.int64)
    number[copies.groups.group[grouped]] = component.number[kept]
    groups = groups.append_column("number", pa.array(number))
    return {
        "decided": decided.select(DECIDED.names),
        "pairs": pairs.select(PAIRS.names),
        "groups": groups.select(GROUPS.names),
    }


def find_component_copies(task: TableTask, search: CopySearch) -> Tables:
    """Find the copies among the images of some whole components.

    Returns:
        kept: which image stands for each one, and its rank. pairs: near faces of two copies of one picture.
    """
    component = _Component.open(task, search)
    images = component.images
    measure = component.measure if search.with_squashed else None
    leader = find_copies(
        images, component.faces, component.edges, search.rule, measure, component.hash_pairs
    ).groups.kept
    a = images.of_face[component.edges.u]
    b = images.of_face[component.edges.v]
    near = component.node_pairs.take((leader[a] == leader[b]) & (a != b))
    kept = {"number": component.number, "kept": component.number[leader], "rank": np.arange(len(images))}
    return {"kept": pa.table(kept, KEPT), "pairs": pa.table([near.u, near.v, near.distance], schema=EDGES)}


@dataclass(frozen=True)
class _Component:
    """Some whole components of linked images, as `find_copies` takes them.

    Attributes:
        faces: Rows of their faces.
        images: Their images.
        number: Number of each image.
        node_pairs: Pairs of nodes that are near.
        edges: The same pairs, by the rows of the faces.
        hash_pairs: Pairs (m, 2) of images whose hashes nearly agree.
        measure: Computes the distances of the faces in two rows each.
    """

    faces: pa.Table
    images: RankedImages
    number: Int64
    node_pairs: Pairs
    edges: Pairs
    hash_pairs: Int64
    measure: Callable[[Int64, Int64], Float32]

    @classmethod
    def open(cls, task: TableTask, search: CopySearch) -> "_Component":
        faces = task.tables["faces"]
        images = rank_images(faces, search.rule.keep, search.decided, search.side_count)
        number = faces["number"].to_numpy()[images.row]
        # The nodes of these faces, rising, and the row of each.
        node_of_row = faces["node"].to_numpy()
        rows = np.flatnonzero(node_of_row >= 0)
        rows = rows[np.argsort(node_of_row[rows])]
        nodes = node_of_row[rows]
        vectors = SomeVectors.open(task.tables["vectors"])
        pairs = to_pairs(task.tables["edges"])
        near = Pairs(np.searchsorted(nodes, pairs.u), np.searchsorted(nodes, pairs.v), pairs.distance)
        near = add_stars(
            near,
            images.of_face[rows],
            lambda members: vectors.read(nodes[members]),
            search.max_neighbours,
            radius=search.rule.radius,
        )
        ends = np.sort(np.stack([rows[near.u], rows[near.v]]), axis=0)

        def measure(u: Int64, v: Int64) -> Float32:
            # A face without a usable vector is near none.
            distance = np.full(len(u), np.inf, np.float32)
            known = np.flatnonzero((node_of_row[u] >= 0) & (node_of_row[v] >= 0))
            one = vectors.read(node_of_row[u[known]])
            other = vectors.read(node_of_row[v[known]])
            own = np.arange(len(known))
            distance[known] = np.sqrt(compute_pair_distances(one, own, other, own))
            return distance

        return cls(
            faces=faces,
            images=images,
            number=number,
            node_pairs=Pairs(nodes[near.u], nodes[near.v], near.distance),
            edges=Pairs(ends[0], ends[1], near.distance),
            hash_pairs=_rank_pairs(task.tables["links"], number),
            measure=measure,
        )


def _rank_pairs(links: pa.Table, number: Int64) -> Int64:
    """Turn links of image numbers into pairs (m, 2) of ranks, by the number (n,) of each ranked image."""
    order = np.argsort(number)
    a = look_up_sorted(number[order], order, links["a"].to_numpy())
    b = look_up_sorted(number[order], order, links["b"].to_numpy())
    return order_pairs(a, b, len(number))


@dataclass(frozen=True)
class SomeVectors:
    """The vectors of some nodes, which travel with a task.

    Attributes:
        nodes: The nodes (m,), rising.
        vectors: Their unit vectors (m, dim).
    """

    nodes: Int64
    vectors: Float32

    @classmethod
    def pack(cls, nodes: Int64, vectors: Float32) -> pa.Table:
        """Pack the vectors of nodes (m,), rising, out of all vectors (n, dim)."""
        dim = vectors.shape[1]
        values = pa.array(np.ascontiguousarray(vectors[nodes]).reshape(-1))
        return pa.table({"node": nodes, "vector": pa.FixedSizeListArray.from_arrays(values, dim)})

    @classmethod
    def open(cls, table: pa.Table) -> "SomeVectors":
        """Open the vectors of a packed table."""
        column = table["vector"].combine_chunks()
        vectors = column.flatten().to_numpy().reshape(-1, column.type.list_size)
        return cls(table["node"].to_numpy(), vectors)

    def read(self, nodes: Int64) -> Float32:
        """Read the vectors (k, dim) of nodes (k,)."""
        return np.asarray(self.vectors[find_sorted(self.nodes, nodes)])
