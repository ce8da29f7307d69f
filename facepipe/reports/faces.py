"""What a report shows of some faces: their images, labels and pictures."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from facepipe.gallery import Gallery
from facepipe.types import Int64

# Columns of a face that a page shows.
_COLUMNS = ("face_id", "uri", "identity", "thumb")


@dataclass(frozen=True)
class FaceDetails:
    """One face, as a report shows it.

    Attributes:
        uri: uri of its image.
        identity: its label, if any.
        thumb: its JPEG as stored in the gallery, if any.
    """

    uri: str
    identity: str | None
    thumb: bytes | None


def read_face_details(gallery: Gallery, face_ids: Int64) -> dict[int, FaceDetails]:
    """Read some faces. Memory grows with their number, about 4 kB per face.

    One pass over the ids finds them. Of the thumbnails only the pages that hold these are read, some 130 kB each.

    Args:
        gallery: the gallery.
        face_ids: ids, (n,).

    Returns:
        Details by face id; ids that the gallery does not hold are missing.
    """
    if not len(face_ids):
        return {}
    details: dict[int, FaceDetails] = {}
    for part in gallery.read_chosen_rows("face_id", pa.array(np.unique(face_ids), pa.int64()), _COLUMNS):
        rows = zip(*(part[name].to_pylist() for name in _COLUMNS), strict=True)
        for face_id, uri, identity, thumb in rows:
            details[face_id] = FaceDetails(uri, identity, thumb)
    return details
