"""Arrow tables in temporary files without a name: they take pages that the kernel may drop, and no other memory."""

import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.errors import StorageError
from facepipe.storage.error_text import describe_error
from facepipe.types import Bool, Int64

SPILLED_ROWS = 65536
"""Rows of a batch that is read or written at a time."""


def spill_batches(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> pa.Table:
    """Write batches to a temporary file, and return them as a table that is mapped from it.

    The file has no name, and goes with the table. It lies in TMPDIR.

    Raises:
        StorageError: there is no room for it.
    """
    path = ""
    try:
        descriptor, path = tempfile.mkstemp(prefix="facepipe-", suffix=".arrow")
        with os.fdopen(descriptor, "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        return pa.ipc.open_file(pa.memory_map(path)).read_all()
    except OSError as error:
        folder = os.path.dirname(path) or "TMPDIR"
        raise StorageError(
            f"cannot keep a table in {folder!r}: {describe_error(error)}. Set TMPDIR to a folder with more room"
        ) from error
    finally:
        if path:
            with suppress(FileNotFoundError):
                os.unlink(path)


def take_rows(table: pa.Table, rows: Int64, is_missing: Bool | None = None) -> pa.Table:
    """Take rows of a table of many chunks. Unlike `Table.take` it copies no chunk as a whole.

    Args:
        table: the table.
        rows: positions (m,).
        is_missing: which of them (m,) are null in every column of the result.
    """
    batches = table.to_batches()
    begins = np.cumsum([0, *(batch.num_rows for batch in batches)])
    # Every batch gives its rows in their order; then they are put into the order that is asked for.
    order = np.argsort(rows, kind="stable")
    bounds = np.searchsorted(rows[order], begins)
    parts = [
        batches[n].take(pa.array(rows[order[bounds[n] : bounds[n + 1]]] - begins[n]))
        for n in np.flatnonzero(np.diff(bounds))
    ]
    at = np.empty(len(rows), np.int64)
    at[order] = np.arange(len(rows))
    gathered = pa.Table.from_batches(parts, table.schema).combine_chunks()
    return gathered.take(pa.array(at, mask=is_missing))


def sort_rows(table: pa.Table) -> tuple[Int64, Bool]:
    """Sort the rows of a table by all its columns, from left to right; nulls come last.

    Returns:
        The rows in their order (n,), and whether each differs from the one before (n,).
    """
    order = pc.sort_indices(table, sort_keys=[(name, "ascending") for name in table.column_names]).to_numpy()
    order = order.astype(np.int64)
    is_new = np.ones(len(order), bool)
    for at in range(0, len(order), SPILLED_ROWS):
        # The last row of the block before comes along.
        first = max(0, at - 1)
        block = take_rows(table, order[first : at + SPILLED_ROWS])
        differs = np.zeros(block.num_rows - 1, bool)
        for column in block.columns:
            values = column.combine_chunks()
            unequal = pc.not_equal(values[1:], values[:-1])
            # Two nulls are equal here, and a null and a value are not.
            both = pc.equal(values[1:].is_null(), values[:-1].is_null())
            differs |= pc.fill_null(unequal, False).to_numpy(zero_copy_only=False)
            differs |= ~both.to_numpy(zero_copy_only=False)
        is_new[first + 1 : first + 1 + len(differs)] = differs
    return order, is_new
