"""`encode`: images to faces in one call, for notebooks and other programs; the same stages as the pipeline."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa

from facepipe.arrow import pack_arrays
from facepipe.errors import ConfigError
from facepipe.hashing import compute_image_id
from facepipe.schema import OK, WORK_ITEM
from facepipe.sources.item import make_file_uri
from facepipe.stages import Align, Chain, Decode, Detect, Embed, Read
from facepipe.types import Float32, UInt8

Image = str | os.PathLike[str] | UInt8


@dataclass(frozen=True)
class Face:
    """One face. box: x1 y1 x2 y2; landmarks (5, 2); embedding (128,) of unit norm; embedding_norm: norm before."""

    box: Float32
    landmarks: Float32
    det_score: float
    embedding: Float32
    embedding_norm: float
    face_px: float
    sharpness: float
    yaw: float
    roll: float


@dataclass(frozen=True)
class Encoded:
    """What came of one image: its status as in the gallery (ok, no_face, decode_error, ...), and its faces."""

    status: str
    error: str | None
    faces: list[Face]


def encode(
    images: Iterable[Image], detect: Detect | None = None, embed: Embed | None = None, batch: int = 16
) -> list[Encoded]:
    """Detect and embed the faces of images: paths, or (h, w, 3) uint8 RGB arrays. One result an image, in order.

        for result in facepipe.encode(["a.jpg", "b.jpg"]):
            for face in result.faces:
                print(face.box, face.embedding)

    Distances between embeddings are Euclidean: `np.linalg.norm(a.embedding - b.embedding)`.
    """
    detect, embed = detect or Detect(), embed or Embed()
    models = (detect, Align(embedder=embed.model, detector=detect.model, thumbs=False), embed)
    from_paths, from_pixels = Chain((Read(), Decode(), *models), batch), Chain(models, batch)
    for stage in from_paths.stages:
        stage.setup()
    results: list[Encoded] = []
    for is_array, group in groupby(images, lambda image: isinstance(image, np.ndarray)):
        rows = list(group)
        for at in range(0, len(rows), batch):
            part: Any = rows[at : at + batch]
            results += _results(from_pixels(_pixels(part)) if is_array else from_paths(_paths(part)))
    return results


def _paths(paths: Sequence[str | os.PathLike[str]]) -> pa.Table:
    rows = [{"uri": f"{n}:{make_file_uri(os.fspath(path))}", "path": os.fsencode(path)} for n, path in enumerate(paths)]
    return pa.Table.from_pylist(rows, schema=WORK_ITEM)


def _pixels(arrays: Sequence[UInt8]) -> pa.Table:
    for array in arrays:
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
            raise ConfigError(f"images are (h, w, 3) uint8 RGB arrays, got shape {array.shape} of {array.dtype}")
    n = len(arrays)
    heights = pa.array([array.shape[0] for array in arrays], pa.int32())
    widths = pa.array([array.shape[1] for array in arrays], pa.int32())
    columns = {
        "uri": pa.array([f"{k}:array" for k in range(n)]),
        "image_id": pa.array([compute_image_id(np.ascontiguousarray(array).tobytes()) for array in arrays]),
        "status": pa.array([OK] * n),
        "error": pa.nulls(n, pa.string()),
        "bytes": pack_arrays([None] * n),
        "pixels": pack_arrays(list(arrays)),
        "pixels_height": heights,
        "pixels_width": widths,
        "pixels_scale": pa.array([1.0] * n),
        "pixels_left": pa.array([0.0] * n),
        "pixels_top": pa.array([0.0] * n),
        "height": heights,
        "width": widths,
    }
    return pa.table(columns)


def _results(table: pa.Table) -> list[Encoded]:
    found = []
    for _, rows in groupby(table.to_pylist(), lambda row: row["uri"]):
        faces = list(rows)
        found.append(
            Encoded(faces[0]["status"], faces[0]["error"], [_face(r) for r in faces if r["face_id"] is not None])
        )
    return found


def _face(row: dict[str, Any]) -> Face:
    return Face(
        box=np.array(row["box"], np.float32),
        landmarks=np.array(row["landmarks"], np.float32).reshape(5, 2),
        embedding=np.array(row["embedding"], np.float32),
        **{name: row[name] for name in ("det_score", "embedding_norm", "face_px", "sharpness", "yaw", "roll")},
    )
