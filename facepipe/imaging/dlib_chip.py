"""dlib's 150x150 face chips from the five points of dlib's predictor, equal to dlib's own pixel by pixel.

Only for points of facepipe.models.dlib.predictor: the template holds eye corners, so eye centres, nose tip and mouth
corners (RetinaFace, MTCNN, YuNet) give another cut, and vectors that do not match galleries made with dlib.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from facepipe.imaging.geometry import fit_similarity
from facepipe.models.dlib.layout import SIDE
from facepipe.models.dlib.predictor import Rect
from facepipe.types import Float64, Int64, UInt8Image

PADDING = 0.25
# Mean positions of the five points in an unpadded face of side 1 (dlib/image_transforms/interpolation.h).
MEAN_SHAPE = np.array(
    [
        [0.8595674595992, 0.2134981538014],
        [0.6460604764104, 0.2289674387677],
        [0.1205750620789, 0.2137274526848],
        [0.3340850613712, 0.2290642403242],
        [0.4901123135679, 0.6277975316475],
    ]
)
TEMPLATE = (PADDING + MEAN_SHAPE) / (2 * PADDING + 1) * SIDE
_SMALLEST = 8  # images of this side have nothing below them in the pyramid


class ChipSquare(NamedTuple):
    """Where a chip comes from: an upright square of real-valued corners, turned by `angle` about its centre."""

    left: float
    top: float
    right: float
    bottom: float
    angle: float

    def halve(self) -> "ChipSquare":
        """The same square one level up the pyramid."""
        return ChipSquare(
            self.left / 2 - 1.25, self.top / 2 - 0.75, self.right / 2 - 1.25, self.bottom / 2 - 0.75, self.angle
        )

    def move(self, x: float, y: float) -> "ChipSquare":
        return ChipSquare(self.left + x, self.top + y, self.right + x, self.bottom + y, self.angle)

    def is_too_large(self) -> bool:
        """Whether bilinear sampling would skip pixels even one level up."""
        up = self.halve()
        width, height = up.right - up.left + 1, up.bottom - up.top + 1
        return width > 0 and height > 0 and width * height > SIDE * SIDE

    def find_corners(self) -> Float64:
        """(3, 2) top left, top right and bottom left after the turn, and (4, 2) with bottom right."""
        centre = np.array([(self.left + self.right) / 2, (self.top + self.bottom) / 2])
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        x = np.array([self.left, self.right, self.left, self.right]) - centre[0]
        y = np.array([self.top, self.top, self.bottom, self.bottom]) - centre[1]
        return np.stack([cos * x - sin * y, sin * x + cos * y], -1) + centre


def find_dlib_square(box: npt.ArrayLike, offsets: tuple[float, float, float] | None) -> Rect:
    """The inclusive (left, top, right, bottom) of dlib's square about the face in another detector's box.

    box: (left, top, right, bottom) in pixels; offsets: centre (dx, dy) from the box's centre and side, in units of
    the geometric mean of the box's sides (a Card's `square`). dlib's predictor was trained on its own detector's
    squares, forehead to chin; on a tight box of another shape its points are off. Without offsets the box is dlib's
    own, inclusive, and is only rounded.
    """
    left, top, right, bottom = (float(value) for value in np.asarray(box, np.float64))
    if offsets is None:
        return round(left), round(top), round(right), round(bottom)
    unit = math.sqrt(max(right - left, 0.0) * max(bottom - top, 0.0))
    dx, dy, side = (unit * value for value in offsets)
    whole = max(1, round(side))
    x = math.floor((left + right) / 2 + dx - whole / 2 + 0.5)
    y = math.floor((top + bottom) / 2 + dy - whole / 2 + 0.5)
    return x, y, x + whole - 1, y + whole - 1


def cut_dlib_chip(image: UInt8Image, points: Int64) -> UInt8Image:
    """(150, 150, 3) chip of an image (h, w, 3) RGB, black where it leaves the image; points (5, 2) of `predict`.

    The work depends on the face's size alone, not on the image's.
    """
    cut = find_chip_square(points)
    region, cut = _region(image, cut)
    while cut.is_too_large():
        region, cut = halve_image(region), cut.halve()
    top_left, top_right, bottom_left = cut.find_corners()[:3]
    across, down = (top_right - top_left) / (SIDE - 1), (bottom_left - top_left) / (SIDE - 1)
    steps = np.arange(SIDE)
    x = across[0] * steps + down[0] * steps[:, None] + top_left[0]
    y = across[1] * steps + down[1] * steps[:, None] + top_left[1]
    return _bilinear(region, x, y)


def find_chip_square(points: Int64) -> ChipSquare:
    """The square that the points' similarity to the template asks for."""
    matrix = fit_similarity(TEMPLATE, points.astype(np.float64))
    scale, angle = math.hypot(matrix[0, 0], matrix[1, 0]), math.atan2(matrix[1, 0], matrix[0, 0])
    x, y = matrix[:, :2] @ (SIDE / 2, SIDE / 2) + matrix[:, 2]
    half = (SIDE * scale - 1) / 2  # corners are pixels of the square, not its edges
    return ChipSquare(x - half, y - half, x + half, y + half, angle)


def _region(image: UInt8Image, cut: ChipSquare) -> tuple[UInt8Image, ChipSquare]:
    """The part of the image that the chip needs, with the border that the pyramid's filter eats, and the cut in it."""
    grow, level = 2, cut
    while level.is_too_large():
        grow, level = 2 * grow + 2, level.halve()
    corners = cut.find_corners()
    height, width = image.shape[:2]
    left, top = np.floor(np.maximum(corners.min(0) - grow, 0) + 0.5).astype(int)
    right, bottom = np.floor(np.minimum(corners.max(0) + grow, (width - 1, height - 1)) + 0.5).astype(int)
    if right < left or bottom < top:
        return np.zeros((0, 0, 3), np.uint8), cut
    return image[top : bottom + 1, left : right + 1], cut.move(-left, -top)


def halve_image(image: UInt8Image) -> UInt8Image:
    """One level up dlib's pyramid: 1-4-6-4-1 both ways at every other pixel, borders cut off, truncated to integers."""
    height, width = image.shape[:2]
    if min(height, width) <= _SMALLEST:
        return np.zeros((0, 0, 3), np.uint8)
    # In float32 the sums are exact; OpenCV's own uint8 version would round instead of truncating.
    full = cv2.pyrDown(image.astype(np.float32))
    return full[1 : 1 + (height - 3) // 2, 1 : 1 + (width - 3) // 2].astype(np.uint8)


def _bilinear(image: UInt8Image, x: Float64, y: Float64) -> UInt8Image:
    """(150, 150, 3) values at (x, y), truncated; black where one of the four neighbours is outside the image."""
    height, width = image.shape[:2]
    chip = np.zeros((*x.shape, 3), np.uint8)
    if min(height, width) < 2:
        return chip
    left, top = np.floor(x), np.floor(y)
    inside = (left >= 0) & (top >= 0) & (left + 1 < width) & (top + 1 < height)
    fx, fy = x - left, y - top
    gx, gy = 1 - fx, 1 - fy
    at = np.where(inside, top * width + left, 0).astype(np.int64)
    neighbours = [at + step for step in (0, 1, width, width + 1)]
    for channel in range(3):  # plane by plane: several times as fast as all three at once in numpy
        plane = np.ascontiguousarray(image[:, :, channel]).ravel()
        a, b, c, d = (plane.take(n).astype(np.float64) for n in neighbours)
        chip[:, :, channel] = gy * (gx * a + fx * b) + fy * (gx * c + fx * d)
    chip[~inside] = 0
    return chip
