"""Arrow files of Hugging Face's `save_to_disk`: where the bytes of each row's image are in the file.

Arrow lays the values of a column out one after another, and `save_to_disk` does not compress them. So an image is a
range of bytes of the file, which is read without Arrow.
"""

import mmap
import os
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from facepipe.errors import StorageError

_FILE_MAGIC = b"ARROW1"


class ArrowTable:
    """An Arrow file on a disk, in the stream or the file format, as a table of batches.

    Attributes:
        schema_arrow: Schema.
    """

    def __init__(self, file: BinaryIO):
        """Open a file. Raises StorageError if it is in an object store, ValueError or OSError if it is not Arrow."""
        try:
            descriptor = file.fileno()
        except OSError as error:
            raise StorageError("an .arrow file in an object store is not read: copy it to a disk") from error
        if not os.fstat(descriptor).st_size:
            raise ValueError("the file is empty")
        self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        self._buffer = pa.py_buffer(self._map)
        source = pa.BufferReader(self._buffer)
        if self._map[: len(_FILE_MAGIC)] == _FILE_MAGIC:
            reader = pa.ipc.open_file(source)
            self._batches: Iterator[pa.RecordBatch] = (reader.get_batch(n) for n in range(reader.num_record_batches))
        else:
            reader = pa.ipc.open_stream(source)
            self._batches = iter(reader)
        self.schema_arrow = reader.schema

    def iter_batches(self, rows: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield the batches in parts of at most so many rows. All columns are there, because none is copied."""
        for batch in self._batches:
            for at in range(0, batch.num_rows, rows):
                yield batch.slice(at, rows)

    def locate(self, batch: pa.RecordBatch, column: str) -> list[tuple[int, int] | None]:
        """Locate the images of a batch in the file.

        Args:
            batch: a batch of `iter_batches`.
            column: column of bytes, or of structs with bytes.

        Returns:
            First byte and length of each row's image; None for a row without one.

        Raises:
            ValueError: the file is compressed, or holds the images in another type.
        """
        values = batch.column(column)
        is_valid = values.is_valid().to_numpy(zero_copy_only=False)
        if pa.types.is_struct(values.type):
            values = values.field("bytes")
            is_valid &= values.is_valid().to_numpy(zero_copy_only=False)
        if pa.types.is_large_binary(values.type):
            kind: type[np.int32 | np.int64] = np.int64
        elif pa.types.is_binary(values.type):
            kind = np.int32
        else:
            raise ValueError(f"images of the type {values.type} are not read")
        _, ends, content = values.buffers()
        if not len(values) or content is None:
            return [None] * len(values)
        begin = content.address - self._buffer.address
        if not 0 <= begin <= len(self._map) - content.size:
            raise ValueError("the file is compressed: save it without compression, or as Parquet")
        bounds = np.frombuffer(ends, kind)[values.offset : values.offset + len(values) + 1].astype(np.int64)
        lengths = np.diff(bounds)
        if (lengths < 0).any() or bounds[0] < 0 or bounds[-1] > content.size:
            raise ValueError("the places of its values are damaged")
        places = zip((begin + bounds[:-1]).tolist(), lengths.tolist(), is_valid.tolist(), strict=True)
        return [(offset, length) if valid else None for offset, length, valid in places]
