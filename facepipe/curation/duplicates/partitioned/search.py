"""How the steps of the search for duplicates follow each other, and how what they find is put together."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.curation.duplicates import Duplicates
from facepipe.curation.duplicates.groups import GROUP_SCHEMA
from facepipe.curation.duplicates.keep import DECISION_SCHEMA, KEEP
from facepipe.curation.duplicates.pairs import (
    PAIR_SCHEMA,
)
from facepipe.curation.duplicates.partitioned.components import find_component_copies, judge_components
from facepipe.curation.duplicates.partitioned.gather import LinkedImages
from facepipe.curation.duplicates.partitioned.tables import (
    DECIDED,
    GROUPS,
    IMAGES,
    PAIRS,
    CopySearch,
    CopySource,
    to_pairs,
)
from facepipe.nearest.similarity import Pairs
from facepipe.sorted_lookup import look_up_sorted
from facepipe.storage.partitions import (
    PartitionedTable,
    RunTables,
    run_tables_here,
)
from facepipe.storage.spilled import SPILLED_ROWS, spill_batches
from facepipe.types import Int64


@dataclass(frozen=True)
class NodeCopies:
    """Which faces of n are in copies of one picture.

    Attributes:
        image: Number of each face's image, (n,).
        group: Image that stands for all copies of the face's image, (n,).
        rank: Rank of each face's image among those of its group, (n,): of two the better one has the smaller.
        pairs: Pairs of faces of two copies of one picture.
    """

    image: Int64
    group: Int64
    rank: Int64
    pairs: Pairs


def find_duplicates_by_partition(
    source: CopySource, search: CopySearch, run_tables: RunTables = run_tables_here, *, partitions: int | None = None
) -> Duplicates:
    """Find the duplicates as `find_duplicates` does.

    Args:
        source: the faces.
        search: the rule, and what people have decided.
        run_tables: runs the steps.
        partitions: number of partitions; by default as many as the rows need.

    Returns:
        The tables, mapped from temporary files.
    """
    linked = LinkedImages.gather(source, search, run_tables, partitions)
    count = len(linked.begins)
    decided = PartitionedTable(DECIDED, count)
    pairs = PartitionedTable(PAIRS, count)
    groups = PartitionedTable(GROUPS, count)
    # What is found goes to the ranges of uris that its images are in.
    for _, tables in run_tables(judge_components, linked.list_component_tasks(source, search), search):
        decided.append(tables["decided"], linked.find_range(tables["decided"]["number"]))
        pairs.append(tables["pairs"], linked.find_range(tables["pairs"]["number_a"]))
        groups.append(tables["groups"], linked.find_range(tables["groups"]["number"]))
    leaders = np.concatenate([np.empty(0, np.int64), *(np.sort(part["number"].to_numpy()) for part in groups)])
    return Duplicates(
        pairs=spill_batches(PAIR_SCHEMA, _list_pairs(pairs)),
        groups=spill_batches(GROUP_SCHEMA, _list_groups(groups)),
        decisions=spill_batches(DECISION_SCHEMA, _list_decisions(linked, decided, leaders)),
    )


def find_copies_by_partition(
    source: CopySource, search: CopySearch, run_tables: RunTables = run_tables_here, *, partitions: int | None = None
) -> NodeCopies:
    """Find which faces are in copies of one picture. Arguments are those of `find_duplicates_by_partition`."""
    linked = LinkedImages.gather(source, search, run_tables, partitions)
    image = linked.image_of_node.astype(np.int64)
    group = np.arange(linked.count, dtype=linked.image_of_node.dtype)
    rank = np.zeros(linked.count, np.int32)
    pairs = []
    for _, tables in run_tables(find_component_copies, linked.list_component_tasks(source, search), search):
        number = tables["kept"]["number"].to_numpy()
        group[number] = tables["kept"]["kept"].to_numpy()
        rank[number] = tables["kept"]["rank"].to_numpy()
        pairs.append(to_pairs(tables["pairs"]))
    return NodeCopies(image, group[image].astype(np.int64), rank[image].astype(np.int64), Pairs.concatenate(pairs))


def _list_pairs(pairs: PartitionedTable) -> Iterator[pa.RecordBatch]:
    """List the pairs by their images: those of one range after those of another."""
    for table in pairs:
        order = np.lexsort((table["number_b"].to_numpy(), table["number_a"].to_numpy()))
        yield from _take_in_blocks(table.select(PAIR_SCHEMA.names), order)


def _list_groups(groups: PartitionedTable) -> Iterator[pa.RecordBatch]:
    """List the groups by the image that is kept."""
    begin = 0
    for table in groups:
        ordered = table.select(GROUPS.names[1:]).combine_chunks().take(pa.array(np.argsort(table["number"].to_numpy())))
        numbered = ordered.add_column(0, "group", pa.array(np.arange(begin, begin + table.num_rows)))
        begin += table.num_rows
        yield from numbered.cast(GROUP_SCHEMA).to_batches(SPILLED_ROWS)


def _list_decisions(linked: LinkedImages, decided: PartitionedTable, leaders: Int64) -> Iterator[pa.RecordBatch]:
    """List the decisions on all images: those that are in no group are kept.

    Args:
        linked: the images.
        decided: decisions on the images of groups.
        leaders: numbers of the images that are kept of the groups, rising. Their positions are those of the groups.
    """
    for begin, images, table in zip(linked.begins, linked.images, decided, strict=True):
        at = np.full(images.num_rows, -1)
        at[table["number"].to_numpy() - begin] = np.arange(table.num_rows)
        found = table.combine_chunks()
        for first in range(0, images.num_rows, SPILLED_ROWS):
            own = images.slice(first, SPILLED_ROWS)
            rows = at[first : first + SPILLED_ROWS]
            chosen = found.take(pa.array(rows, mask=rows < 0))
            group = look_up_sorted(leaders, np.arange(len(leaders)), pc.fill_null(chosen["group"], -1).to_numpy())
            columns = {name: own[name] for name in IMAGES.names}
            columns |= {name: chosen[name] for name in DECIDED.names if name != "number"}
            columns["decision"] = pc.fill_null(chosen["decision"], KEEP)
            columns["group"] = pa.array(group, mask=group < 0)
            rows_table = pa.table({name: columns[name] for name in DECISION_SCHEMA.names}).cast(DECISION_SCHEMA)
            yield from rows_table.combine_chunks().to_batches()


def _take_in_blocks(table: pa.Table, order: Int64) -> Iterator[pa.RecordBatch]:
    combined = table.combine_chunks()
    for at in range(0, len(order), SPILLED_ROWS):
        yield from combined.take(pa.array(order[at : at + SPILLED_ROWS])).to_batches()
