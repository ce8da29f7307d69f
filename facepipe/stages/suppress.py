"""Suppress: images whose bytes were erased from the gallery go no further, whatever they are called now."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from facepipe.arrow import pack_arrays, set_columns
from facepipe.gallery import suppressed
from facepipe.hashing import hash64
from facepipe.schema import ERASED, OK


@dataclass(frozen=True)
class Suppress:
    """Stands behind Read where something has been erased; `gallery` holds the hashes of what must not come back."""

    gallery: str

    needs: ClassVar = ("bytes", "image_id", "status")
    adds: ClassVar = ()

    @cached_property
    def _erased(self) -> Any:
        return suppressed.read_contents(self.gallery)

    def setup(self) -> None:
        """Read the hashes."""
        _ = self._erased

    def __call__(self, table: pa.Table) -> pa.Table:
        ids, statuses = table["image_id"].to_pylist(), table["status"].to_pylist()
        hashes = np.array([hash64(image or "") for image in ids], np.uint64)
        gone = np.isin(hashes, self._erased)
        if not gone.any():
            return table
        chunks = [chunk for chunk in table["bytes"].chunks if len(chunk)]
        kept = pa.chunked_array(
            [pack_arrays([None]).chunk(0) if hide else chunk for hide, chunk in zip(gone, chunks, strict=True)],
            pa.large_binary(),
        )
        statuses = [ERASED if hide and status == OK else status for hide, status in zip(gone, statuses, strict=True)]
        return set_columns(table, {"bytes": kept, "status": pa.array(statuses, pa.string())})
