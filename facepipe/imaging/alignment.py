"""Cut a face out of an image, as the embedder wants it.

A layout says where the landmarks or the box of a face go in a chip. It is data, so that the contract of a gallery can
hold it.
"""

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from facepipe.imaging.dlib_chip import BoxToSquare, PredictPoints, cut_dlib_chip, find_dlib_square
from facepipe.imaging.geometry import Frame, fit_similarity, measure_scale, warp_chip
from facepipe.types import Float64, UInt8Image

Template = tuple[tuple[float, float], ...]
Kind = Literal["similarity", "eyes", "box", "dlib"]

# Eyes, nose and corners of the mouth in 112x112 chips. SphereFace's MATLAB code (Liu et al., CVPR 2017) counts pixels
# from one; everyone since uses these numbers as if counted from zero. 112x96 is the same, eight columns further left.
ARCFACE_112: Template = (
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)


def scale_arcface_template(size: tuple[int, int]) -> Template:
    """Scale ArcFace's template to chips of another size, by the height and centred in the width.

    Args:
        size: (width, height) of the chips.
    """
    width, height = size
    # The template is 112 high, so the height alone sets the scale.
    scale = height / 112
    # Half the columns that the chip has more (or fewer) than a square one, in pixels of the template.
    shift = (width / scale - 112) / 2
    return tuple((round((x + shift) * scale, 4), round(y * scale, 4)) for x, y in ARCFACE_112)


@dataclass(frozen=True)
class ChipLayout:
    """How an embedder wants its faces.

    Attributes:
        size: (width, height) of a chip.
        kind: How a face is placed. "similarity" maps the five landmarks to `template` by least squares. "eyes" turns
            the face until its eyes are level, then letterboxes the box. "box" letterboxes the box without turning it.
            "dlib" cuts dlib's own chip from dlib's own five points.
        template: The five landmarks (x, y) in a chip, for "similarity".
        fill: Grey level beside a letterboxed box.
    """

    size: tuple[int, int]
    kind: Kind = "similarity"
    template: Template = ()
    fill: int = 0


def find_required_scale(layout: ChipLayout, box: Float64, landmarks: Float64) -> float:
    """Find how many chip pixels one pixel of the full-size image becomes.

    An image decoded at this scale has all the pixels that the chip needs. dlib's chips need the full-size image.

    Args:
        layout: The embedder's layout.
        box: (4,) in pixels of the full-size image.
        landmarks: (5, 2) in pixels of the full-size image.
    """
    return 1.0 if layout.kind == "dlib" else measure_scale(_fit_matrix(layout, box, landmarks))


def cut_chip(
    layout: ChipLayout,
    pixels: UInt8Image,
    frame: Frame,
    box: Float64,
    landmarks: Float64,
    *,
    square: BoxToSquare | None = None,
    predict_points: PredictPoints | None = None,
) -> UInt8Image:
    """Cut the chip of a face.

    Args:
        layout: The embedder's layout.
        pixels: The decoded image.
        frame: Position of these pixels in the full-size image.
        box: (4,) in pixels of the full-size image.
        landmarks: (5, 2) in pixels of the full-size image.
        square: How dlib's square follows from the box, for dlib's chips; see `facepipe.models.card.Card`.
        predict_points: dlib's landmark predictor; required for dlib's chips.

    Returns:
        (height, width, 3) RGB of the layout's size.
    """
    # The frame maps the face into the pixels at hand; the matrix below then goes from those to the chip.
    box_here = frame.from_full(box.reshape(2, 2)).reshape(4)
    if layout.kind == "dlib":
        if predict_points is None:
            raise ValueError("a layout of kind 'dlib' needs predict_points")
        return cut_dlib_chip(pixels, predict_points(pixels, find_dlib_square(box_here, square)))
    matrix = _fit_matrix(layout, box_here, frame.from_full(landmarks))
    # Only letterboxes have parts beside the box: similarity chips keep whatever surrounds the face.
    chip = warp_chip(pixels, matrix, layout.size)
    return chip if layout.kind == "similarity" else _fill_letterbox(chip, layout, box_here)


def _fit_matrix(layout: ChipLayout, box: Float64, landmarks: Float64) -> Float64:
    """Compute the (2, 3) matrix from the image to the chip."""
    if layout.kind == "similarity":
        return fit_similarity(landmarks, np.array(layout.template))
    # Landmarks 0 and 1 are the eyes at the image's left and right.
    eye_line = landmarks[1] - landmarks[0]
    angle = np.arctan2(eye_line[1], eye_line[0]) if layout.kind == "eyes" else 0.0
    scale = _fit_scale(layout.size, box)
    # Turn by minus the angle and scale; image y points down, so a positive angle is clockwise.
    cos = scale * np.cos(angle)
    sin = scale * np.sin(angle)
    rotation = np.array([[cos, sin], [-sin, cos]])
    # Move the centre of the box to the centre of the chip. Pixel centres are at whole coordinates, hence the minus one.
    chip_centre = (np.array(layout.size) - 1) / 2
    box_centre = (box[:2] + box[2:]) / 2
    return np.column_stack([rotation, chip_centre - rotation @ box_centre])


def _fit_scale(size: tuple[int, int], box: Float64) -> float:
    # A box without area must not divide by zero.
    width, height = np.maximum(box[2:] - box[:2], 1e-3)
    return float(min(size[0] / width, size[1] / height))


def _fill_letterbox(chip: UInt8Image, layout: ChipLayout, box: Float64) -> UInt8Image:
    """Overwrite the chip with `fill` beside the box."""
    width, height = layout.size
    # Size of the box in the chip, at least one pixel; the rest is border.
    box_size = (box[2:] - box[:2]) * _fit_scale(layout.size, box)
    inner_width, inner_height = np.clip(np.round(box_size), 1, layout.size).astype(int)
    left = max(0, (width - inner_width) // 2)
    top = max(0, (height - inner_height) // 2)
    right = max(0, width - inner_width - left)
    bottom = max(0, height - inner_height - top)
    # Keep the part inside the box and pad it back to the size of the chip.
    inner = chip[top : height - bottom, left : width - right]
    grey = [layout.fill] * 3
    return np.asarray(cv2.copyMakeBorder(inner, top, bottom, left, right, cv2.BORDER_CONSTANT, value=grey), np.uint8)
