"""FindMoved: recognise images that the gallery has under another uri, so that they are not embedded again."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.gallery.commits import unlisted
from facepipe.hashing import hash64_column
from facepipe.schema import MOVED, OK
from facepipe.sorted_lookup import is_in_sorted
from facepipe.stages.suppress import hide_bytes


@dataclass(frozen=True)
class FindMoved:
    """Set the status of images whose bytes the gallery has under a uri that may be given up, and drop their bytes.

    It follows Read. The listing is complete before the first image is read, and says which contents these are.

    Attributes:
        folder: folder of the run that holds what the listing found out
    """

    folder: str

    needs: ClassVar = ("bytes", "image_id", "status")
    adds: ClassVar = ()

    @cached_property
    def _contents(self) -> Any:
        return unlisted.map_contents(self.folder)

    def setup(self) -> None:
        """Do nothing: the listing is not complete yet."""

    def __call__(self, table: pa.Table) -> pa.Table:
        """Hide the bytes of moved images."""
        if not len(self._contents):
            return table
        is_read = pc.equal(table["status"], OK).to_numpy(zero_copy_only=False)
        is_moved = is_read & is_in_sorted(self._contents, hash64_column(table["image_id"]))
        return hide_bytes(table, np.asarray(is_moved), MOVED)
