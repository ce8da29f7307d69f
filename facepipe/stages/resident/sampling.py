"""Bilinear sampling of images of any sizes that lie one behind the other in one buffer of pixels."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from facepipe.models.runtime.transfers import Uploads, send_array
from facepipe.types import Int64, UInt8


class Sources(NamedTuple):
    """Images in one buffer: pixels (p, 3) uint8; first pixel, height and width of each image, (n,) integers.

    The integers are int32 where the buffer has fewer than 2^31 pixels: an index is most of what a gather reads.
    """

    pixels: Tensor
    first: Tensor
    height: Tensor
    width: Tensor


class ResidentImages(NamedTuple):
    """Images that were sent to a device: pixels (p, 3) uint8 there; here each one's first pixel, height and width."""

    pixels: Tensor
    first: Int64
    shapes: Int64

    @classmethod
    def upload(cls, images: Sequence[UInt8], uploads: Uploads) -> "ResidentImages":
        """Of images (h, w, 3), at least one."""
        shapes = np.array([image.shape[:2] for image in images], np.int64)
        return cls(uploads(images), np.cumsum([0, *shapes.prod(1)])[:-1], shapes)

    def select(self, chosen: Int64) -> Sources:
        """Of chosen images (m,), any of them any number of times."""
        kind = np.int32 if len(self.pixels) < 1 << 31 else np.int64
        columns = np.stack([self.first[chosen], *self.shapes[chosen].T]).astype(kind)
        return Sources(self.pixels, *send_array(columns, self.pixels.device).unbind(0))

    def view_stack(self, chosen: Int64) -> Tensor | None:
        """(m, h, w, 3) of chosen images, where they are of one shape and one behind the other: a view, else None."""
        height, width = self.shapes[chosen[0]].tolist()
        first, size = int(self.first[chosen[0]]), height * width
        alike = (self.shapes[chosen] == (height, width)).all()
        if not alike or (self.first[chosen] != first + size * np.arange(len(chosen))).any():
            return None
        return self.pixels[first : first + size * len(chosen)].view(len(chosen), height, width, 3)


def bilinear(sources: Sources, y: Tensor, x: Tensor, step: int = 1) -> Tensor:
    """(n, h, w, 3) uint8 levels at (y, x), which broadcast to (n, h, w) float32; black outside.

    step: the images are first averaged over blocks of step x step pixels, rounded to levels; y and x count blocks
    """
    height, width = (side[:, None, None] // step for side in (sources.height, sources.width))
    top, left = y.floor(), x.floor()
    down, right = y - top, x - left
    total: Tensor | None = None
    for row, row_weight in ((top, 1 - down), (top + 1, down)):
        for column, column_weight in ((left, 1 - right), (left + 1, right)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            weight = (row_weight * column_weight * inside)[..., None]
            levels = _levels(sources, _clipped(row, height), _clipped(column, width), step)
            total = levels * weight if total is None else total.addcmul_(levels, weight)
    assert total is not None
    return total.round_().clamp_(0, 255).to(torch.uint8)


def pixels_at(sources: Sources, y: Tensor, x: Tensor) -> Tensor:
    """(n, h, w, 3) uint8 pixels at whole (y, x), integers that broadcast to (n, h, w) and lie inside the images."""
    index = sources.first[:, None, None] + y * sources.width[:, None, None] + x
    return sources.pixels.index_select(0, index.reshape(-1)).view(*index.shape, 3)


def _levels(sources: Sources, row: Tensor, column: Tensor, step: int) -> Tensor:
    """(n, h, w, 3) float32 levels of blocks; row and column of blocks, inside."""
    kind = sources.first.dtype
    row, column = row.to(kind), column.to(kind)
    if step == 1:
        return pixels_at(sources, row, column).float()
    return blocks_at(sources, row, column, step).float()


def blocks_at(sources: Sources, row: Tensor, column: Tensor, step: int) -> Tensor:
    """(n, h, w, 3) int32 means of blocks of step x step pixels; row and column count blocks, as in `pixels_at`."""
    first, width = (value[:, None, None] for value in (sources.first, sources.width))
    corner = first + row * step * width + column * step
    along = torch.arange(step, device=corner.device, dtype=corner.dtype)
    index = corner[..., None, None] + along[:, None] * width[..., None, None] + along
    block = sources.pixels.index_select(0, index.reshape(-1)).view(*corner.shape, step * step, 3)
    return averaged(block.sum(3, dtype=torch.int32), step)


def averaged(sums: Tensor, step: int) -> Tensor:
    """int32 sums over blocks of step x step levels as OpenCV's INTER_AREA rounds them: halves up for a step of 2, else
    to even.
    """
    return (sums + 2) >> 2 if step == 2 else (sums.float() / (step * step)).round_().int()


def _clipped(at: Tensor, count: Tensor) -> Tensor:
    return torch.minimum(at.clamp(min=0), count - 1)
