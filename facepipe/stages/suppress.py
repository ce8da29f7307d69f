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
from facepipe.types import Bool


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
        return hide_bytes(table, self._erased_hashes.contains(hashes), ERASED)


def hide_bytes(table: pa.Table, is_hidden: Bool, status: str) -> pa.Table:
    """Drop the bytes of some images, so that no later stage works on them, and give those that were read a status.

    Args:
        table: images as Read returns them, n of them.
        is_hidden: which ones, (n,).
        status: the status.
    """
    if not is_hidden.any():
        return table
    # One chunk per row, as `pack` makes them.
    chunks = [chunk for chunk in table["bytes"].chunks if len(chunk)]
    empty = pack_arrays([None]).chunk(0)
    visible = [empty if hides else chunk for hides, chunk in zip(is_hidden, chunks, strict=True)]
    statuses = [
        status if hides and old == OK else old
        for hides, old in zip(is_hidden, table["status"].to_pylist(), strict=True)
    ]
    columns = {
        "bytes": pa.chunked_array(visible, pa.large_binary()),
        "status": pa.array(statuses, pa.string()),
    }
    return set_columns(table, columns)
