"""What a report shows of some faces: their images, labels, pictures and places."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from facepipe.gallery import Gallery
from facepipe.reports.model import PhotoPlace
from facepipe.types import Float32, Int64

# Columns of a face that a page shows.
_COLUMNS = ("face_id", "uri", "identity", "thumb", "width", "height", "box")


@dataclass(frozen=True)
class FaceDetails:
    """One face, as a report shows it.

    Attributes:
        uri: uri of its image.
        identity: its label, if any.
        thumb: its JPEG as stored in the gallery, if any.
        place: where it is in its photo, if that is known.
    """

    uri: str
    identity: str | None
    thumb: bytes | None
    place: PhotoPlace | None = None


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
        for face_id, uri, identity, thumb, width, height, box in rows:
            details[face_id] = FaceDetails(uri, identity, thumb, build_place(width, height, box))
    return details


def build_place(width: int | None, height: int | None, box: Sequence[float] | None) -> PhotoPlace | None:
    """Build the place of a face in its photo; None if the gallery does not know it, as of adopted encodings."""
    if not width or not height or box is None or len(box) != 4:
        return None
    values: list[Any] = list(box)
    if any(value is None or not np.isfinite(value) for value in values):
        return None
    left, top, right, bottom = (round(value) for value in values)
    return PhotoPlace(width, height, (left, top, right, bottom))


def list_distances(vectors: Float32) -> tuple[float, ...]:
    """List the distances of some faces, of each to all later ones, from their unit vectors (n, 128)."""
    first, second = np.triu_indices(len(vectors), 1)
    products = np.einsum("nd,nd->n", vectors[first], vectors[second])
    return tuple(np.sqrt(np.maximum(0.0, 2 - 2 * products)).tolist())
