"""Which faces are fit to stand for a person: to found a cluster, or to show what strangers look like.

Blurred, tiny and cut faces of different persons are nearer to each other than to themselves in good photos. They may
join a person, but two of them show nothing. `find_unfit_faces` judges rows, `find_unfit_nodes` the nodes of a graph.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.curation.graph.nodes import Nodes
from facepipe.gallery import Gallery
from facepipe.imaging.quality import QualityFigures, estimate_quality
from facepipe.types import Bool, Float32, Float64

COLUMNS = ("face_quality", "visible", "det_score", "face_px", "sharpness", "yaw")
"""Columns of the gallery that the functions here read."""
MIN_QUALITY = 0.1
"""Quality of a fit face. On LFW 0.4 % of the faces have less; textures, ornaments and smears mostly have."""

# A face of which less is visible is cut by the edge of its picture.
_MIN_VISIBLE = 0.8
# Where most faces are poor, as of a distant camera, a fit face has this share of the median quality.
_SHARE_OF_MEDIAN = 0.5
# Terms of the quality that are not known count as those of a good face.
_GOOD_SCORE = 1.0
_GOOD_SIZE = np.inf
_ROWS = 65536


def find_unfit_faces(faces: pa.RecordBatch | pa.Table, min_quality: float = MIN_QUALITY) -> Bool:
    """Find the faces that are not fit to found a person or to anchor a threshold.

    Args:
        faces: rows of faces with `COLUMNS`.
        min_quality: quality of a fit face; see `choose_min_quality`.

    Returns:
        Whether each face (n,) is unfit. A face of which nothing is known is fit.
    """
    is_cut = _read(faces, "visible", 1.0) < _MIN_VISIBLE
    return np.asarray(is_cut | (read_quality(faces) < min_quality), bool)


def read_quality(faces: pa.RecordBatch | pa.Table) -> Float64:
    """Read the quality of faces (n,); NaN if nothing is known.

    Rows of older versions have no `face_quality`. It is then estimated from the other columns.
    """
    quality = _read(faces, "face_quality", np.nan)
    scores = _read(faces, "det_score", np.nan)
    face_px = _read(faces, "face_px", np.nan)
    sharpness = _read(faces, "sharpness", np.nan)
    figures = QualityFigures(
        scores=np.nan_to_num(scores, nan=_GOOD_SCORE),
        visible=_read(faces, "visible", 1.0),
        face_px=np.where(np.isnan(face_px), _GOOD_SIZE, face_px),
        sharpness=np.where(np.isnan(sharpness), _GOOD_SIZE, sharpness),
        yaw=_read(faces, "yaw", 0.0),
        plausibility=np.ones(len(scores)),
    )
    is_known = ~(np.isnan(scores) & np.isnan(face_px) & np.isnan(sharpness))
    estimated = np.where(is_known, estimate_quality(figures), np.nan)
    return np.where(np.isnan(quality), estimated, quality)


def choose_min_quality(quality: Float32 | Float64) -> float:
    """Choose the quality of a fit face by those of a gallery (n,): `MIN_QUALITY`, or less if most faces are poor."""
    known = quality[~np.isnan(quality)]
    if not len(known):
        return MIN_QUALITY
    return min(MIN_QUALITY, _SHARE_OF_MEDIAN * float(np.median(known)))


def find_unfit_nodes(gallery: Gallery, nodes: Nodes, *, side: int = 0) -> Bool:
    """Find the nodes (n,) of a gallery that are unfit faces.

    Args:
        gallery: the gallery.
        nodes: n nodes.
        side: position of the gallery among those of the nodes. Nodes of others are not unfit.
    """
    quality = np.full(len(nodes), np.nan, np.float32)
    is_unfit = np.zeros(len(nodes), bool)
    for batch in gallery.batches(["face_id", *COLUMNS], rows=_ROWS):
        faces = batch.filter(batch["face_id"].is_valid())
        at = nodes.find(faces["face_id"].to_numpy(), side)
        is_node = at >= 0
        quality[at[is_node]] = read_quality(faces)[is_node]
        # Without a limit of quality only cut faces are unfit.
        is_unfit[at[is_node]] = find_unfit_faces(faces, 0.0)[is_node]
    return is_unfit | (quality < choose_min_quality(quality))


def read_min_quality(gallery: Gallery) -> float:
    """Choose the quality of a fit face of a gallery by a pass over its rows."""
    parts = [np.empty(0, np.float32)]
    for batch in gallery.batches(["face_id", *COLUMNS], rows=_ROWS):
        faces = batch.filter(batch["face_id"].is_valid())
        parts.append(read_quality(faces).astype(np.float32))
    return choose_min_quality(np.concatenate(parts))


def _read(faces: pa.RecordBatch | pa.Table, name: str, unknown: float) -> Float64:
    """Read a column (n,) of numbers with a value for those that are not known."""
    values = pc.fill_null(faces[name].cast(pa.float64()), unknown)
    return np.asarray(values.to_numpy(zero_copy_only=False), np.float64)
