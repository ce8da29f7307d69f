"""Number the images of galleries, link them, and partition those that are linked by component."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from facepipe.curation.duplicates.hashes import BLOCKS, cut_block
from facepipe.curation.duplicates.partitioned.components import SomeVectors
from facepipe.curation.duplicates.partitioned.describe import describe_images
from facepipe.curation.duplicates.partitioned.links import link_contents, link_hashes, look_up_hashes
from facepipe.curation.duplicates.partitioned.tables import (
    CONTENTS,
    EDGES,
    IMAGES,
    LINKS,
    LOOKUPS,
    NUMBER,
    RANKED,
    CopySearch,
    CopySource,
    to_pairs,
)
from facepipe.curation.duplicates.stars import find_crowded_nodes, find_full_nodes
from facepipe.curation.graph.components import GrowingComponents
from facepipe.nearest.similarity import Pairs
from facepipe.sorted_lookup import find_sorted
from facepipe.storage.partitions import (
    PartitionedTable,
    RunTables,
    Tables,
    TableTask,
    count_partitions,
    find_ranges,
    list_tasks,
    sample_bounds,
    spread_keys,
)
from facepipe.types import Int64

_SAMPLED_ROWS = 64  # one row of so many tells how uris are spread


@dataclass(frozen=True)
class LinkedImages:
    """All images by range of uri, and those that are linked to another one by component.

    Attributes:
        images: One row per image, by range.
        begins: Number of the first image of each range.
        count: Number of images.
        image_of_node: Number of the image of each node, (n,).
        faces: Rows of the faces of linked images, by component.
        edges: Pairs of near nodes of linked images.
        links: Pairs of linked images whose hashes nearly agree.
    """

    images: PartitionedTable
    begins: Int64
    count: int
    image_of_node: npt.NDArray[Any]
    faces: PartitionedTable
    edges: PartitionedTable
    links: PartitionedTable

    def find_range(self, numbers: pa.ChunkedArray) -> Int64:
        """Find the range of uris (m,) that images (m,) are in."""
        return np.asarray(np.searchsorted(self.begins, numbers.to_numpy(), side="right") - 1, np.int64)

    @classmethod
    def gather(
        cls, source: CopySource, search: CopySearch, run_tables: RunTables, partitions: int | None
    ) -> "LinkedImages":
        """Gather the images, link them, and partition those that are linked by component."""
        # 1. Faces by range of uri, and the images of each range.
        bounds = _choose_bounds(source, partitions)
        ranges = _FaceRanges.read(source, bounds, run_tables, search)
        count = ranges.count
        # 2. Links by content and by hash.
        components = GrowingComponents(count)
        links = PartitionedTable(LINKS, 1)

        def add_links(tables: Tables) -> None:
            components.link(tables["links"]["a"].to_numpy(), tables["links"]["b"].to_numpy())
            links.add(0, tables["links"])

        for _, tables in run_tables(link_contents, list_tasks(contents=ranges.contents), search):
            components.link(tables["links"]["a"].to_numpy(), tables["links"]["b"].to_numpy())
        lookups = PartitionedTable(LOOKUPS, ranges.ranked.count)
        for _, tables in run_tables(link_hashes, list_tasks(ranked=ranges.ranked), search):
            add_links(tables)
            lookups.append(tables["lookups"], _spread_blocks(tables["lookups"], lookups.count))
        for _, tables in run_tables(look_up_hashes, list_tasks(lookups=lookups), search):
            add_links(tables)
        del lookups
        # 3. Links by near faces.
        image_of_node = ranges.find_images_of_nodes(len(source.vectors))
        for pairs in _read_near(source, search):
            components.link(image_of_node[pairs.u].astype(np.int64), image_of_node[pairs.v].astype(np.int64))
        # 4. Linked images by component.
        is_linked = components.find_linked()
        rows = sum(int(is_linked[number].sum()) for number in ranges.iterate_numbers())
        component_count = partitions or count_partitions(rows)

        def choose(numbers: Int64) -> Int64:
            return spread_keys(components.find(numbers), component_count)

        faces = PartitionedTable(ranges.faces.schema.append(pa.field(*NUMBER)), component_count)
        for table, number in zip(ranges.faces, ranges.iterate_numbers(), strict=True):
            chosen = np.flatnonzero(is_linked[number])
            own = table.combine_chunks().take(pa.array(chosen)).append_column("number", pa.array(number[chosen]))
            faces.append(own, choose(number[chosen]))
        edges = PartitionedTable(EDGES, component_count)
        for pairs in _read_near(source, search):
            image = image_of_node[pairs.u].astype(np.int64)
            chosen = np.flatnonzero(is_linked[image])
            own = pairs.take(chosen)
            edges.append(pa.table([own.u, own.v, own.distance], schema=EDGES), choose(image[chosen]))
        routed = PartitionedTable(LINKS, component_count)
        for batch in links.read(0).to_batches():
            routed.append(pa.Table.from_batches([batch]), choose(batch["a"].to_numpy()))
        return cls(ranges.images, ranges.begins, count, image_of_node, faces, edges, routed)

    def list_component_tasks(self, source: CopySource, search: CopySearch) -> Iterator[TableTask]:
        """List the tasks that decide on linked images, with the vectors that they need."""
        for task in list_tasks(faces=self.faces, edges=self.edges, links=self.links):
            nodes = _find_needed_nodes(task, source, search)
            yield TableTask(task.number, {**task.tables, "vectors": SomeVectors.pack(nodes, source.vectors)})


def _choose_bounds(source: CopySource, partitions: int | None) -> pa.Array:
    """Choose the bounds between the ranges of uris."""
    rows = 0
    samples = []
    for uris in source.read_uris():
        # The same rows are sampled whatever the batches are.
        samples.append(uris.take(pa.array(np.arange(-rows % _SAMPLED_ROWS, len(uris), _SAMPLED_ROWS))))
        rows += len(uris)
    count = partitions or count_partitions(rows)
    chunks = [chunk for part in samples for chunk in (part.chunks if isinstance(part, pa.ChunkedArray) else [part])]
    return sample_bounds(pa.chunked_array(chunks, pa.string()).combine_chunks(), count)


def _read_near(source: CopySource, search: CopySearch) -> Iterator[Pairs]:
    for pairs in source.read_edges():
        yield pairs.take(np.asarray(pairs.distance) <= search.rule.radius)


def _spread_blocks(lookups: pa.Table, count: int) -> Int64:
    """Choose the partition (n,), of `count`, of hashes by the value of the block that they are looked up by."""
    hashes = lookups["hash"].to_numpy()
    block = lookups["block"].to_numpy()
    key = np.zeros(len(hashes), np.int64)
    for number in BLOCKS:
        chosen = block == number
        key[chosen] = cut_block(hashes[chosen], number) * len(BLOCKS) + number
    return spread_keys(key, count)


def _find_needed_nodes(task: TableTask, source: CopySource, search: CopySearch) -> Int64:
    """Find the nodes (m,) whose vectors a task needs: of crowds with missing edges, and of pictures of one hash."""
    pairs = to_pairs(task.tables["edges"])
    nodes, ends = np.unique(np.concatenate([pairs.u, pairs.v]), return_inverse=True)
    local = Pairs(ends[: len(pairs)], ends[len(pairs) :], pairs.distance)
    is_full = find_full_nodes(local, len(nodes), search.max_neighbours)
    crowded = nodes[find_crowded_nodes(local, is_full)] if is_full.any() else np.empty(0, np.int64)
    links = task.tables["links"]
    links = links.filter(links["have_faces"])
    if not links.num_rows or not search.with_squashed:
        return crowded
    images = np.unique(np.concatenate([links["a"].to_numpy(), links["b"].to_numpy()]))
    faces = task.tables["faces"]
    is_of_image = find_sorted(images, faces["number"].to_numpy()) >= 0
    node = faces["node"].to_numpy()
    return np.union1d(crowded, node[is_of_image & (node >= 0)])


@dataclass(frozen=True)
class _FaceRanges:
    """All faces by range of uri, and their images.

    Attributes:
        faces: Rows of the faces.
        images: Images of each range, by uri.
        begins: Number of the first image of each range.
        contents: Hashes of the bytes of the images, by hash.
        ranked: Images by perceptual hash.
    """

    faces: PartitionedTable
    images: PartitionedTable
    numbers: PartitionedTable
    begins: Int64
    contents: PartitionedTable
    ranked: PartitionedTable

    @property
    def count(self) -> int:
        """Number of images."""
        return int(self.images.rows.sum())

    @classmethod
    def read(cls, source: CopySource, bounds: pa.Array, run_tables: RunTables, search: CopySearch) -> "_FaceRanges":
        count = len(bounds) + 1
        faces: PartitionedTable | None = None
        for table in source.read_faces():
            faces = faces or PartitionedTable(table.schema, count)
            faces.append(table, find_ranges(bounds, table["uri"]))
        if faces is None:
            raise ValueError("read_faces gave no table, not even an empty one")
        images = PartitionedTable(IMAGES, count)
        numbers = PartitionedTable(pa.schema([NUMBER]), count)
        described = {"contents": PartitionedTable(CONTENTS, count), "ranked": PartitionedTable(RANKED, count)}
        for number, tables in run_tables(describe_images, list_tasks(faces=faces), search):
            images.add(number, tables["images"])
            numbers.add(number, tables["numbers"])
            for name, table in described.items():
                table.add(number, tables[name])
        # Images are numbered through all ranges; then they go to the partitions of their contents and hashes.
        begins = np.cumsum(images.rows) - images.rows
        contents = _repartition(described["contents"], begins, "content")
        ranked = _repartition(described["ranked"], begins, "hash")
        return cls(faces, images, numbers, begins, contents, ranked)

    def iterate_numbers(self) -> Iterator[Int64]:
        """Yield the numbers of the images of the rows of each range."""
        for begin, table in zip(self.begins, self.numbers, strict=True):
            yield table["number"].to_numpy() + begin

    def find_images_of_nodes(self, node_count: int) -> npt.NDArray[Any]:
        """Find the image of each node (node_count,)."""
        dtype = np.int32 if self.count <= np.iinfo(np.int32).max else np.int64
        image = np.zeros(node_count, dtype)
        for table, number in zip(self.faces, self.iterate_numbers(), strict=True):
            node = table["node"].to_numpy()
            image[node[node >= 0]] = number[node >= 0]
        return image


def _repartition(table: PartitionedTable, begins: Int64, key: str) -> PartitionedTable:
    """Partition the rows of all ranges by the hash of a key, with the numbers of their images in all ranges."""
    result = PartitionedTable(table.schema, table.count)
    at = table.schema.get_field_index("number")
    for begin, rows in zip(begins, table, strict=True):
        number = pa.array(rows["number"].to_numpy() + begin)
        result.append(rows.set_column(at, NUMBER[0], number), spread_keys(rows[key].to_numpy(), table.count))
    return result
