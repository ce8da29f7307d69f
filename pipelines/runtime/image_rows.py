"""Blocks as rows of a Ray dataset, one row per image, so that Ray sees images and bytes, and may cut them as it likes.

What a block reports beside its images lies in the first of its rows. A report without an image is a row of its own,
which has no uri and passes through every operator. So whatever arrives exactly once as a row is counted exactly once.

The rows of a dataset have one of two schemas: `ITEM_ROW` before the first operator; behind it the same columns as the
struct `item`, beside the list of rows that the stages have made of the image.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.errors import AccountingError
from facepipe.schema import FACES, WORK_ITEM, conform
from facepipe.sources.blocks import RELABELLED, Block, decode_table, encode_table
from pipelines.runtime.worker import StageFigures, find_image_starts

ITEM_ROW = pa.schema(
    [
        *WORK_ITEM,
        ("is_relabelled", pa.bool_()),  # the image's label goes to the gallery's rows if its content is the same
        ("report", pa.string()),  # JSON; null but in the first row of a block
        ("known_rows", pa.binary()),  # rows that the block has of the image, as an Arrow stream
    ]
)
"""A row of the dataset that the listing makes."""

_REPORTED = ("number", "skipped", "repeated", "ignored", "erased", "last", "handed_out", "digest", "notes")

FACE_ROWS = pa.schema([column for column in FACES if column.name not in ("source", "ingested_at")])
"""What the last stages make of images: the gallery's rows, but for the columns that all rows of a part share."""


@dataclass
class StagedRows:
    """Rows of a dataset behind its first operator.

    Attributes:
        items: the images and reports, of the schema ITEM_ROW
        rows: what the stages made of the images, in the same order; None if there are no images
        figures: figures of the stages, summed over the operators so far
    """

    items: pa.Table
    rows: pa.Table | None
    figures: StageFigures = field(default_factory=StageFigures)

    @property
    def bytes(self) -> int:
        """Bytes of the rows."""
        return 0 if self.rows is None else int(self.rows.nbytes)


def to_item_rows(block: Block) -> pa.Table:
    """Convert a block to rows of the schema ITEM_ROW."""
    # New labels of the block's own images are a flag, because they hold only if the image is unchanged.
    labels = [] if block.relabelled is None else list(zip(*block.relabelled.to_pydict().values(), strict=True))
    uris = block.items["uri"].to_pylist()
    own_uris = set(uris).intersection(uri for uri, _ in labels)
    report: dict[str, Any] = {name: getattr(block, name) for name in _REPORTED}
    report["relabelled"] = [label for label in labels if label[0] not in own_uris]
    count = max(1, len(uris))
    items = block.items if uris else pa.table([pa.nulls(1, column.type) for column in WORK_ITEM], schema=WORK_ITEM)
    flags = pa.array([uri in own_uris for uri in uris] or [False], pa.bool_())
    reports = pa.array([json.dumps(report), *[None] * (count - 1)], pa.string())
    known_rows = (
        pa.array(_encode_known_rows(block), pa.binary()) if block.rows is not None else pa.nulls(count, pa.binary())
    )
    return pa.table([*items.columns, flags, reports, known_rows], schema=ITEM_ROW)


def _encode_known_rows(block: Block) -> list[bytes]:
    """Encode the rows that a block has of each of its images, in their order."""
    assert block.rows is not None
    starts = [*find_image_starts(block.rows["uri"]), block.rows.num_rows]
    return [encode_table(block.rows.slice(start, end - start)) for start, end in pairwise(starts)]


def to_blocks(rows: pa.Table) -> tuple[Block, list[int]]:
    """Convert rows of the schema ITEM_ROW, of one or several blocks, to a block of their images.

    Returns:
        The block, with the sums of what the reports among the rows say; and the numbers of these reports.
    """
    items = rows.filter(pc.is_valid(rows["uri"]))
    reports = [json.loads(text) for text in rows["report"].to_pylist() if text is not None]
    own_labels = items.filter(items["is_relabelled"]).select(RELABELLED.names)
    other_labels = [label for report in reports for label in report["relabelled"]]
    relabelled = pa.concat_tables(
        [
            own_labels.cast(RELABELLED),
            pa.table(
                [pa.array([label[n] for label in other_labels], pa.string()) for n in range(2)], schema=RELABELLED
            ),
        ]
    )
    last = next((report for report in reports if report["last"]), None)
    numbers = [report["number"] for report in reports]
    counts = {name: sum(report[name] for report in reports) for name in ("skipped", "repeated", "ignored", "erased")}
    known_rows = [decode_table(data) for data in items["known_rows"].to_pylist() if data is not None]
    block = Block(
        number=min(numbers, default=0),
        items=items.select(WORK_ITEM.names),
        rows=pa.concat_tables(known_rows) if known_rows else None,
        last=last is not None,
        handed_out=last["handed_out"] if last else 0,
        digest=last["digest"] if last else 0,
        relabelled=relabelled if relabelled.num_rows else None,
        notes=tuple(note for report in reports for note in report["notes"]),
        **counts,
    )
    return block, numbers


def pack_rows(staged: StagedRows, schema: pa.Schema) -> pa.Table:
    """Pack what stages made of images into one row per image or report.

    Args:
        staged: images and rows.
        schema: schema of the rows, the same for all tables of a dataset.

    Raises:
        AccountingError: The rows are not those of the images, in their order.
    """
    items = staged.items.combine_chunks()
    is_image = items["uri"].is_valid().to_numpy()
    lengths = np.zeros(items.num_rows, np.int64)
    rows = schema.empty_table() if staged.rows is None else conform(staged.rows, schema)
    starts = find_image_starts(rows["uri"])
    if rows["uri"].take(pa.array(starts)).to_pylist() != items["uri"].filter(pa.array(is_image)).to_pylist():
        raise AccountingError("the stages lost, added or moved an image")
    # Each image has the rows up to those of the next one; a report has none.
    lengths[is_image] = np.diff([*starts, rows.num_rows])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    figures = json.dumps({"seconds": dict(staged.figures.seconds), "bytes": dict(staged.figures.bytes)})
    return pa.table(
        {
            "item": _to_struct(items),
            "rows": pa.ListArray.from_arrays(pa.array(offsets), _to_struct(rows)),
            "figures": pa.array([figures, *[None] * (items.num_rows - 1)], pa.string()),
        }
    )


def _to_struct(table: pa.Table) -> pa.StructArray:
    """Convert a table to a column of structs."""
    columns = [column.combine_chunks() if column.num_chunks else pa.array([], column.type) for column in table.columns]
    return pa.StructArray.from_arrays(columns, fields=list(table.schema))


def unpack_rows(table: pa.Table) -> StagedRows:
    """Unpack what `pack_rows` packed, and Ray may have cut and joined since."""
    items = pa.concat_tables([ITEM_ROW.empty_table(), *map(pa.Table.from_struct_array, table["item"].chunks)])
    lists = [chunk.flatten() for chunk in table["rows"].chunks]
    parts = [pa.Table.from_struct_array(values) for values in lists if len(values)]
    rows = pa.concat_tables(parts) if parts else None
    seconds: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for text in table["figures"].to_pylist():
        if text is not None:
            figures = json.loads(text)
            seconds.update(figures["seconds"])
            sizes.update(figures["bytes"])
    return StagedRows(items, rows, StageFigures(seconds, sizes))


def slice_items(items: pa.Table, start: int, count: int) -> pa.Table:
    """Slice rows of the schema ITEM_ROW by images. A report without an image goes with the image before it.

    Args:
        items: images and reports.
        start: number of the first image; the first slice begins with the first row.
        count: number of images.
    """
    positions = np.flatnonzero(items["uri"].is_valid().to_numpy())
    first = 0 if start == 0 else int(positions[start])
    end = start + count
    last = items.num_rows if end >= len(positions) else int(positions[end])
    return items.slice(first, last - first)
