"""Similarity transforms, head pose from five points, and the cutting of aligned chips."""

from typing import NamedTuple

import cv2
import numpy as np

from facepipe.imaging.header import Header
from facepipe.types import Float32, Float64, UInt8Image


def fit_similarity(points: Float64, template: Float64) -> Float64:
    """(2, 3) matrix of the similarity that maps points (n, 2) to template (n, 2) with least squares.

    Closed form of Umeyama (PAMI 1991) for two dimensions: with complex numbers the rotation and scale are one
    complex factor, and a reflection cannot arise.
    """
    p, t = points[:, 0] + 1j * points[:, 1], template[:, 0] + 1j * template[:, 1]
    pc, tc = p - p.mean(), t - t.mean()
    power = float(np.vdot(pc, pc).real)
    factor = np.vdot(pc, tc) / power if power > 1e-12 else complex(1.0)
    shift = t.mean() - factor * p.mean()
    return np.array([[factor.real, -factor.imag, shift.real], [factor.imag, factor.real, shift.imag]])


def measure_scale(matrix: Float64) -> float:
    """How many output pixels one input pixel becomes."""
    return float(np.hypot(matrix[0, 0], matrix[1, 0]))


class Frame(NamedTuple):
    """Where decoded pixels lie in the oriented full-size image; pixel centres are at whole coordinates."""

    scale: float = 1.0
    left: float = 0.0
    top: float = 0.0

    def to_full(self, points: Float32) -> Float32:
        """Points (..., 2) of the decoded pixels in the full image."""
        return ((points + 0.5) / self.scale - 0.5 + np.array([self.left, self.top])).astype(np.float32)

    def from_full(self, points: Float64) -> Float64:
        """Points (..., 2) of the full image in the decoded pixels."""
        return (points - np.array([self.left, self.top]) + 0.5) * self.scale - 0.5


def locate_frame(header: Header, reduce: int) -> Frame:
    """The frame of a decoded image.

    A reduced side is rounded up while its pixels stay exactly `reduce` wide, so the last ones reach over the stored
    edge; where the EXIF orientation turns that edge to the left or top, everything is shifted.
    """
    if reduce == 1:
        return Frame()
    over_w, over_h = -header.width % reduce, -header.height % reduce
    left = {2: over_w, 3: over_w, 6: over_h, 7: over_h}.get(header.orientation, 0)
    top = {3: over_h, 4: over_h, 7: over_w, 8: over_w}.get(header.orientation, 0)
    return Frame(1 / reduce, -float(left), -float(top))


def warp_chip(pixels: UInt8Image, matrix: Float64, size: tuple[int, int]) -> UInt8Image:
    """Chip of size (width, height), bilinear, black outside the image.

    Where the chip shrinks the image by 2 or more, the region is first shrunk by area, since bilinear sampling alone
    would skip pixels (aliasing).
    """
    step = int(1 / max(measure_scale(matrix), 1e-6))
    if step >= 2:
        pixels, matrix = _shrunk(pixels, matrix, size, step)
    return np.asarray(cv2.warpAffine(pixels, matrix, size, flags=cv2.INTER_LINEAR), np.uint8)


def _shrunk(pixels: UInt8Image, matrix: Float64, size: tuple[int, int], step: int) -> tuple[UInt8Image, Float64]:
    inverse = cv2.invertAffineTransform(matrix)
    corners = np.array([[0, 0], [size[0], 0], [0, size[1]], size], float) @ inverse[:, :2].T + inverse[:, 2]
    h, w = pixels.shape[:2]
    # Aligned to multiples of the step, so that a face's chip does not depend on what else is in the image.
    left, top = (np.clip(np.floor(corners.min(0) / step) * step - step, 0, None)).astype(int)
    right, bottom = np.minimum(np.ceil(corners.max(0) / step) * step + step, (w, h)).astype(int)
    if right - left < step or bottom - top < step:
        return pixels, matrix
    region = pixels[top:bottom, left:right]
    width, height = max(1, region.shape[1] // step), max(1, region.shape[0] // step)
    small = cv2.resize(region[: height * step, : width * step], (width, height), interpolation=cv2.INTER_AREA)
    # x = left + (x' + 0.5) * step - 0.5
    lift = np.array([[step, 0, left + 0.5 * step - 0.5], [0, step, top + 0.5 * step - 0.5], [0, 0, 1]])
    return np.asarray(small, np.uint8), matrix @ lift


# Mean face in millimetres, x right, y down, z towards the viewer: eye centres 63 mm apart, nose tip 28 mm before them.
_HEAD = np.array([[-31.5, 0, 0], [31.5, 0, 0], [0, 38.8, 28.0], [-26.2, 67.7, 4.0], [26.2, 67.7, 4.0]])
_HEAD_INVERSE = np.linalg.pinv(_HEAD - _HEAD.mean(0))


def estimate_pose(landmarks: Float64) -> tuple[Float64, Float64]:
    """(yaw, roll) in degrees of faces with landmarks (n, 5, 2).

    Yaw is positive when the face turns to the image's right, from a weak-perspective fit of a mean head to the five
    points; roll is the angle of the line between the eyes, positive clockwise as seen.
    """
    centred = landmarks - landmarks.mean(1, keepdims=True)
    eyes = landmarks[:, 1] - landmarks[:, 0]
    roll = np.arctan2(eyes[:, 1], eyes[:, 0])
    cos, sin = np.cos(-roll), np.sin(-roll)
    turn = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)
    upright = np.einsum("nij,npj->npi", turn, centred)
    camera = np.einsum("mp,npi->nim", _HEAD_INVERSE, upright)  # (n, 2, 3): the two camera rows times the scale
    yaw = np.arctan2(camera[:, 0, 2], camera[:, 0, 0])
    return np.degrees(yaw), np.degrees(roll)


def measure_sharpness(chip: UInt8Image) -> float:
    """Variance of the Laplacian of the chip's luminance: the usual focus measure (Pech-Pacheco et al., ICPR 2000)."""
    return float(cv2.Laplacian(cv2.cvtColor(chip, cv2.COLOR_RGB2GRAY), cv2.CV_32F).var())
