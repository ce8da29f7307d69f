"""dlib's five-point landmark predictor (Kazemi and Sullivan, CVPR 2014; King, dlib-models 2017), to the pixel.

Its points are eye CORNERS and the base of the nose. Other detectors' points are eye centres, tip of the nose and
corners of the mouth. In dlib's chip template these give chips of another scale, and vectors that do not match those of
galleries made with dlib. So only a box may come from elsewhere (`find_dlib_square`), never the points.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from facepipe.imaging.dlib_chip import Rect
from facepipe.imaging.geometry import fit_similarity
from facepipe.models.dlib.predictor_format import LEVELS, POINTS, SPLITS, TREES, Cascade, read_cascade
from facepipe.models.weights import find_package_file, verify_sha256
from facepipe.types import Float32, Int16, Int64, UInt8Image

PREDICTOR_SHA256 = "c4b1e9804792707d3a405c2c16a80a20269e6675021f64a41d30fffafbc41888"
_TREE_DEPTH = 4
# Where the splits and the leaves of each tree begin.
_FIRST_SPLIT = SPLITS * np.arange(TREES)
_FIRST_LEAF = (SPLITS + 1) * np.arange(TREES)


class Level(NamedTuple):
    """One level of the cascade, its trees one after the other.

    Split s of tree t is at 15 t + s, its leaf l at 16 t + l.

    Attributes:
        pixels: (2, 7500) the two pixels that a split compares.
        thresholds: (7500,) of the splits.
        leaves: (8000, 10) what a leaf adds to the shape.
        anchors: (800,) the point beside which each pixel lies.
        deltas: (2, 800) how far it lies from it.
    """

    pixels: Int16
    thresholds: Float32
    leaves: Float32
    anchors: Int64
    deltas: Float32


class Predictor(NamedTuple):
    """The predictor; lengths are in units of the face's box.

    Attributes:
        initial: (5, 2) mean shape.
        levels: The levels in the order they run.
    """

    initial: Float32
    levels: tuple[Level, ...]

    def predict(self, image: UInt8Image, rect: Rect) -> Int64:
        """Predict the points of a face.

        Pixels outside the image count as black, and points may lie outside it. Numbers are float32 wherever dlib's are.

        Args:
            image: (h, w, 3) RGB.
            rect: dlib's square around the face.

        Returns:
            (5, 2) points (x, y). 0 and 1 are the outer and the inner corner of the eye on the image's right, 2 and 3
            those of the eye on its left, 4 is the base of the nose.
        """
        shape = self.initial
        for level in self.levels:
            intensities = _read_intensities(level, image, rect, self.initial, shape)
            steps = level.leaves.take(_find_leaves(level, intensities), 0)
            # dlib adds tree after tree: another order of summation would round differently.
            shape = np.cumsum(np.concatenate([shape.reshape(1, -1), steps]), 0, np.float32)[-1].reshape(-1, 2)
        x = _to_pixels(shape[:, 0], rect[0], rect[2])
        y = _to_pixels(shape[:, 1], rect[1], rect[3])
        return np.stack([x, y], -1)


@lru_cache(maxsize=1)
def load_predictor() -> Predictor:
    """Load the predictor of the package face-recognition-models and check its hash.

    Raises:
        WeightsError: The file is missing or altered.
    """
    name = "models/shape_predictor_5_face_landmarks.dat"
    file = find_package_file("face_recognition_models", name, "face-recognition-models")
    return arrange_cascade(read_cascade(verify_sha256(file.read_bytes(), PREDICTOR_SHA256, str(file))))


def arrange_cascade(cascade: Cascade) -> Predictor:
    """Arrange the cascade for `Predictor.predict`; its arrays become read-only."""
    # The first and the second pixel of every split, (levels, 2, trees * splits).
    pixels = np.stack([cascade.first, cascade.second], 1).reshape(LEVELS, 2, -1).astype(np.int16)
    thresholds = cascade.thresholds.reshape(LEVELS, -1)
    leaves = cascade.leaves.reshape(LEVELS, -1, 2 * POINTS)
    deltas = np.ascontiguousarray(cascade.deltas.transpose(0, 2, 1))
    levels = [Level(*level) for level in zip(pixels, thresholds, leaves, cascade.anchors, deltas, strict=True)]
    for level in levels:
        for array in level:
            array.setflags(write=False)
    cascade.initial.setflags(write=False)
    return Predictor(cascade.initial, tuple(levels))


def _read_intensities(level: Level, image: UInt8Image, rect: Rect, initial: Float32, shape: Float32) -> Float32:
    """Read the intensities (800,) of the level's pixels, which turn and grow with the shape."""
    # Turn and scale from the mean shape to the current one, then place each pixel beside its point, (800,).
    rotation = fit_similarity(initial.astype(np.float64), shape.astype(np.float64))[:, :2].astype(np.float32)
    dx, dy = level.deltas
    x_in_box = dx * rotation[0, 0] + dy * rotation[0, 1] + shape[:, 0].take(level.anchors)
    y_in_box = dx * rotation[1, 0] + dy * rotation[1, 1] + shape[:, 1].take(level.anchors)
    x = _to_pixels(x_in_box, rect[0], rect[2])
    y = _to_pixels(y_in_box, rect[1], rect[3])
    height, width = image.shape[:2]
    is_inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    # Pixels outside are read at (0, 0) and set to black below.
    if not is_inside.all():
        x = np.where(is_inside, x, 0)
        y = np.where(is_inside, y, 0)
    # dlib's intensity is the integer mean of the channels.
    red, green, blue = image[y, x].T.astype(np.int16)
    return ((red + green + blue) // 3 * is_inside).astype(np.float32)


def _find_leaves(level: Level, intensities: Float32) -> Int64:
    """Find the leaf (500,) that each tree ends in."""
    # The children of node n are 2 n + 1 and 2 n + 2; after four steps all nodes are leaves.
    node = np.zeros(TREES, np.int64)
    for _ in range(_TREE_DEPTH):
        split = _FIRST_SPLIT + node
        first, second = level.pixels.take(split, 1)
        goes_left = intensities.take(first) - intensities.take(second) > level.thresholds.take(split)
        node = 2 * node + 2 - goes_left
    return _FIRST_LEAF + (node - SPLITS)


def _to_pixels(values: Float32, first: int, last: int) -> Int64:
    """Convert coordinates in units of the box, from pixel `first` to pixel `last`, to pixels; halves round up."""
    return np.floor(values.astype(np.float64) * (last - first) + first + 0.5).astype(np.int64)
