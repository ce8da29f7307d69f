"""Letterbox images on the device: shrink, mirror or pad them as `stages.detect.Detect` does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from facepipe.models.runtime.transfers import send_array
from facepipe.stages.resident.sampling import BufferedImages, average_blocks, gather_pixels

_WEIGHT_UNIT = 2048  # of OpenCV's integer weights


class LetterboxPlacement(NamedTuple):
    """Where an image lies in a detector's input.

    Attributes:
        height: height of the shrunk image
        width: width of the shrunk image
        top: row of the input where the image starts
        left: column of the input where the image starts
        mirrored: whether the image is mirrored about its edges; otherwise there is black below and to its right
        out_height: height of the input
        out_width: width of the input
        step: 2 if the image is halved by averages before it is interpolated, otherwise 1
        sx: total scale of x
        sy: total scale of y
    """

    height: int
    width: int
    top: int
    left: int
    mirrored: bool
    out_height: int
    out_width: int
    step: int = 1
    sx: float = 1.0
    sy: float = 1.0

    @property
    def is_unchanged(self) -> bool:
        """Whether the input is the image itself."""
        return self == LetterboxPlacement(self.height, self.width, 0, 0, False, self.height, self.width)


@dataclass(frozen=True)
class LetterboxRule:
    """Place images as Detect does.

    Attributes:
        border_below: images up to this size get a mirrored border
        stride: stride of the detector
    """

    border_below: int
    stride: int

    def place(self, height: int, width: int, size: int) -> LetterboxPlacement | None:
        """Place an image at `size` as `Detect.letterbox` does.

        Returns:
            None if the image must be halved twice or more, which is left to the host.
        """
        # Halve once by averages if more than a factor of two is left, as the host does.
        step = 1
        if max(height, width) > 2 * size and min(height, width) > 1:
            step = 2
            height //= 2
            width //= 2
            if max(height, width) > 2 * size and min(height, width) > 1:
                return None
        # Then shrink to `size`; images are never enlarged.
        scale = size / max(height, width)
        small_height = height
        small_width = width
        if scale < 1:
            small_height = max(1, round(height * scale))
            small_width = max(1, round(width * scale))
        # Border: mirrored on all sides, or black padding below and to the right.
        is_mirrored = max(small_height, small_width) <= self.border_below
        if is_mirrored:
            extra_height = self._measure_border(small_height)
            extra_width = self._measure_border(small_width)
        else:
            extra_height = -small_height % self.stride
            extra_width = -small_width % self.stride
        return LetterboxPlacement(
            height=small_height,
            width=small_width,
            top=extra_height // 2 if is_mirrored else 0,
            left=extra_width // 2 if is_mirrored else 0,
            mirrored=is_mirrored,
            out_height=small_height + extra_height,
            out_width=small_width + extra_width,
            step=step,
            # Scales from the decoded image to the input: the resize, then the halving.
            sx=small_width / width / step,
            sy=small_height / height / step,
        )

    def _measure_border(self, side: int) -> int:
        """Return the total border of a side: half the side, to the nearest multiple of the stride."""
        return max(self.stride * round(1.5 * side / self.stride), side + (-side % self.stride)) - side


@torch.inference_mode()
def letterbox_images(images: BufferedImages, placements: Sequence[LetterboxPlacement]) -> Tensor:
    """Letterbox images, pixel by pixel as `Detect.letterbox` (tests/facepipe/stages/resident/test_letterbox.py).

    Args:
        images: n images on the device.
        placements: placement of each image. All have the same output size and step.

    Returns:
        Inputs, (n, out_height, out_width, 3) uint8.
    """
    # Size and step are common, the other numbers differ by image: (n, 1) each.
    first = placements[0]
    numbers = np.array([placement[:5] for placement in placements], np.int64)
    height, width, top, left, mirrored = send_array(numbers, images.pixels.device)[:, :, None].unbind(1)
    # Which pixel of the shrunk image lies at each row and column of the input?
    y, row_is_inside = _map_side(first.out_height, height, top, mirrored.bool())
    x, column_is_inside = _map_side(first.out_width, width, left, mirrored.bool())
    # Interpolate if any image is shrunk; otherwise gather pixels as they are.
    if any(placement.sx != 1 or placement.sy != 1 for placement in placements):
        down = _Taps.locate(y, height, images.height // first.step)
        across = _Taps.locate(x, width, images.width // first.step)
        frames = _shrink_images(images, down, across, first.step)
    else:
        kind = images.first.dtype
        frames = gather_pixels(images, y.to(kind)[:, :, None], x.to(kind)[:, None, :])
    is_inside = row_is_inside[:, :, None] & column_is_inside[:, None, :]
    return frames.mul_(is_inside[..., None])


class _Taps(NamedTuple):
    """Two neighbouring pixels of the full image for each position along a side, with integer weights; all (n, c).

    The weights of a position sum to 2048.
    """

    near: Tensor
    far: Tensor
    near_weight: Tensor
    far_weight: Tensor

    @classmethod
    def locate(cls, index: Tensor, small: Tensor, full: Tensor) -> "_Taps":
        """Locate pixels of the shrunk images in the full images.

        Args:
            index: pixels of the shrunk images along the side, (n, c).
            small: sides of the shrunk images, (n, 1).
            full: sides of the full images, (n,).
        """
        # Position about pixel centres; before the first and after the last pixel the edge repeats.
        side = full[:, None].double()
        position = ((index + 0.5) * (side / small) - 0.5).float().clamp(min=0)
        near = position.floor()
        rest = (position - near) * (near < side - 1)
        near = near.minimum(side - 1).to(full.dtype)
        far = (near + 1).minimum(full[:, None] - 1)
        # Integer weights, as the host's resize has them.
        near_weight = ((1 - rest) * _WEIGHT_UNIT).round().to(torch.int32)
        far_weight = (rest * _WEIGHT_UNIT).round().to(torch.int32)
        return cls(near, far, near_weight, far_weight)


def _shrink_images(images: BufferedImages, down: _Taps, across: _Taps, step: int) -> Tensor:
    """Shrink images by the whole-number arithmetic of OpenCV's INTER_LINEAR, (n, h, w, 3) uint8."""

    def gather_levels(row: Tensor, column: Tensor) -> Tensor:
        if step == 1:
            return gather_pixels(images, row[:, :, None], column[:, None, :]).int()
        return average_blocks(images, row[:, :, None], column[:, None, :], step)

    # Interpolate across within each row, then down; products are shifted as in the host's arithmetic.
    near_weight = across.near_weight[:, None, :, None]
    far_weight = across.far_weight[:, None, :, None]
    total: Tensor | None = None
    for row, weight in ((down.near, down.near_weight), (down.far, down.far_weight)):
        mixed = gather_levels(row, across.near).mul_(near_weight)
        mixed = mixed.add_(gather_levels(row, across.far).mul_(far_weight))
        part = (mixed >> 4).mul_(weight[:, :, None, None]) >> 16
        total = part if total is None else total.add_(part)
    assert total is not None
    return ((total + 2) >> 2).to(torch.uint8)


def _map_side(count: int, small: Tensor, before: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor]:
    """Map the positions along a side of the input to pixels of the shrunk images.

    Args:
        count: length of the side.
        small: sides of the shrunk images, (n, 1).
        before: positions before the image, (n, 1).
        mirrored: whether the image is mirrored about its edges, (n, 1).

    Returns:
        The pixel at each position, and whether there is one, both (n, count).
    """
    # Mirrored: positions repeat with twice the side less the two edges.
    index = torch.arange(count, device=small.device) - before
    period = (2 * small - 2).clamp(min=1)
    phase = index.remainder(period)
    reflected = torch.minimum(phase, period - phase)  # ... 2 1 0 1 2 ... without the edge twice
    is_inside = mirrored | ((index >= 0) & (index < small))
    return torch.where(mirrored, reflected, index.clamp(min=0).minimum(small - 1)), is_inside
