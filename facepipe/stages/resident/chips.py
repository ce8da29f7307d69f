"""Chips cut on the device, equal to those of `facepipe.imaging.geometry.warp_chip`."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from facepipe.imaging.alignment import ChipLayout, find_required_scale
from facepipe.models.runtime.transfers import Uploads, send_array
from facepipe.stages.resident.coordinates import FaceArrays
from facepipe.stages.resident.sampling import ResidentImages, sample_bilinear
from facepipe.types import Bool, Float64, Int64, UInt8Image

Size = tuple[int, int]

_MAX_POSITIONS = 1 << 23  # positions gathered at a time: 22,500 per chip, times the pixels of a block


def can_cut_on_device(layout: ChipLayout) -> bool:
    """Tell whether the device cuts chips of a layout. It does if landmarks alone place them."""
    return layout.kind == "similarity"


def find_required_scales(layout: ChipLayout, faces: FaceArrays) -> Float64:
    """Find the chip pixels per pixel of the full-size image: `alignment.find_required_scale` for many faces.

    Returns:
        Scale of each face, (f,).
    """
    boxes = faces.boxes.astype(np.float64)
    landmarks = faces.landmarks.astype(np.float64)
    if layout.kind == "similarity":
        return measure_scales(fit_similarities(landmarks, np.array(layout.template)))
    return np.array([find_required_scale(layout, box, points) for box, points in zip(boxes, landmarks, strict=True)])


class CutChips(NamedTuple):
    """Chips on the device, in an order of their own.

    Attributes:
        chips: RGB, (f, h, w, 3) uint8
        faces: index of the face that each chip is of, (f,)
    """

    chips: Tensor
    faces: Int64


def cut_aligned_chips(layout: ChipLayout, images: ResidentImages, image: Int64, landmarks: Float64) -> CutChips:
    """Cut chips by landmarks.

    Args:
        layout: layout of the chips, one that the device cuts.
        images: images on the device.
        image: image of each face, (f,).
        landmarks: five points of each face in pixels of its image, (f, 5, 2).
    """
    matrices = fit_similarities(landmarks, np.array(layout.template))
    cuts, order = plan_cuts(image, matrices, images.shapes[image], layout.size).sort_by_step()
    return CutChips(cut_chips(images, cuts, layout.size), order)


def upload_chips(uploads: Uploads, chips: Sequence[UInt8Image]) -> Tensor:
    """Send chips of one size to the device, (n, h, w, 3) uint8; there must be at least one."""
    return uploads(chips).view(len(chips), *chips[0].shape)


def fit_similarities(points: Float64, template: Float64) -> Float64:
    """Fit the similarities that map points to a template: `geometry.fit_similarity` for many faces.

    Args:
        points: (n, p, 2).
        template: (p, 2).

    Returns:
        Matrices, (n, 2, 3).
    """
    # Points as complex numbers x + iy: (n, p) and (p,).
    p = points[..., 0] + 1j * points[..., 1]
    t = template[:, 0] + 1j * template[:, 1]
    centred_p = p - p.mean(1, keepdims=True)
    centred_t = t - t.mean()
    # Least squares, one complex factor per face: <p, t> / <p, p>.
    power = (centred_p * centred_p.conj()).real.sum(1)
    # Points that all lie in one place have no direction.
    is_degenerate = power <= 1e-12
    safe_power = np.where(is_degenerate, 1.0, power)
    factor = np.where(is_degenerate, 1.0, (centred_p.conj() * centred_t).sum(1) / safe_power)
    shift = t.mean() - factor * p.mean(1)
    # Rows of the matrices, (2, 3, n).
    rows = [[factor.real, -factor.imag, shift.real], [factor.imag, factor.real, shift.imag]]
    return np.moveaxis(np.array(rows), 2, 0)


def measure_scales(matrices: Float64) -> Float64:
    """Measure how many output pixels one input pixel becomes, (n,) for matrices (n, 2, 3)."""
    return np.hypot(matrices[:, 0, 0], matrices[:, 1, 0])


class ChipCuts(NamedTuple):
    """What chips are cut from.

    Attributes:
        image: image of each chip, (n,)
        matrix: maps positions in the chip to blocks of the image, (n, 2, 3)
        step: side of a block in pixels, (n,)
    """

    image: Int64
    matrix: Float64
    step: Int64

    def sort_by_step(self) -> tuple["ChipCuts", Int64]:
        """Sort the cuts by ascending step.

        Returns:
            The sorted cuts, and the index that each had before, (n,).
        """
        order = np.argsort(self.step, kind="stable")
        return ChipCuts(self.image[order], self.matrix[order], self.step[order]), order


def plan_cuts(image: Int64, matrices: Float64, shapes: Int64, size: Size) -> ChipCuts:
    """Plan how chips are cut, as `geometry.warp_chip` does it.

    If a chip shrinks its image by 2 or more, blocks of that many whole pixels are averaged first.

    Args:
        image: image of each chip, (n,).
        matrices: maps the image to the chip, (n, 2, 3).
        shapes: height and width of the images, (n, 2).
        size: width and height of a chip.
    """
    # Whole pixels per chip pixel; 1 if the image below the chip does not hold a block of them.
    step = (1 / np.maximum(measure_scales(matrices), 1e-6)).astype(np.int64)
    inverse = _invert(matrices)
    step = np.where((step >= 2) & _spans_block(inverse, shapes, size, step), step, 1)
    # x = (x' + 0.5) * step - 0.5 of blocks x', about centres
    to_blocks = inverse / step[:, None, None]
    to_blocks[:, :, 2] += 0.5 / step[:, None] - 0.5
    return ChipCuts(image, to_blocks, step)


@torch.inference_mode()
def cut_chips(images: ResidentImages, cuts: ChipCuts, size: Size) -> Tensor:
    """Cut chips on the device.

    Args:
        images: images on the device.
        cuts: cuts by ascending step.
        size: width and height of a chip.

    Returns:
        Chips, (n, height, width, 3) uint8.
    """
    # Positions of chip pixels, u across and v down; each matrix maps them to blocks of its image.
    width, height = size
    device = images.pixels.device
    parts = [torch.empty((0, height, width, 3), dtype=torch.uint8, device=device)]
    matrix = send_array(cuts.matrix.astype(np.float32), device)
    # Broadcast (k, 1, 1) coefficients over (height, width) positions.
    v = torch.arange(height, device=device)[:, None]
    u = torch.arange(width, device=device)
    for part in _split_by_step(cuts.step, height * width):
        m = matrix[part, :, :, None, None]
        x = m[:, 0, 0] * u + m[:, 0, 1] * v + m[:, 0, 2]
        y = m[:, 1, 0] * u + m[:, 1, 1] * v + m[:, 1, 2]
        parts.append(sample_bilinear(images.select(cuts.image[part]), y, x, int(cuts.step[part.start])))
    return torch.cat(parts)


def _split_by_step(steps: Int64, positions: int) -> list[slice]:
    """Split ascending steps into runs of one step, none of which gathers too much at a time."""
    parts = []
    # Each run holds one step, and at most `_MAX_POSITIONS` pixels to gather.
    for step in np.unique(steps).tolist():
        start, end = np.searchsorted(steps, [step, step + 1]).tolist()
        max_chips = max(1, _MAX_POSITIONS // (positions * step * step))
        parts += [slice(first, min(first + max_chips, end)) for first in range(start, end, max_chips)]
    return parts


def _invert(matrices: Float64) -> Float64:
    """Invert matrices (n, 2, 3). A matrix without an inverse gives zeros, as in OpenCV."""
    # Inverse of the 2x2 part; the shift follows from it.
    a, b, c, d = (matrices[:, i, j] for i in (0, 1) for j in (0, 1))
    determinant = a * d - b * c
    factor = np.where(determinant != 0, 1 / np.where(determinant != 0, determinant, 1), 0)
    turn = np.moveaxis(np.array([[d, -b], [-c, a]]) * factor, 2, 0)
    return np.concatenate([turn, -turn @ matrices[:, :, 2:]], 2)


def _spans_block(inverse: Float64, shapes: Int64, size: Size, step: Int64) -> Bool:
    """Tell whether the part of the image below each chip is at least one block wide and high, (n,)."""
    # Corners of each chip in its image, (n, 4, 2), aligned outwards to blocks with one block to spare.
    corners = np.array([[0, 0], [size[0], 0], [0, size[1]], size], float)
    in_image = corners @ np.swapaxes(inverse[:, :, :2], 1, 2) + inverse[:, None, :, 2]
    blocks = np.maximum(step, 1)[:, None]
    low = np.clip(np.floor(in_image.min(1) / blocks) * blocks - blocks, 0, None)
    high = np.minimum(np.ceil(in_image.max(1) / blocks) * blocks + blocks, shapes[:, ::-1])
    return np.asarray((high - low >= blocks).all(1))
