"""Sample images of any sizes that lie one after the other in one buffer of pixels."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from facepipe.models.runtime.transfers import Uploads, send_array
from facepipe.types import Int64, UInt8


class BufferedImages(NamedTuple):
    """Images in one buffer on a device.

    The integers are int32 if the buffer has fewer than 2^31 pixels: an index is most of what a gather reads.

    Attributes:
        pixels: RGB, (p, 3) uint8
        first: first pixel of each image, (n,) integers
        height: height of each image, (n,) integers
        width: width of each image, (n,) integers
    """

    pixels: Tensor
    first: Tensor
    height: Tensor
    width: Tensor


class ResidentImages(NamedTuple):
    """Images that were sent to a device. Their sizes are on the host.

    Attributes:
        pixels: RGB on the device, (p, 3) uint8
        first: first pixel of each image, (n,)
        shapes: height and width of each image, (n, 2)
    """

    pixels: Tensor
    first: Int64
    shapes: Int64

    @classmethod
    def upload(cls, images: Sequence[UInt8], uploads: Uploads) -> "ResidentImages":
        """Send images (h, w, 3) to the device; there must be at least one."""
        shapes = np.array([image.shape[:2] for image in images], np.int64)
        # Images lie one after the other: the first pixel of each is the sum of the areas before it.
        first = np.cumsum([0, *shapes.prod(1)])[:-1]
        return cls(uploads(images), first, shapes)

    def select(self, indices: Int64) -> BufferedImages:
        """Select images by index, (m,). An image may be selected several times."""
        kind = np.int32 if len(self.pixels) < 1 << 31 else np.int64
        columns = np.stack([self.first[indices], *self.shapes[indices].T]).astype(kind)
        first, height, width = send_array(columns, self.pixels.device).unbind(0)
        return BufferedImages(self.pixels, first, height, width)

    def view_stack(self, indices: Int64) -> Tensor | None:
        """View images as one tensor (m, h, w, 3) without a copy.

        Returns:
            None if the images differ in shape, or do not lie directly one after the other.
        """
        # The images must all have the shape of the first and follow it without a gap.
        height, width = self.shapes[indices[0]].tolist()
        start = int(self.first[indices[0]])
        size = height * width
        is_one_shape = (self.shapes[indices] == (height, width)).all()
        expected = start + size * np.arange(len(indices))
        if not is_one_shape or (self.first[indices] != expected).any():
            return None
        return self.pixels[start : start + size * len(indices)].view(len(indices), height, width, 3)


def sample_bilinear(images: BufferedImages, y: Tensor, x: Tensor, step: int = 1) -> Tensor:
    """Sample images bilinearly, with black outside.

    Args:
        images: n images.
        y: row positions, float32; broadcasts with `x` to (n, h, w).
        x: column positions, float32.
        step: the images are first averaged over blocks of step x step pixels, rounded to levels. y and x count blocks.

    Returns:
        Levels, (n, h, w, 3) uint8.
    """
    # Sizes in blocks.
    height = images.height[:, None, None] // step
    width = images.width[:, None, None] // step
    top = y.floor()
    left = x.floor()
    down = y - top
    right = x - left
    # Sum the four neighbours, each with its weight. A neighbour outside of the image has weight 0.
    total: Tensor | None = None
    for row, row_weight in ((top, 1 - down), (top + 1, down)):
        for column, column_weight in ((left, 1 - right), (left + 1, right)):
            is_inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            weight = (row_weight * column_weight * is_inside)[..., None]
            levels = _gather_levels(images, _clip_index(row, height), _clip_index(column, width), step)
            total = levels * weight if total is None else total.addcmul_(levels, weight)
    assert total is not None
    return total.round_().clamp_(0, 255).to(torch.uint8)


def gather_pixels(images: BufferedImages, y: Tensor, x: Tensor) -> Tensor:
    """Gather pixels at whole positions inside the images.

    Args:
        images: n images.
        y: rows, integers; broadcasts with `x` to (n, h, w).
        x: columns, integers.

    Returns:
        Levels, (n, h, w, 3) uint8.
    """
    # Flat index of each pixel, (n, h, w).
    index = images.first[:, None, None] + y * images.width[:, None, None] + x
    return images.pixels.index_select(0, index.reshape(-1)).view(*index.shape, 3)


def _gather_levels(images: BufferedImages, row: Tensor, column: Tensor, step: int) -> Tensor:
    """Gather levels of blocks inside the images, (n, h, w, 3) float32; row and column count blocks."""
    kind = images.first.dtype
    row = row.to(kind)
    column = column.to(kind)
    if step == 1:
        return gather_pixels(images, row, column).float()
    return average_blocks(images, row, column, step).float()


def average_blocks(images: BufferedImages, row: Tensor, column: Tensor, step: int) -> Tensor:
    """Average blocks of step x step pixels.

    Args:
        images: n images.
        row: rows of blocks, as the rows of pixels in `gather_pixels`.
        column: columns of blocks.
        step: side of a block in pixels.

    Returns:
        Means, (n, h, w, 3) int32.
    """
    first = images.first[:, None, None]
    width = images.width[:, None, None]
    # Flat index of the top-left pixel of each block, then of all its pixels, (n, h, w, step, step).
    corner = first + row * step * width + column * step
    offsets = torch.arange(step, device=corner.device, dtype=corner.dtype)
    index = corner[..., None, None] + offsets[:, None] * width[..., None, None] + offsets
    blocks = images.pixels.index_select(0, index.reshape(-1)).view(*corner.shape, step * step, 3)
    return _round_means(blocks.sum(3, dtype=torch.int32), step)


def _round_means(sums: Tensor, step: int) -> Tensor:
    """Divide int32 sums over blocks of step x step levels, and round as OpenCV's INTER_AREA does.

    It rounds halves up for a step of 2, and to even for other steps.
    """
    if step == 2:
        return (sums + 2) >> 2
    return (sums.float() / (step * step)).round_().int()


def _clip_index(index: Tensor, count: Tensor) -> Tensor:
    return torch.minimum(index.clamp(min=0), count - 1)
