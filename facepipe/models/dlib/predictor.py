"""dlib's five-point landmark predictor (Kazemi and Sullivan, CVPR 2014; King, dlib-models 2017), to the pixel.

Its points are eye CORNERS and the base of the nose. Other detectors' points are eye centres, nose tip and mouth
corners: fed to dlib's chip template they give chips of another scale, and vectors that do not match those of
galleries made with dlib. So only a box may come from elsewhere (`chip.square`), never the points.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from facepipe.imaging.geometry import fit_similarity
from facepipe.models.dlib.predictor_format import LEVELS, POINTS, SPLITS, TREES, Cascade, read_cascade
from facepipe.models.weights import find_package_file, verify_sha256
from facepipe.types import Float32, Int16, Int64, UInt8Image

Rect = tuple[int, int, int, int]

PREDICTOR_SHA256 = "c4b1e9804792707d3a405c2c16a80a20269e6675021f64a41d30fffafbc41888"
_DEPTH = 4  # of a tree
_FIRST_SPLIT, _FIRST_LEAF = SPLITS * np.arange(TREES), (SPLITS + 1) * np.arange(TREES)


class Level(NamedTuple):
    """One level of the cascade, its trees one after the other: tree t's split s is at 15 t + s, its leaf l at 16 t + l.

    pixels: (2, 7500) which two pixels a split compares; thresholds: (7500,); leaves: (8000, 10)
    anchors: (800,) and deltas: (2, 800), where the pixels are
    """

    pixels: Int16
    thresholds: Float32
    leaves: Float32
    anchors: Int64
    deltas: Float32


class Predictor(NamedTuple):
    """Mean shape (5, 2) in units of the face's box, and the levels in the order they run."""

    initial: Float32
    levels: tuple[Level, ...]


@lru_cache(maxsize=1)
def load_predictor() -> Predictor:
    """The predictor of the package face-recognition-models, checked; WeightsError where it is missing or altered."""
    name = "models/shape_predictor_5_face_landmarks.dat"
    file = find_package_file("face_recognition_models", name, "face-recognition-models")
    return arrange_cascade(read_cascade(verify_sha256(file.read_bytes(), PREDICTOR_SHA256, str(file))))


def arrange_cascade(cascade: Cascade) -> Predictor:
    """The cascade laid out for `predict`, read-only."""
    pixels = np.stack([cascade.first, cascade.second], 1).reshape(LEVELS, 2, -1).astype(np.int16)
    thresholds, leaves = cascade.thresholds.reshape(LEVELS, -1), cascade.leaves.reshape(LEVELS, -1, 2 * POINTS)
    deltas = np.ascontiguousarray(cascade.deltas.transpose(0, 2, 1))
    levels = [Level(*level) for level in zip(pixels, thresholds, leaves, cascade.anchors, deltas, strict=True)]
    for array in (cascade.initial, *(array for level in levels for array in level)):
        array.setflags(write=False)
    return Predictor(cascade.initial, tuple(levels))


def predict(predictor: Predictor, image: UInt8Image, rect: Rect) -> Int64:
    """(5, 2) points (x, y) in an image (h, w, 3) RGB of the face in `rect`, an inclusive (left, top, right, bottom).

    0, 1: outer and inner corner of the eye on the image's right; 2, 3: the same on its left; 4: base of the nose.
    Pixels outside the image count as black; points may lie outside it. Numbers are float32 wherever dlib's are.
    """
    shape = predictor.initial
    for level in predictor.levels:
        values = _pixels(level, image, rect, (predictor.initial, shape))
        steps = level.leaves.take(_leaves(level, values), 0)
        # dlib adds tree after tree: another order of summation would round differently.
        shape = np.cumsum(np.concatenate([shape.reshape(1, -1), steps]), 0, np.float32)[-1].reshape(-1, 2)
    return np.stack([_in_image(shape[:, 0], rect[::2]), _in_image(shape[:, 1], rect[1::2])], -1)


def _pixels(level: Level, image: UInt8Image, rect: Rect, shapes: tuple[Float32, Float32]) -> Float32:
    """(800,) intensities of the level's pixels, which turn and grow with the shape."""
    initial, shape = shapes
    turn = fit_similarity(initial.astype(np.float64), shape.astype(np.float64))[:, :2].astype(np.float32)
    dx, dy = level.deltas
    points = [dx * row[0] + dy * row[1] + shape[:, k].take(level.anchors) for k, row in enumerate(turn)]
    x, y = (_in_image(part, ends) for part, ends in zip(points, (rect[::2], rect[1::2]), strict=True))
    height, width = image.shape[:2]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    if not inside.all():
        x, y = np.where(inside, x, 0), np.where(inside, y, 0)
    # dlib's intensity: the integer mean of the channels
    red, green, blue = image[y, x].T.astype(np.int16)
    return ((red + green + blue) // 3 * inside).astype(np.float32)


def _leaves(level: Level, values: Float32) -> Int64:
    """(500,) which leaf each tree ends in."""
    node = np.zeros(TREES, np.int64)
    for _ in range(_DEPTH):
        split = _FIRST_SPLIT + node
        pair = level.pixels.take(split, 1)
        left = values.take(pair[0]) - values.take(pair[1]) > level.thresholds.take(split)
        node = 2 * node + 2 - left
    return _FIRST_LEAF + (node - SPLITS)


def _in_image(values: Float32, ends: tuple[int, ...]) -> Int64:
    """Coordinates in units of the box, which reaches from pixel ends[0] to ends[1], as pixels, halves rounded up."""
    return np.floor(values.astype(np.float64) * (ends[1] - ends[0]) + ends[0] + 0.5).astype(np.int64)
