"""Similarity transforms, head pose from five points, and cutting aligned chips."""

from typing import NamedTuple

import cv2
import numpy as np

from facepipe.imaging.header import Header
from facepipe.types import Float32, Float64, UInt8Image


def fit_similarity(points: Float64, template: Float64) -> Float64:
    """Fit the similarity that maps points to a template with least squares.

    This is the closed form of Umeyama (PAMI 1991) for two dimensions. With complex numbers the rotation and scale are
    one complex factor, and a reflection cannot arise.

    Args:
        points: (n, 2).
        template: (n, 2).

    Returns:
        The (2, 3) matrix.
    """
    # Points as complex numbers x + iy, (n,).
    p = points[:, 0] + 1j * points[:, 1]
    t = template[:, 0] + 1j * template[:, 1]
    p_centred = p - p.mean()
    t_centred = t - t.mean()
    power = float(np.vdot(p_centred, p_centred).real)
    # Least squares gives factor = <p, t> / <p, p>. Points that coincide have no scale: keep it 1.
    factor = np.vdot(p_centred, t_centred) / power if power > 1e-12 else complex(1.0)
    shift = t.mean() - factor * p.mean()
    return np.array([[factor.real, -factor.imag, shift.real], [factor.imag, factor.real, shift.imag]])


def measure_scale(matrix: Float64) -> float:
    """Measure how many output pixels one input pixel becomes."""
    return float(np.hypot(matrix[0, 0], matrix[1, 0]))


class Frame(NamedTuple):
    """Position of decoded pixels in the oriented full-size image. Pixel centres are at whole coordinates.

    Attributes:
        scale: Decoded pixels per full-size pixel.
        left: Full-size column where the decoded pixels begin.
        top: Full-size row where they begin.
    """

    scale: float = 1.0
    left: float = 0.0
    top: float = 0.0

    def to_full(self, points: Float32) -> Float32:
        """Map points (..., 2) of the decoded pixels to the full-size image."""
        return ((points + 0.5) / self.scale - 0.5 + np.array([self.left, self.top])).astype(np.float32)

    def from_full(self, points: Float64) -> Float64:
        """Map points (..., 2) of the full-size image to the decoded pixels."""
        return (points - np.array([self.left, self.top]) + 0.5) * self.scale - 0.5


def locate_frame(header: Header, reduce: int) -> Frame:
    """Locate a decoded image in the full-size one.

    A reduced side is rounded up while its pixels stay exactly `reduce` wide, so the last ones reach past the stored
    edge. If the EXIF orientation turns that edge to the left or the top, everything is shifted.
    """
    if reduce == 1:
        return Frame()
    # Pixels that the last column and row reach past the stored edge.
    excess_width = -header.width % reduce
    excess_height = -header.height % reduce
    # Orientations that bring the stored right or bottom edge to the left, and to the top.
    left = {2: excess_width, 3: excess_width, 6: excess_height, 7: excess_height}.get(header.orientation, 0)
    top = {3: excess_height, 4: excess_height, 7: excess_width, 8: excess_width}.get(header.orientation, 0)
    return Frame(1 / reduce, -float(left), -float(top))


def bound_by_area(size: int, width: int, height: int) -> int:
    """Return the longest side of an input whose area is bounded, so that a panorama is not shrunk to a strip.

    Images up to twice as long as high keep `size`. Longer ones get half of its square as area.
    """
    aspect = max(width, height) / max(1, min(width, height))
    return max(size, round(size * (0.5 * aspect) ** 0.5))


def warp_chip(pixels: UInt8Image, matrix: Float64, size: tuple[int, int]) -> UInt8Image:
    """Cut a chip with bilinear sampling, black outside the image.

    If the chip shrinks the image by 2 or more, the region is first shrunk by area: bilinear sampling alone would skip
    pixels (aliasing).

    Args:
        pixels: (h, w, 3).
        matrix: (2, 3) from the image to the chip.
        size: (width, height) of the chip.
    """
    # Whole number of image pixels per chip pixel, at least 1 even if the matrix is degenerate.
    step = int(1 / max(measure_scale(matrix), 1e-6))
    if step >= 2:
        pixels, matrix = _shrink_region(pixels, matrix, size, step)
    return np.asarray(cv2.warpAffine(pixels, matrix, size, flags=cv2.INTER_LINEAR), np.uint8)


def _shrink_region(pixels: UInt8Image, matrix: Float64, size: tuple[int, int], step: int) -> tuple[UInt8Image, Float64]:
    """Shrink the region that the chip comes from by a whole number.

    Returns:
        The smaller region, and the matrix from its pixels to the chip.
    """
    # Find the region: the corners of the chip in the image.
    inverse = cv2.invertAffineTransform(matrix)
    corners = np.array([[0, 0], [size[0], 0], [0, size[1]], size], float) @ inverse[:, :2].T + inverse[:, 2]
    # Align it to multiples of the step, so that the chip of a face does not depend on what else is in the image.
    image_height, image_width = pixels.shape[:2]
    left, top = (np.clip(np.floor(corners.min(0) / step) * step - step, 0, None)).astype(int)
    end = np.ceil(corners.max(0) / step) * step + step
    right, bottom = np.minimum(end, (image_width, image_height)).astype(int)
    if right - left < step or bottom - top < step:
        return pixels, matrix
    # Shrink it by area.
    region = pixels[top:bottom, left:right]
    width = max(1, region.shape[1] // step)
    height = max(1, region.shape[0] // step)
    small = cv2.resize(region[: height * step, : width * step], (width, height), interpolation=cv2.INTER_AREA)
    # Undo both in the matrix: x = left + (x' + 0.5) * step - 0.5, and likewise y.
    to_image = np.array([[step, 0, left + 0.5 * step - 0.5], [0, step, top + 0.5 * step - 0.5], [0, 0, 1]])
    return np.asarray(small, np.uint8), matrix @ to_image


# Mean face in millimetres, x right, y down, z towards the viewer: eye centres 63 mm apart, nose tip 28 mm before them.
_HEAD = np.array([[-31.5, 0, 0], [31.5, 0, 0], [0, 38.8, 28.0], [-26.2, 67.7, 4.0], [26.2, 67.7, 4.0]])
_HEAD_INVERSE = np.linalg.pinv(_HEAD - _HEAD.mean(0))


def estimate_pose(landmarks: Float64) -> tuple[Float64, Float64]:
    """Estimate the yaw and roll of faces, in degrees.

    Yaw comes from a weak-perspective fit of a mean head to the five points. Roll is the angle of the line between the
    eyes.

    Args:
        landmarks: (n, 5, 2).

    Returns:
        Yaw (n,), positive if the face turns to the image's right, and roll (n,), positive clockwise as seen.
    """
    centred = landmarks - landmarks.mean(1, keepdims=True)
    eye_line = landmarks[:, 1] - landmarks[:, 0]
    roll = np.arctan2(eye_line[:, 1], eye_line[:, 0])
    # Turn each face upright, then solve for the two camera rows times the scale, (n, 2, 3).
    cos = np.cos(-roll)
    sin = np.sin(-roll)
    rotation = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)
    upright = np.einsum("nij,npj->npi", rotation, centred)
    camera = np.einsum("mp,npi->nim", _HEAD_INVERSE, upright)
    yaw = np.arctan2(camera[:, 0, 2], camera[:, 0, 0])
    return np.degrees(yaw), np.degrees(roll)


def measure_sharpness(chip: UInt8Image) -> float:
    """Measure how sharp a chip is, as the variance of the Laplacian of its luminance.

    This is the usual focus measure (Pech-Pacheco et al., ICPR 2000).
    """
    return float(cv2.Laplacian(cv2.cvtColor(chip, cv2.COLOR_RGB2GRAY), cv2.CV_32F).var())
