"""Suppress: keep images out whose bytes were erased from the gallery, under any name."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import numpy as np
import pyarrow as pa

from facepipe.arrow import pack_arrays, set_columns
from facepipe.gallery import suppressed
from facepipe.hashing import hash64
from facepipe.schema import ERASED, OK


@dataclass(frozen=True)
class Suppress:
    """Drop the bytes of erased images, and set their status. It follows Read if a gallery has erased images.

    Attributes:
        gallery: folder or URL of the gallery, which holds the hashes of erased images
        secret: secret of these hashes, for a worker on a machine without the key; by default it is read
    """

    gallery: str
    secret: bytes | None = field(default=None, repr=False)

    needs: ClassVar = ("bytes", "image_id", "status")
    adds: ClassVar = ()

    @cached_property
    def _erased_hashes(self) -> suppressed.SuppressedHashes:
        return suppressed.read_contents(self.gallery, self.secret)

    def setup(self) -> None:
        """Read the hashes."""
        _ = self._erased_hashes

    def __call__(self, table: pa.Table) -> pa.Table:
        """Hide the bytes of erased images."""
        hashes = np.array([hash64(image_id or "") for image_id in table["image_id"].to_pylist()], np.uint64)
        is_erased = self._erased_hashes.contains(hashes)
        if not is_erased.any():
            return table
        # One chunk per row, as `pack` makes them.
        chunks = [chunk for chunk in table["bytes"].chunks if len(chunk)]
        empty = pack_arrays([None]).chunk(0)
        visible = [empty if is_hidden else chunk for is_hidden, chunk in zip(is_erased, chunks, strict=True)]
        statuses = [
            ERASED if is_hidden and status == OK else status
            for is_hidden, status in zip(is_erased, table["status"].to_pylist(), strict=True)
        ]
        columns = {
            "bytes": pa.chunked_array(visible, pa.large_binary()),
            "status": pa.array(statuses, pa.string()),
        }
        return set_columns(table, columns)
