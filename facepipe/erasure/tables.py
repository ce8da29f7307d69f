"""Tables and named arrays of reports without the erased."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facepipe.erasure.erased_data import ANY, IDS, URIS, ErasedData, find_role
from facepipe.erasure.selection import compute_marks
from facepipe.storage import write_beside
from facepipe.types import Bool

_COMPARED = "nearest_identity"  # only compared with: the row is another's, and stays without it


def find_copies_of_erased(path: str, gone: ErasedData) -> Iterator[list[str]]:
    with pq.ParquetFile(path) as file:
        if {"uri", "kept_uri"} <= set(file.schema_arrow.names):
            for batch in file.iter_batches(columns=["uri", "kept_uri"]):
                yield batch.filter(pc.is_in(batch["kept_uri"], gone.arrays[URIS]))["uri"].to_pylist()


def scrub_table(path: str, gone: ErasedData) -> bool:
    """Batch by batch: a table may have as many rows as the gallery has faces."""
    with pq.ParquetFile(path) as file:
        columns = [field.name for field in file.schema_arrow if _find_column_role(field) or field.name == "size"]
        if not columns or not any(_holds_erased(batch, gone) for batch in file.iter_batches(columns=columns)):
            return False
        with (
            write_beside(path) as unfinished,
            pq.ParquetWriter(unfinished, file.schema_arrow, compression="zstd") as writer,
        ):
            for batch in file.iter_batches():
                writer.write_batch(_remove_erased(batch, gone))
    return True


def _find_column_role(field: pa.Field) -> str | None:
    """What a column of a table is looked at for."""
    role = find_role(field.name)
    if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
        return role if role != IDS else ANY
    return role if role == IDS and pa.types.is_int64(field.type) else None


def _mark_erased(batch: pa.RecordBatch, gone: ErasedData, aside: bool) -> Bool:
    mask = np.zeros(batch.num_rows, bool)
    for field, column in zip(batch.schema, batch.columns, strict=True):
        role = _find_column_role(field)
        if role is not None and (field.name == _COMPARED) == aside:
            values = gone.arrays[role]
            mask |= pc.is_in(column, values.cast(field.type)).to_numpy(zero_copy_only=False)
    if not aside and {"medoid", "size"} <= set(batch.schema.names):  # a cluster that lost all is named by who is gone
        mask |= pc.equal(batch["size"], 0).to_numpy(zero_copy_only=False)
    return mask


def _holds_erased(batch: pa.RecordBatch, gone: ErasedData) -> bool:
    return bool(_mark_erased(batch, gone, False).any() or _mark_erased(batch, gone, True).any())


def _remove_erased(batch: pa.RecordBatch, gone: ErasedData) -> pa.RecordBatch:
    kept = batch.filter(pa.array(~_mark_erased(batch, gone, False)))
    compared = _mark_erased(kept, gone, True)
    if compared.any():
        at = kept.schema.get_field_index(_COMPARED)
        kept = kept.set_column(at, kept.schema.field(at), pc.if_else(pa.array(compared), None, kept.column(at)))
    return kept


def scrub_arrays(path: str, gone: ErasedData) -> bool:
    """Named arrays: rows of two-dimensional ones that are vectors of the erased leave."""
    with open(path, "rb") as file, np.load(file) as held:
        arrays = {name: held[name] for name in held.files}
    kept = {}
    for name, array in arrays.items():
        vectors = array.ndim == 2 and array.dtype == np.float32 and array.shape[1] >= 2
        kept[name] = array[~np.isin(compute_marks(array), gone.marks)] if vectors else array
    if all(len(kept[name]) == len(array) for name, array in arrays.items() if array.ndim):
        return False
    with write_beside(path) as unfinished, open(unfinished, "wb") as out:
        np.savez(out, **kept)
    return True
