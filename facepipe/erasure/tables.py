"""Tables and named arrays of reports without erased data."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facepipe.erasure.erased_data import ANY, COMPARED, IDS, URIS, ErasedData, find_role
from facepipe.erasure.selection import compute_marks
from facepipe.storage import write_beside
from facepipe.types import Bool

_PERSON = "person"
_MEDOID = "medoid"


def find_copies_of_erased(path: str, erased: ErasedData) -> Iterator[list[str]]:
    """Find images that were to be dropped as copies of an erased one; none if the table is of another kind.

    Args:
        path: a table of decisions on duplicates.
        erased: what is erased.

    Returns:
        Lists of uris, one per batch of the table.
    """
    with pq.ParquetFile(path) as file:
        # Read which images were dropped in favour of an erased one.
        if not {"uri", "kept_uri"} <= set(file.schema_arrow.names):
            return
        for batch in file.iter_batches(columns=["uri", "kept_uri"]):
            is_copy = pc.is_in(batch["kept_uri"], erased.arrays[URIS])
            yield batch.filter(is_copy)["uri"].to_pylist()


def scrub_table(path: str, erased: ErasedData) -> bool:
    """Remove rows of a Parquet file that hold erased data; return whether there were any.

    The file is read batch by batch, because it may have as many rows as the gallery has faces.
    """
    with pq.ParquetFile(path) as file:
        # Look at the columns that may reveal somebody first, and rewrite the file only if they do.
        columns = [field.name for field in file.schema_arrow if _find_column_role(field) or field.name == "size"]
        if not columns or not any(holds_erased(batch, erased) for batch in file.iter_batches(columns=columns)):
            return False
        with (
            write_beside(path) as unfinished,
            pq.ParquetWriter(unfinished, file.schema_arrow, compression="zstd") as writer,
        ):
            for batch in file.iter_batches():
                writer.write_batch(_remove_erased(batch, erased))
    return True


def _find_column_role(field: pa.Field) -> str | None:
    """Find what a column of a table holds; None if it cannot reveal anybody."""
    role = find_role(field.name)
    # A text column with the name of ids is not ours, so any text in it counts.
    if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
        return role if role != IDS else ANY
    return role if role == IDS and pa.types.is_int64(field.type) else None


def _find_example_columns(schema: pa.Schema) -> frozenset[str]:
    """Find the columns that only show an example, or compare: the row stays, without the value."""
    # A person stays the same person without the face that fits it best.
    examples = {_MEDOID} if _PERSON in schema.names else set()
    return frozenset({COMPARED} | examples)


def _mark_erased(batch: pa.RecordBatch, erased: ErasedData, *, compared: bool) -> Bool:
    """Mark rows (n,) that hold erased data: in the columns of examples and comparisons, or in any other."""
    # These columns are marked apart, because their match does not remove the row.
    mask = np.zeros(batch.num_rows, bool)
    examples = _find_example_columns(batch.schema)
    for field, column in zip(batch.schema, batch.columns, strict=True):
        role = _find_column_role(field)
        if role is not None and (field.name in examples) == compared:
            values = erased.arrays[role]
            mask |= pc.is_in(column, values.cast(field.type)).to_numpy(zero_copy_only=False)
    # A cluster that lost all its faces still names an erased one.
    if not compared and {_MEDOID, "size"} <= set(batch.schema.names) - examples:
        mask |= pc.equal(batch["size"], 0).to_numpy(zero_copy_only=False)
    return mask


def holds_erased(batch: pa.RecordBatch, erased: ErasedData) -> bool:
    """Tell whether rows of a table hold erased data, or compare with it."""
    in_row = _mark_erased(batch, erased, compared=False)
    in_comparison = _mark_erased(batch, erased, compared=True)
    return bool(in_row.any() or in_comparison.any())


def _remove_erased(batch: pa.RecordBatch, erased: ErasedData) -> pa.RecordBatch:
    """Remove rows with erased data, and comparisons with it."""
    # Rows of the erased go; in rows of others only the comparison is emptied.
    kept = batch.filter(pa.array(~_mark_erased(batch, erased, compared=False)))
    in_comparison = _mark_erased(kept, erased, compared=True)
    if in_comparison.any():
        for name in _find_example_columns(kept.schema) & set(kept.schema.names):
            column = kept.schema.get_field_index(name)
            values = pc.if_else(pa.array(in_comparison), None, kept.column(column))
            kept = kept.set_column(column, kept.schema.field(column), values)
    return kept


def scrub_arrays(path: str, erased: ErasedData) -> bool:
    """Remove erased vectors from named arrays (.npz); return whether there were any.

    Every two-dimensional float32 array is taken for vectors, one per row.
    """
    with open(path, "rb") as file, np.load(file) as archive:
        arrays = {name: archive[name] for name in archive.files}
    # Rows of vectors are found by their marks; other arrays stay as they are.
    kept = {}
    for name, array in arrays.items():
        is_vectors = array.ndim == 2 and array.dtype == np.float32 and array.shape[1] >= 2
        kept[name] = array[~np.isin(compute_marks(array), erased.marks)] if is_vectors else array
    # Scalars have no length and cannot have lost anything.
    if all(len(kept[name]) == len(array) for name, array in arrays.items() if array.ndim):
        return False
    with write_beside(path) as unfinished, open(unfinished, "wb") as out:
        np.savez(out, **kept)
    return True
