"""Steps that link images which may be copies: of the same bytes, and of hashes that nearly agree."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.curation.duplicates.hashes import BLOCKS, HashLookup, make_variants
from facepipe.curation.duplicates.images import sort_by_rank
from facepipe.curation.duplicates.pairs import (
    have_two_shapes,
)
from facepipe.curation.duplicates.partitioned.tables import HASHED, LINKS, CopySearch
from facepipe.storage.partitions import (
    Tables,
    TableTask,
)
from facepipe.types import Bool, Int64


def link_contents(task: TableTask, search: CopySearch) -> Tables:
    """Link the images of a partition with the same bytes, each to the first of them."""
    contents = task.tables["contents"]
    number = contents["number"].to_numpy()
    order, first = _find_firsts(contents["content"].to_numpy(), number)
    return {"links": _build_links(number[first], number[order], np.ones(len(order), bool))}


def _find_firsts(keys: npt.NDArray[Any], ranks: Int64) -> tuple[Int64, Int64]:
    """Find the row of the lowest rank (m,) for each row (m,) that is not the first of its key, (n,)."""
    order = np.lexsort((ranks, keys))
    is_first = np.ones(len(order), bool)
    is_first[1:] = keys[order][1:] != keys[order][:-1]
    first = order[is_first][np.cumsum(is_first) - 1]
    return order[~is_first], first[~is_first]


def link_hashes(task: TableTask, search: CopySearch) -> Tables:
    """Link the images of a partition with one hash, and list the hashes to look up.

    Returns:
        links: of the first image of a hash and another one. lookups: the hashes, and those of pictures without a face
        as they are if mirrored and turned.
    """
    ranked = task.tables["ranked"]
    rank = np.empty(ranked.num_rows, np.int64)
    rank[sort_by_rank(ranked, search.rule.keep)] = np.arange(ranked.num_rows)
    hashes = ranked["hash"].to_numpy()
    other, first = _find_firsts(hashes, rank)
    is_first = np.ones(len(hashes), bool)
    is_first[other] = False
    described = ranked.select(HASHED.names).combine_chunks()
    # Only pictures without a face are looked up mirrored and turned, against the first of each hash.
    faceless = described.filter(pc.invert(described["has_face"]))
    lookups = [_list_lookups(described.filter(pa.array(is_first)), is_turned=False)]
    lookups += [
        _list_lookups(faceless.set_column(0, HASHED.field("hash"), pa.array(hashes)), is_turned=True)
        for hashes in make_variants(faceless["hash"].to_numpy())[1:]
        if len(hashes)
    ]
    return {"links": _link_rows(described, described, first, other, search), "lookups": pa.concat_tables(lookups)}


def _list_lookups(hashed: pa.Table, *, is_turned: bool) -> pa.Table:
    """List hashes once per block of bits."""
    count = hashed.num_rows
    parts = [
        hashed.append_column("block", pa.array(np.full(count, block, np.int8))).append_column(
            "is_turned", pa.array(np.full(count, is_turned))
        )
        for block in BLOCKS
    ]
    return pa.concat_tables(parts)


def look_up_hashes(task: TableTask, search: CopySearch) -> Tables:
    """Link the images of a partition whose hashes have one block in common, and nearly agree."""
    lookups = task.tables["lookups"]
    parts = [_build_links(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, bool))]
    blocks = lookups["block"].to_numpy()
    is_turned = lookups["is_turned"].to_numpy()
    for block in BLOCKS:
        known = lookups.filter(pa.array((blocks == block) & ~is_turned)).sort_by("hash").combine_chunks()
        turned = lookups.filter(pa.array((blocks == block) & is_turned)).combine_chunks()
        lookup = HashLookup(known["hash"].to_numpy(), [block])
        for queries in (known, turned):
            near = lookup.find(queries["hash"].to_numpy())
            parts.append(_link_rows(queries, known, near.query, near.other, search))
    return {"links": pa.concat_tables(parts)}


def _link_rows(ones: pa.Table, others: pa.Table, one: Int64, other: Int64, search: CopySearch) -> pa.Table:
    """Link images by rows of `ones` (m,) and `others` (m,), if they can be copies by their hashes alone."""
    number = [ones["number"].to_numpy()[one], others["number"].to_numpy()[other]]
    has_face = [ones["has_face"].to_numpy()[one], others["has_face"].to_numpy()[other]]
    have_faces = has_face[0] & has_face[1]
    two_shapes = have_two_shapes(ones["shape"].to_numpy()[one], others["shape"].to_numpy()[other])
    is_possible = ~have_faces | (two_shapes & search.with_squashed)
    chosen = is_possible & (number[0] != number[1])
    return _build_links(number[0][chosen], number[1][chosen], have_faces[chosen])


def _build_links(a: Int64, b: Int64, have_faces: Bool) -> pa.Table:
    return pa.table({"a": a, "b": b, "have_faces": have_faces}, LINKS)
