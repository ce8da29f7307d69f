"""Arrow columns to NumPy arrays and back, without copies where possible."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.imaging.geometry import Frame
from facepipe.types import Bool, Float32, UInt8Image


def set_columns(table: pa.Table, columns: Mapping[str, Any], drop: Sequence[str] = ()) -> pa.Table:
    """Set or replace columns of a table by name, and drop others."""
    others = {name: table[name] for name in table.column_names if name not in drop and name not in columns}
    return pa.table({**others, **columns})


def pack_arrays(arrays: Sequence[UInt8Image | bytes | None]) -> pa.ChunkedArray:
    """Pack arrays into a large_binary column with one chunk per row. Each chunk is a view of its array."""
    chunks = [_pack_array(array) for array in arrays]
    return pa.chunked_array(chunks, pa.large_binary())


def _pack_array(array: UInt8Image | bytes | None) -> pa.Array:
    if array is None:
        return pa.nulls(1, pa.large_binary())
    data = pa.py_buffer(array if isinstance(array, bytes) else np.ascontiguousarray(array).data.cast("B"))
    offsets = pa.py_buffer(np.array([0, data.size], np.int64))
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, data])


def view_buffers(column: pa.ChunkedArray) -> Iterator[memoryview | None]:
    """Yield the rows of a large_binary column as views of its buffers."""
    for chunk in column.chunks:
        if not len(chunk):
            continue
        _, offset_buffer, data = chunk.buffers()
        offsets = None
        if offset_buffer:
            offsets = np.frombuffer(offset_buffer, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        view = memoryview(data) if data else memoryview(b"")
        for n, valid in enumerate(chunk.is_valid().to_pylist()):
            yield view[offsets[n] : offsets[n + 1]] if valid and offsets is not None else None


def view_images(table: pa.Table) -> Iterator[UInt8Image | None]:
    """Yield the `pixels` column as (h, w, 3) views; None for a row without pixels."""
    sizes = zip(table["pixels_height"].to_pylist(), table["pixels_width"].to_pylist(), strict=True)
    for view, (height, width) in zip(view_buffers(table["pixels"]), sizes, strict=True):
        yield None if view is None else np.frombuffer(view, np.uint8).reshape(height, width, 3)


def read_frames(table: pa.Table) -> Iterator[Frame]:
    """Yield where the pixels of each row lie in the full image."""
    columns = (table[name].to_pylist() for name in ("pixels_scale", "pixels_left", "pixels_top"))
    for scale, left, top in zip(*columns, strict=True):
        yield Frame() if scale is None else Frame(scale, left, top)


def to_vectors(column: pa.ChunkedArray, width: int) -> Float32:
    """Convert a list<float32> column without nulls to an array (n, width); a view if the column is one chunk."""
    parts = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, width) for chunk in column.chunks]
    if len(parts) == 1:
        return np.asarray(parts[0], np.float32)
    return np.concatenate(parts).astype(np.float32, copy=False) if parts else np.empty((0, width), np.float32)


def to_float_lists(rows: Float32, valid: Bool | None = None) -> pa.ListArray:
    """Convert an array to a list<float32> column.

    Args:
        rows: the valid rows, (m, width).
        valid: whether each row of the column is valid, (n,); the others become null. All are by default.
    """
    count = len(rows) if valid is None else len(valid)
    lengths = np.full(count, rows.shape[1]) if valid is None else np.where(valid, rows.shape[1], 0)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    mask = None if valid is None else pa.array(~valid)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.ravel(rows), pa.float32()), mask=mask)


def to_ragged_lists(rows: Sequence[Float32]) -> pa.ListArray:
    """Convert arrays of any length to a list<float32> column."""
    offsets = np.concatenate([[0], np.cumsum([row.size for row in rows])]).astype(np.int32)
    values = np.concatenate([np.ravel(row) for row in rows]) if rows else np.empty(0, np.float32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, pa.float32()))


def read_embeddings(column: pa.Array | pa.ChunkedArray, dim: int) -> tuple[Float32, Bool]:
    """Read a column of lists of `dim` numbers, of any list type.

    Returns:
        Vectors (n, dim), and whether (n,) the row is a list of `dim` numbers. Other rows are zero. Nulls in a list
        are NaN.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    complete = np.asarray(lengths == dim)
    flat = (array if complete.all() else array.filter(pa.array(complete))).flatten().cast(pa.float32())
    values = flat.to_numpy(zero_copy_only=flat.null_count == 0).reshape(-1, dim)
    if complete.all():
        return values, complete
    vectors = np.zeros((len(array), dim), np.float32)
    vectors[complete] = values
    return vectors, complete
