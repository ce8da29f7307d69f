"""dlib's 150x150 face chips from dlib's five points, equal to dlib's own pixel by pixel.

Only the points of dlib's predictor fit: its template holds eye corners. Eye centres, nose tip and mouth corners
(RetinaFace, MTCNN, YuNet) give another cut, and vectors that do not match galleries made with dlib.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from facepipe.imaging.geometry import fit_similarity
from facepipe.types import Float64, Int64, UInt8Image

# Left, top, right and bottom pixel; all four are inside the rectangle.
Rect = tuple[int, int, int, int]
# An image (h, w, 3) RGB and dlib's square in it -> dlib's five points (5, 2).
PredictPoints = Callable[[UInt8Image, Rect], Int64]
# Centre (dx, dy) and side of dlib's square, about the centre of another detector's box: see `find_dlib_square`.
BoxToSquare = tuple[float, float, float]

# Pixels per side of a chip, and the border around the face as a share of the face's side.
SIDE = 150
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
# The five points in pixels of the padded chip.
TEMPLATE = (PADDING + MEAN_SHAPE) / (2 * PADDING + 1) * SIDE
_SMALLEST_SIDE = 8  # images of this side have no smaller level in the pyramid


class ChipSquare(NamedTuple):
    """Where a chip comes from: an upright square of real-valued corners, turned about its centre.

    Attributes:
        left: Leftmost pixel before the turn.
        top: Topmost pixel before the turn.
        right: Rightmost pixel before the turn.
        bottom: Bottommost pixel before the turn.
        angle: Turn in radians.
    """

    left: float
    top: float
    right: float
    bottom: float
    angle: float

    def halve(self) -> "ChipSquare":
        """Map the square to the next smaller level of the pyramid."""
        # The filter of the pyramid drops its border, so positions shift a little; the numbers are dlib's own.
        return ChipSquare(
            self.left / 2 - 1.25,
            self.top / 2 - 0.75,
            self.right / 2 - 1.25,
            self.bottom / 2 - 0.75,
            self.angle,
        )

    def move(self, x: float, y: float) -> "ChipSquare":
        """Shift the square by (x, y) pixels."""
        return ChipSquare(self.left + x, self.top + y, self.right + x, self.bottom + y, self.angle)

    def is_too_large(self) -> bool:
        """Return whether bilinear sampling would skip pixels even on the next smaller level."""
        smaller = self.halve()
        width = smaller.right - smaller.left + 1
        height = smaller.bottom - smaller.top + 1
        return width > 0 and height > 0 and width * height > SIDE * SIDE

    def find_corners(self) -> Float64:
        """Find the corners after the turn.

        Returns:
            (4, 2) top left, top right, bottom left and bottom right.
        """
        centre = np.array([(self.left + self.right) / 2, (self.top + self.bottom) / 2])
        cos = math.cos(self.angle)
        sin = math.sin(self.angle)
        # Offsets of the four corners from the centre, before the turn.
        x = np.array([self.left, self.right, self.left, self.right]) - centre[0]
        y = np.array([self.top, self.top, self.bottom, self.bottom]) - centre[1]
        return np.stack([cos * x - sin * y, sin * x + cos * y], -1) + centre


def find_dlib_square(box: npt.ArrayLike, offsets: BoxToSquare | None) -> Rect:
    """Find the square that dlib's detector would put around the face in another detector's box.

    dlib's predictor was trained on the squares of dlib's detector, forehead to chin. In a tight box of another shape
    its points are off.

    Args:
        box: (left, top, right, bottom) in pixels.
        offsets: Centre (dx, dy) of the square from the centre of the box, and its side. The unit is the geometric mean
            of the sides of the box. None says that the box is dlib's own and only needs rounding.
    """
    left, top, right, bottom = (float(value) for value in np.asarray(box, np.float64))
    if offsets is None:
        return round(left), round(top), round(right), round(bottom)
    # The unit grows with the size of the face, so that the same offsets fit faces of all sizes.
    unit = math.sqrt(max(right - left, 0.0) * max(bottom - top, 0.0))
    dx, dy, side = (unit * value for value in offsets)
    whole_side = max(1, round(side))
    # Place a square of a whole side about its centre, rounding half up; right and bottom are inside, hence minus one.
    x = math.floor((left + right) / 2 + dx - whole_side / 2 + 0.5)
    y = math.floor((top + bottom) / 2 + dy - whole_side / 2 + 0.5)
    return x, y, x + whole_side - 1, y + whole_side - 1


def cut_dlib_chip(image: UInt8Image, points: Int64) -> UInt8Image:
    """Cut the chip of a face.

    The time depends on the size of the face alone, not on that of the image.

    Args:
        image: (h, w, 3) RGB.
        points: (5, 2) of dlib's predictor.

    Returns:
        (150, 150, 3), black outside the image.
    """
    # Cut out the part that matters, then halve it until one chip pixel covers at most about two of its pixels.
    square = find_chip_square(points)
    region, square = _cut_region(image, square)
    while square.is_too_large():
        region = halve_image(region)
        square = square.halve()
    top_left, top_right, bottom_left = square.find_corners()[:3]
    # Steps from one pixel of the chip to the next, in pixels of the region.
    across = (top_right - top_left) / (SIDE - 1)
    down = (bottom_left - top_left) / (SIDE - 1)
    # Sampling positions x and y, (150, 150) each: a turned grid over the square.
    steps = np.arange(SIDE)
    x = across[0] * steps + down[0] * steps[:, None] + top_left[0]
    y = across[1] * steps + down[1] * steps[:, None] + top_left[1]
    return _sample_bilinear(region, x, y)


def find_chip_square(points: Int64) -> ChipSquare:
    """Find the square of a chip from the similarity between the template and the points (5, 2)."""
    matrix = fit_similarity(TEMPLATE, points.astype(np.float64))
    # The matrix maps the chip to the image, so its scale is image pixels per chip pixel.
    scale = math.hypot(matrix[0, 0], matrix[1, 0])
    angle = math.atan2(matrix[1, 0], matrix[0, 0])
    x, y = matrix[:, :2] @ (SIDE / 2, SIDE / 2) + matrix[:, 2]
    half = (SIDE * scale - 1) / 2  # corners are pixels of the square, not its edges
    return ChipSquare(x - half, y - half, x + half, y + half, angle)


def _cut_region(image: UInt8Image, square: ChipSquare) -> tuple[UInt8Image, ChipSquare]:
    """Cut the part of the image that the chip needs.

    Returns:
        The region, with the border that the pyramid's filter consumes, and the square in the region's pixels.
    """
    # Find the border that the halvings consume: every level needs two pixels, twice as many one level up.
    border = 2
    level = square
    while level.is_too_large():
        border = 2 * border + 2
        level = level.halve()
    # Clip the bounding box of the turned square, with the border, to the image; round half up as dlib does.
    corners = square.find_corners()
    height, width = image.shape[:2]
    left, top = np.floor(np.maximum(corners.min(0) - border, 0) + 0.5).astype(int)
    right, bottom = np.floor(np.minimum(corners.max(0) + border, (width - 1, height - 1)) + 0.5).astype(int)
    if right < left or bottom < top:
        return np.zeros((0, 0, 3), np.uint8), square
    return image[top : bottom + 1, left : right + 1], square.move(-left, -top)


def halve_image(image: UInt8Image) -> UInt8Image:
    """Compute the next smaller level of dlib's pyramid.

    The filter is 1-4-6-4-1 both ways at every other pixel. Borders are cut off and values truncated to integers.
    """
    height, width = image.shape[:2]
    if min(height, width) <= _SMALLEST_SIDE:
        return np.zeros((0, 0, 3), np.uint8)
    # In float32 the sums are exact. OpenCV's own uint8 version would round instead of truncating.
    full = cv2.pyrDown(image.astype(np.float32))
    return full[1 : 1 + (height - 3) // 2, 1 : 1 + (width - 3) // 2].astype(np.uint8)


def _sample_bilinear(image: UInt8Image, x: Float64, y: Float64) -> UInt8Image:
    """Sample the image at (x, y), truncated to integers.

    A sample is black if one of its four neighbours is outside the image.
    """
    height, width = image.shape[:2]
    chip = np.zeros((*x.shape, 3), np.uint8)
    if min(height, width) < 2:
        return chip
    # The four neighbours of a sample are at left, left + 1, top and top + 1; weights are their shares.
    left = np.floor(x)
    top = np.floor(y)
    is_inside = (left >= 0) & (top >= 0) & (left + 1 < width) & (top + 1 < height)
    right_share = x - left
    bottom_share = y - top
    left_share = 1 - right_share
    top_share = 1 - bottom_share
    # Flat index of the top-left neighbour; samples outside read index 0 and are blacked out at the end.
    corner = np.where(is_inside, top * width + left, 0).astype(np.int64)
    neighbours = [corner + step for step in (0, 1, width, width + 1)]
    for channel in range(3):  # plane by plane: several times as fast as all three at once in NumPy
        plane = np.ascontiguousarray(image[:, :, channel]).ravel()
        a, b, c, d = (plane.take(n).astype(np.float64) for n in neighbours)
        upper = left_share * a + right_share * b
        lower = left_share * c + right_share * d
        chip[:, :, channel] = top_share * upper + bottom_share * lower
    chip[~is_inside] = 0
    return chip
