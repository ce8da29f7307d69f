"""`encode`: from images to faces in one call, for notebooks and other programs, with the stages of the pipeline."""

import os
from collections.abc import Callable, Iterable, Sequence
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

Image = str | os.PathLike[str] | bytes | UInt8
"""An image: its path or URL, the content of its file, or its pixels."""


@dataclass(frozen=True)
class Face:
    """One face.

    Attributes:
        box: (4,) x1 y1 x2 y2 in pixels of the image.
        landmarks: (5, 2) eyes, nose and corners of the mouth.
        det_score: Score of the detector.
        embedding: (128,) of unit length.
        embedding_norm: Length of the embedding before it was normalised.
        face_px: Shorter side of the box in pixels.
        sharpness: Variance of the Laplacian of the chip.
        yaw: Degrees, positive if the face turns to the image's right.
        roll: Degrees, positive clockwise as seen.
        turn: Degrees clockwise by which the face lies in the image: 0, 90, 180 or 270.
        visible: Share of the face that lies inside the picture.
        face_quality: From 0 to 1; see docs/format.md.
    """

    box: Float32
    landmarks: Float32
    det_score: float
    embedding: Float32
    embedding_norm: float
    face_px: float
    sharpness: float
    yaw: float
    roll: float
    turn: int
    visible: float
    face_quality: float


@dataclass(frozen=True)
class Encoded:
    """The result of one image.

    Attributes:
        status: The same as in a gallery: ok, no_face, decode_error and so on.
        error: Why the image failed, if it did.
        faces: The faces, by falling score.
    """

    status: str
    error: str | None
    faces: list[Face]


def encode(
    images: Image | Iterable[Image],
    detect: Detect | None = None,
    embed: Embed | None = None,
    batch: int = 16,
    *,
    read: Read | None = None,
    decode: Decode | None = None,
) -> list[Encoded]:
    """Detect and embed the faces of images, as `facepipe embed` does with the same settings.

        for result in facepipe.encode(["a.jpg", "b.jpg"]):
            for face in result.faces:
                print(face.box, face.embedding)

    Distances between embeddings are Euclidean: `np.linalg.norm(a.embedding - b.embedding)`. To compare with a gallery,
    take the models from its contract, as `Detect(model=gallery.contract.detector)` and
    `Embed(model=gallery.contract.embedder, flip=gallery.contract.flip)`.

    A large JPEG is decoded at a half, a quarter or an eighth for the detector, which an array cannot be. So boxes in an
    array may lie some pixels beside those in its file.

    Args:
        images: Paths or URLs, contents of image files as bytes, or (h, w, 3) RGB arrays. One alone is a list of one.
        detect: Options of the detector.
        embed: Options of the embedder.
        batch: Images per batch.
        read: Options of reading files.
        decode: Options of decoding files.

    Returns:
        One result per image, in order.

    Raises:
        ConfigError: An image is of another type, or an array is not an RGB image.
    """
    if isinstance(images, str | os.PathLike | bytes | np.ndarray):
        images = [images]
    detect = detect or Detect()
    embed = embed or Embed()
    decode = (decode or Decode()).raise_working_side(detect.size)
    # Thumbnails are for galleries on disk only.
    align = Align(embedder=embed.model, detector=detect.model, thumbs=False)
    stages = (read or Read(), decode, detect, align, embed)
    for stage in stages:
        stage.setup()
    # Paths pass all stages. Contents enter the chain after they are read, and arrays after they are decoded.
    chains: dict[str, tuple[Chain, Callable[[Any], pa.Table]]] = {
        "path": (Chain(stages, batch), _tabulate_paths),
        "bytes": (Chain(stages[1:], batch), _tabulate_contents),
        "pixels": (Chain(stages[2:], batch), _tabulate_pixels),
    }
    results: list[Encoded] = []
    # Take runs of the same kind of image, so that results keep the order of the inputs.
    for kind, group in groupby(images, _find_kind):
        inputs = list(group)
        chain, tabulate = chains[kind]
        for start in range(0, len(inputs), batch):
            part: Any = inputs[start : start + batch]
            results += _to_results(chain(tabulate(part)))
    return results


def _find_kind(image: object) -> str:
    """Find out how an image is given: path, bytes or pixels."""
    if isinstance(image, str | os.PathLike):
        return "path"
    if isinstance(image, bytes):
        return "bytes"
    if isinstance(image, np.ndarray):
        return "pixels"
    raise ConfigError(
        "an image is a path or URL, the content of an image file as bytes, or an (h, w, 3) uint8 RGB array, not "
        f"{type(image).__name__}"
    )


def _tabulate_contents(contents: Sequence[bytes]) -> pa.Table:
    """Put the contents of files into the columns that Read adds."""
    n = len(contents)
    columns = {
        "uri": pa.array([f"{k}:bytes" for k in range(n)]),
        "image_id": pa.array([compute_image_id(content) for content in contents]),
        "status": pa.array([OK] * n),
        "error": pa.nulls(n, pa.string()),
        "bytes": pack_arrays(list(contents)),
    }
    return pa.table(columns)


def _tabulate_paths(paths: Sequence[str | os.PathLike[str]]) -> pa.Table:
    # The number keeps two rows of the same path apart.
    rows = [{"uri": f"{n}:{make_file_uri(os.fspath(path))}", "path": os.fsencode(path)} for n, path in enumerate(paths)]
    return pa.Table.from_pylist(rows, schema=WORK_ITEM)


def _tabulate_pixels(arrays: Sequence[UInt8]) -> pa.Table:
    """Put images into the columns that Decode adds."""
    # A wrong array is a mistake of the caller, not the status of one image.
    for array in arrays:
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
            raise ConfigError(f"images are (h, w, 3) uint8 RGB arrays, got shape {array.shape} of {array.dtype}")
    n = len(arrays)
    # Arrays are at full size already: scale 1, no offset, and no bytes left to decode again.
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


def _to_results(table: pa.Table) -> list[Encoded]:
    """Group the rows of faces by image."""
    results = []
    # An image without faces has one row, without a face_id; the rows of an image are consecutive.
    for _, group in groupby(table.to_pylist(), lambda row: row["uri"]):
        rows = list(group)
        faces = [_to_face(row) for row in rows if row["face_id"] is not None]
        results.append(Encoded(rows[0]["status"], rows[0]["error"], faces))
    return results


def _to_face(row: dict[str, Any]) -> Face:
    return Face(
        box=np.array(row["box"], np.float32),
        landmarks=np.array(row["landmarks"], np.float32).reshape(5, 2),
        det_score=row["det_score"],
        embedding=np.array(row["embedding"], np.float32),
        embedding_norm=row["embedding_norm"],
        face_px=row["face_px"],
        sharpness=row["sharpness"],
        yaw=row["yaw"],
        roll=row["roll"],
        turn=row["turn"],
        visible=row["visible"],
        face_quality=row["face_quality"],
    )
