"""Tell the user if the images of a new gallery look like aligned crops, which need no detector."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.gallery import Gallery
from facepipe.models.detectors.aligned import AlignedCrops
from facepipe.models.zoo.registry import ALIGNED, GIVEN

_SAMPLED_ROWS = 256
_MIN_IMAGES = 20
_MAX_SIDE = 256  # crops of training sets are 96 to 224 pixels wide
# Distance of the landmarks found from those of the template, as a share of the crop's height: median over images.
_MAX_DISTANCE = 0.04


def suggest_aligned(gallery: Gallery) -> list[str]:
    """Suggest `--aligned` if the first images are crops of one size, with faces at the template's place."""
    if gallery.contract.detector == ALIGNED or gallery.contract.detector.startswith(GIVEN):
        return []
    columns = ["width", "height", "landmarks", "face_index"]
    rows = _read_first_rows(gallery, columns)
    found = rows.filter(pc.equal(rows["face_index"], 0))
    sizes = set(zip(found["width"].to_pylist(), found["height"].to_pylist(), strict=True))
    if found.num_rows < _MIN_IMAGES or len(sizes) != 1:
        return []
    width, height = sizes.pop()
    if max(width, height) > _MAX_SIDE:
        return []
    landmarks = np.array(found["landmarks"].to_pylist(), np.float32).reshape(-1, 5, 2)
    expected = AlignedCrops().locate_face(width, height).landmarks
    distances = np.linalg.norm(landmarks - expected, axis=2).mean(axis=1) / height
    if np.median(distances) > _MAX_DISTANCE:
        return []
    return [
        f"the images look like aligned crops ({width}x{height}). Into a new gallery, `--aligned` takes them as they "
        "are: no face is missed, and vectors are better"
    ]


def _read_first_rows(gallery: Gallery, columns: list[str]) -> pa.Table:
    """Read some first rows. A small run writes several small files."""
    batches: list[pa.RecordBatch] = []
    for batch in gallery.batches(columns, rows=_SAMPLED_ROWS):
        batches.append(batch)
        if sum(part.num_rows for part in batches) >= _SAMPLED_ROWS:
            break
    return pa.Table.from_batches(batches) if batches else gallery.to_arrow(columns)
