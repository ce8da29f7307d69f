"""How a face becomes a chip: where its landmarks or its box go, and the cutting itself.

A layout is data, so that a gallery's contract can hold it.
"""

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from facepipe.imaging.geometry import Frame, fit_similarity, measure_scale, warp_chip
from facepipe.types import Float64, UInt8Image

Template = tuple[tuple[float, float], ...]
Square = tuple[float, float, float]
Kind = Literal["similarity", "eyes", "box", "dlib"]

# In 112x112: eyes, nose, corners of the mouth. Counted from one by SphereFace's MATLAB (Liu et al., CVPR 2017), used
# as if from zero by everyone since; 112x96 is the same eight columns further left.
ARCFACE_112: Template = (
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)


def scale_arcface_template(size: tuple[int, int]) -> Template:
    """ArcFace's template for chips of another (width, height): scaled by the height, centred in the width."""
    width, height = size
    scale = height / 112
    shift = (width / scale - 112) / 2
    return tuple((round((x + shift) * scale, 4), round(y * scale, 4)) for x, y in ARCFACE_112)


@dataclass(frozen=True)
class ChipLayout:
    """How an embedder wants its faces.

    size: (width, height) of a chip
    kind: similarity (the five landmarks to `template`, least squares), eyes (turned so that the eyes are level, then
        the box letterboxed), box (the box letterboxed, not turned), dlib (dlib's own five points and chip)
    template: five landmarks (x, y) in a chip, for similarity
    fill: grey level beside a letterboxed box
    """

    size: tuple[int, int]
    kind: Kind = "similarity"
    template: Template = ()
    fill: int = 0


def find_required_scale(layout: ChipLayout, box: Float64, landmarks: Float64) -> float:
    """Chip pixels per pixel of the full-size image; dlib's chips are made from the image itself."""
    return 1.0 if layout.kind == "dlib" else measure_scale(_matrix(layout, box, landmarks))


def cut_chip(
    layout: ChipLayout, view: tuple[UInt8Image, Frame], box: Float64, landmarks: Float64, square: Square | None = None
) -> UInt8Image:
    """(h, w, 3) uint8 chip of a face; box (4,) and landmarks (5, 2) in pixels of the full-size image.

    view: pixels, and where they lie in that image; square: makes dlib's box of this one (models/card.py)
    """
    pixels, frame = view
    corners = frame.from_full(box.reshape(2, 2)).reshape(4)
    if layout.kind == "dlib":
        return _dlib_chip(pixels, corners, square)
    matrix = _matrix(layout, corners, frame.from_full(landmarks))
    chip = warp_chip(pixels, matrix, layout.size)
    return chip if layout.kind == "similarity" else _letterboxed(chip, layout, corners)


def _matrix(layout: ChipLayout, box: Float64, landmarks: Float64) -> Float64:
    if layout.kind == "similarity":
        return fit_similarity(landmarks, np.array(layout.template))
    across = landmarks[1] - landmarks[0]
    angle = np.arctan2(across[1], across[0]) if layout.kind == "eyes" else 0.0
    scale = _fit(layout.size, box)
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    turn = np.array([[cos, sin], [-sin, cos]])
    middle = (np.array(layout.size) - 1) / 2
    return np.column_stack([turn, middle - turn @ ((box[:2] + box[2:]) / 2)])


def _fit(size: tuple[int, int], box: Float64) -> float:
    width, height = np.maximum(box[2:] - box[:2], 1e-3)
    return float(min(size[0] / width, size[1] / height))


def _letterboxed(chip: UInt8Image, layout: ChipLayout, box: Float64) -> UInt8Image:
    """The chip with `fill` wherever the box does not reach."""
    width, height = layout.size
    inner = np.clip(np.round((box[2:] - box[:2]) * _fit(layout.size, box)), 1, layout.size).astype(int)
    left, top = max(0, (width - inner[0]) // 2), max(0, (height - inner[1]) // 2)
    right, bottom = max(0, width - inner[0] - left), max(0, height - inner[1] - top)
    within = chip[top : height - bottom, left : width - right]
    grey = [layout.fill] * 3
    return np.asarray(cv2.copyMakeBorder(within, top, bottom, left, right, cv2.BORDER_CONSTANT, value=grey), np.uint8)


def _dlib_chip(pixels: UInt8Image, box: Float64, square: Square | None) -> UInt8Image:
    from facepipe.imaging.dlib_chip import cut_dlib_chip as dlib_chip
    from facepipe.imaging.dlib_chip import find_dlib_square as squared
    from facepipe.models.dlib.predictor import load_predictor, predict

    return dlib_chip(pixels, predict(load_predictor(), pixels, squared(box, square)))
