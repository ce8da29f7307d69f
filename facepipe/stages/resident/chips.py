"""Aligned chips from images on the device, equal to those of `facepipe.imaging.geometry.warp_chip`."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from facepipe.models.runtime.transfers import send_array
from facepipe.stages.resident.sampling import ResidentImages, bilinear
from facepipe.types import Bool, Float64, Int64

Size = tuple[int, int]

_AT_ONCE = 1 << 23  # positions that are gathered at a time: 22,500 a chip, times the pixels of a block


def fit_similarities(points: Float64, template: Float64) -> Float64:
    """(n, 2, 3) matrices that map points (n, p, 2) to the template (p, 2): `geometry.similarity` of many at once."""
    p, t = points[..., 0] + 1j * points[..., 1], template[:, 0] + 1j * template[:, 1]
    pc, tc = p - p.mean(1, keepdims=True), t - t.mean()
    power = (pc * pc.conj()).real.sum(1)
    flat = power <= 1e-12
    factor = np.where(flat, 1.0, (pc.conj() * tc).sum(1) / np.where(flat, 1.0, power))
    shift = t.mean() - factor * p.mean(1)
    rows = [[factor.real, -factor.imag, shift.real], [factor.imag, factor.real, shift.imag]]
    return np.moveaxis(np.array(rows), 2, 0)


def measure_scales(matrices: Float64) -> Float64:
    """(n,) how many output pixels one input pixel becomes."""
    return np.hypot(matrices[:, 0, 0], matrices[:, 1, 0])


class ChipCuts(NamedTuple):
    """Chips to be cut: image (n,) each is of, (n, 2, 3) from chip to blocks of the image, step (n,) pixels a block."""

    image: Int64
    matrix: Float64
    step: Int64

    def sort_by_step(self) -> tuple["ChipCuts", Int64]:
        """By rising step, and the places (n,) they had."""
        order = np.argsort(self.step, kind="stable")
        return ChipCuts(self.image[order], self.matrix[order], self.step[order]), order


def plan_cuts(image: Int64, matrices: Float64, shapes: Int64, size: Size) -> ChipCuts:
    """The cuts that take matrices (n, 2, 3), image to chip, of images whose (height, width) are shapes (n, 2).

    As `geometry.cut`: where a chip shrinks its image by 2 or more, blocks of so many whole pixels are averaged first.
    """
    step = (1 / np.maximum(measure_scales(matrices), 1e-6)).astype(np.int64)
    inverse = _inverted(matrices)
    step = np.where((step >= 2) & _reaches(inverse, shapes, size, step), step, 1)
    # x = (x' + 0.5) * step - 0.5 of blocks x', about centres
    to_blocks = inverse / step[:, None, None]
    to_blocks[:, :, 2] += 0.5 / step[:, None] - 0.5
    return ChipCuts(image, to_blocks, step)


@torch.inference_mode()
def cut_chips(resident: ResidentImages, cuts: ChipCuts, size: Size) -> Tensor:
    """(n, height, width, 3) uint8 chips of `size` (width, height), by rising step: `cuts` are to be ordered."""
    width, height = size
    device = resident.pixels.device
    parts = [torch.empty((0, height, width, 3), dtype=torch.uint8, device=device)]
    matrix = send_array(cuts.matrix.astype(np.float32), device)
    v, u = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    for part in _parts(cuts.step, height * width):
        m = matrix[part, :, :, None, None]
        x, y = (m[:, row, 0] * u + m[:, row, 1] * v + m[:, row, 2] for row in (0, 1))
        parts.append(bilinear(resident.select(cuts.image[part]), y, x, int(cuts.step[part.start])))
    return torch.cat(parts)


def _parts(steps: Int64, positions: int) -> list[slice]:
    """Runs of one step, none of which gathers too much at a time."""
    parts = []
    for step in np.unique(steps).tolist():
        low, high = np.searchsorted(steps, [step, step + 1]).tolist()
        most = max(1, _AT_ONCE // (positions * step * step))
        parts += [slice(at, min(at + most, high)) for at in range(low, high, most)]
    return parts


def _inverted(matrices: Float64) -> Float64:
    """(n, 2, 3) inverses; all zero, as OpenCV has them, where a matrix has none."""
    a, b, c, d = (matrices[:, i, j] for i in (0, 1) for j in (0, 1))
    determinant = a * d - b * c
    factor = np.where(determinant != 0, 1 / np.where(determinant != 0, determinant, 1), 0)
    turn = np.moveaxis(np.array([[d, -b], [-c, a]]) * factor, 2, 0)
    return np.concatenate([turn, -turn @ matrices[:, :, 2:]], 2)


def _reaches(inverse: Float64, shapes: Int64, size: Size, step: Int64) -> Bool:
    """(n,) whether the part of the image below the chip is a block wide and high at least."""
    corners = np.array([[0, 0], [size[0], 0], [0, size[1]], size], float)
    places = corners @ np.swapaxes(inverse[:, :, :2], 1, 2) + inverse[:, None, :, 2]
    blocks = np.maximum(step, 1)[:, None]
    low = np.clip(np.floor(places.min(1) / blocks) * blocks - blocks, 0, None)
    high = np.minimum(np.ceil(places.max(1) / blocks) * blocks + blocks, shapes[:, ::-1])
    return np.asarray((high - low >= blocks).all(1))
