"""What a report shows of some faces: where they are, what they are called, and their pictures."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from facepipe.gallery import Gallery
from facepipe.types import Int64

_COLUMNS = ("face_id", "uri", "identity", "thumb")


@dataclass(frozen=True)
class Shown:
    """One face: its image's uri, its label, its stored JPEG."""

    uri: str
    identity: str | None
    thumb: bytes | None


def shown(gallery: Gallery, face_ids: Int64) -> dict[int, Shown]:
    """Some faces (n,) by face id, in one streamed pass; memory grows with n (about 4 kB a face)."""
    if not len(face_ids):
        return {}
    wanted = ds.field("face_id").isin(pa.array(np.unique(face_ids), pa.int64()))
    found: dict[int, Shown] = {}
    for batch in gallery.batches(_COLUMNS, wanted):
        ids, *columns = (batch[name].to_pylist() for name in _COLUMNS)
        found.update(zip(ids, (Shown(*row) for row in zip(*columns, strict=True)), strict=True))
    return found
