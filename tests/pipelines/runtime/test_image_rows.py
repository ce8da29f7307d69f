"""Blocks as rows of a Ray dataset: nothing is lost or counted twice, however Ray cuts and joins the rows."""

from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.errors import AccountingError
from facepipe.gallery.commits.parts import PartRecord
from facepipe.schema import WORK_ITEM, conform
from facepipe.sources.blocks import RELABELLED, Block, add_digests, compute_digest
from pipelines.embed.pipeline import Accounts
from pipelines.runtime.image_rows import (
    FACE_ROWS,
    ITEM_ROW,
    StagedRows,
    pack_rows,
    slice_items,
    to_blocks,
    to_item_rows,
    unpack_rows,
)
from pipelines.runtime.worker import StageFigures


def make_blocks(sizes: list[int]) -> list[Block]:
    """Make the blocks of a listing: of so many images each, and an empty last one."""
    blocks = []
    start = 0
    handed_out = 0
    digest = 0
    for number, size in enumerate([*sizes, 0]):
        uris = [f"s3://b/{n}.jpg" for n in range(start, start + size)]
        items = pa.Table.from_pylist([{"uri": uri, "path": uri.encode()} for uri in uris], schema=WORK_ITEM)
        start += size
        handed_out += size
        digest = add_digests(digest, compute_digest(items["uri"]))
        labels = [{"uri": uri, "identity": None} for uri in [*uris[::3], f"known-{number}"]]
        blocks.append(
            Block(
                number,
                items,
                skipped=number,
                ignored=2,
                last=number == len(sizes),
                handed_out=handed_out,
                digest=digest,
                relabelled=pa.Table.from_pylist(labels, schema=RELABELLED),
                notes=("a note",) if number == len(sizes) else (),
            )
        )
    return blocks


def cut(table: pa.Table, places: list[int]) -> list[pa.Table]:
    """Cut a table at some places, as Ray may."""
    edges = sorted({0, table.num_rows, *(place % (table.num_rows + 1) for place in places)})
    return [table.slice(a, b - a) for a, b in pairwise(edges)]


def list_labels(block: Block) -> list[dict[str, Any]]:
    return [] if block.relabelled is None else list(block.relabelled.to_pylist())


@settings(max_examples=30)
@given(st.lists(st.integers(0, 5), max_size=6), st.lists(st.integers(0, 99), max_size=8))
def test_any_cut_of_the_rows_gives_the_same_sums(sizes: list[int], places: list[int]) -> None:
    blocks = make_blocks(sizes)
    rows = pa.concat_tables([to_item_rows(block) for block in blocks])
    assert rows.schema == ITEM_ROW
    found = [to_blocks(part) for part in cut(rows, places)]
    for name in ("skipped", "ignored", "erased", "repeated"):
        assert sum(getattr(block, name) for block, _ in found) == sum(getattr(block, name) for block in blocks)
    assert sorted(number for _, numbers in found for number in numbers) == list(range(len(blocks)))
    assert pa.concat_tables([block.items for block, _ in found]).equals(
        pa.concat_tables([block.items for block in blocks])
    )
    labels = [str(label) for block, _ in found for label in list_labels(block)]
    assert sorted(labels) == sorted(str(label) for block in blocks for label in list_labels(block))
    # The label of an image travels with it: it holds only if the image is unchanged.
    for block, _ in found:
        own = set(block.items["uri"].to_pylist())
        relabelled = set() if block.relabelled is None else set(block.relabelled["uri"].to_pylist())
        assert all(uri.startswith("known-") for uri in relabelled - own)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.lists(st.integers(0, 99), max_size=5), st.booleans())
def test_rows_of_faces_stay_with_their_image(faces: list[int], places: list[int], has_report: bool) -> None:
    (block, last) = make_blocks([len(faces)])
    items = to_item_rows(block)
    if has_report:
        items = pa.concat_tables([to_item_rows(last), items])
    rows = [
        {"uri": uri, "status": "ok", "face_index": n if count else None}
        for uri, count in zip(block.items["uri"].to_pylist(), faces, strict=True)
        for n in range(max(1, count))
    ]
    staged = StagedRows(items, pa.Table.from_pylist(rows), StageFigures({"decode": 1.5}, {"decode": 7}))
    packed = pack_rows(staged, FACE_ROWS)
    assert packed.num_rows == items.num_rows
    parts = [unpack_rows(part) for part in cut(packed, places)]
    joined = unpack_rows(pa.concat_tables(cut(packed, places)))
    assert joined.items.equals(items)
    assert joined.rows is not None
    expected = conform(pa.Table.from_pylist(rows), FACE_ROWS)
    assert joined.rows.equals(expected)
    assert pa.concat_tables([part.rows for part in parts if part.rows is not None]).equals(expected)
    for part in parts:
        uris = [uri for uri in part.items["uri"].to_pylist() if uri is not None]
        assert uris == list(dict.fromkeys([] if part.rows is None else part.rows["uri"].to_pylist()))
    assert sum(part.figures.seconds.get("decode", 0) for part in parts) == joined.figures.seconds["decode"] == 1.5


def test_rows_of_other_images_are_refused() -> None:
    (block, _) = make_blocks([3])
    rows = pa.table({"uri": ["s3://b/0.jpg", "s3://b/2.jpg", "s3://b/1.jpg"]})
    with pytest.raises(AccountingError, match="lost, added or moved"):
        pack_rows(StagedRows(to_item_rows(block), rows), FACE_ROWS)


def test_reports_go_with_the_image_before_them() -> None:
    first, second, last = make_blocks([2, 1])
    rows = pa.concat_tables([to_item_rows(last), to_item_rows(first), to_item_rows(last), to_item_rows(second)])
    slices = [slice_items(rows, 0, 1), slice_items(rows, 1, 1), slice_items(rows, 2, 1)]
    assert [part.num_rows for part in slices] == [2, 2, 1]
    assert pa.concat_tables(slices).equals(rows)


def make_records(sizes: list[int]) -> list[PartRecord]:
    return [
        PartRecord(
            block.number,
            images=block.items.num_rows,
            digest=compute_digest(block.items["uri"]),
            last=block.last,
            handed_out=block.handed_out if block.last else 0,
            handed_out_digest=block.digest if block.last else 0,
        )
        for block in make_blocks(sizes)
    ]


def check(records: list[PartRecord]) -> None:
    accounts = Accounts()
    for record in records:
        accounts.add(record)
    accounts.check()


@pytest.mark.parametrize("seed", range(4))
def test_images_are_accounted_for_in_any_order_and_in_any_parts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    records = make_records([3, 4, 0, 5])
    # One record in two parts: the first has the report.
    whole = records[1]
    digests = [compute_digest(pa.array([f"s3://b/{n}.jpg" for n in part])) for part in ((3,), (4, 5, 6))]
    parts = [
        PartRecord(1, images=1, digest=digests[0], reports=[1]),
        PartRecord(0, images=3, digest=digests[1], reports=[]),
    ]
    assert add_digests(*digests) == whole.digest
    cut_records = [records[0], *parts, *records[2:]]
    rng.shuffle(cut_records)  # type: ignore[arg-type]
    check(cut_records)


@pytest.mark.parametrize(
    "harm",
    [
        lambda records: records[:-1],
        lambda records: records[1:],
        lambda records: [*records, records[0]],
        lambda records: [records[0], records[0], *records[2:]],
        lambda records: [PartRecord(0, images=3, digest=records[1].digest), *records[1:]],
        lambda records: [PartRecord(0, images=2, digest=records[0].digest), *records[1:]],
    ],
)
def test_a_lost_or_doubled_image_is_noticed(harm: Any) -> None:
    check(make_records([3, 3, 3]))
    with pytest.raises(AccountingError, match="run the same command again"):
        check(harm(make_records([3, 3, 3])))
