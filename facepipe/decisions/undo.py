"""Which decisions are active: those that no active undo takes back."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.decisions.schema import UNDO
from facepipe.types import Bool

# An undo of an undo of an undo ... to this depth. What undoes itself in a circle is left as it is after so many steps.
_MAX_DEPTH = 1000


def find_active(rows: pa.Table) -> Bool:
    """Tell for each row (n,) whether it is active: whether no active undo names it. The order does not matter."""
    is_active = np.ones(rows.num_rows, bool)
    is_undo = np.asarray(pc.equal(rows["decision"], UNDO).to_numpy(zero_copy_only=False), bool)
    undos = np.flatnonzero(is_undo)
    if not len(undos):
        return is_active
    # Positions of what each undo takes back; -1 for what is not in the table, such as what an erasure has deleted.
    ids = rows["decision_id"].combine_chunks()
    targets = pc.index_in(rows["undoes"].take(pa.array(undos)), value_set=ids)
    at = pc.fill_null(targets, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    undos = undos[at >= 0]
    at = at[at >= 0]
    for _ in range(_MAX_DEPTH):
        # Undos that are active take their targets back; repeat until undos of undos are settled.
        updated = np.ones(rows.num_rows, bool)
        updated[at[is_active[undos]]] = False
        if np.array_equal(updated, is_active):
            break
        is_active = updated
    return is_active


def drop_repeated(rows: pa.Table) -> pa.Table:
    """Drop rows whose id occurs before: two writers may have added the same decision."""
    ids = rows["decision_id"].combine_chunks()
    first = pc.index_in(ids, value_set=pc.unique(ids)).to_numpy(zero_copy_only=False)
    _, positions = np.unique(first, return_index=True)
    return rows if len(positions) == rows.num_rows else rows.take(pa.array(np.sort(positions)))
