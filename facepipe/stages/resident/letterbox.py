"""A detector's input from images on the device: shrunk, mirrored or padded as `stages.detect.Detect` does it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from facepipe.models.runtime.transfers import send_array
from facepipe.stages.resident.sampling import Sources, blocks_at, pixels_at

_WEIGHT = 2048  # OpenCV's unit of weights


class LetterboxPlacement(NamedTuple):
    """Where an image lies in an input (out_height, out_width): `height` x `width` pixels from (top, left) on.

    step: 2 where the image is halved by averages before it is interpolated; sx, sy: scales in all
    mirrored: with the image mirrored about it, else with black below and to its right
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
    def whole(self) -> bool:
        """Whether the image is the input as it is."""
        return self == LetterboxPlacement(*self[:2], 0, 0, False, *self[:2])


@dataclass(frozen=True)
class PlacementRule:
    """Detect's options that decide where an image lies; stride: of the detector."""

    border_below: int
    stride: int

    def place(self, height: int, width: int, size: int) -> LetterboxPlacement | None:
        """The placement of an image at `size`, as `Detect.letterbox` finds it; None where it is halved twice or more,
        which is left to the host.
        """
        step = 1
        if max(height, width) > 2 * size and min(height, width) > 1:
            step, height, width = 2, height // 2, width // 2
            if max(height, width) > 2 * size and min(height, width) > 1:
                return None
        scale, small = size / max(height, width), (height, width)
        if scale < 1:
            small = max(1, round(height * scale)), max(1, round(width * scale))
        mirrored = max(small) <= self.border_below
        more = [self._border(side) if mirrored else -side % self.stride for side in small]
        top, left = (extra // 2 if mirrored else 0 for extra in more)
        out = small[0] + more[0], small[1] + more[1]
        return LetterboxPlacement(
            *small, top, left, mirrored, *out, step, small[1] / width / step, small[0] / height / step
        )

    def _border(self, side: int) -> int:
        return max(self.stride * round(1.5 * side / self.stride), side + (-side % self.stride)) - side


@torch.inference_mode()
def letterbox_images(sources: Sources, places: Sequence[LetterboxPlacement]) -> Tensor:
    """(n, out_height, out_width, 3) uint8 of the sources' images, whose placements share that size and the step.

    Pixel by pixel what `Detect.letterbox` gives (tests/facepipe/stages/resident/test_letterbox.py).
    """
    first = places[0]
    told = np.array([place[:5] for place in places], np.int64)
    height, width, top, left, mirrored = send_array(told, sources.pixels.device)[:, :, None].unbind(1)
    y, row_inside = _along(first.out_height, height, top, mirrored.bool())
    x, column_inside = _along(first.out_width, width, left, mirrored.bool())
    if any(place.sx != 1 or place.sy != 1 for place in places):
        full = (side // first.step for side in (sources.height, sources.width))
        down, across = (_Taps.of(*taps) for taps in zip((y, x), (height, width), full, strict=True))
        frames = _shrunk(sources, down, across, first.step)
    else:
        kind = sources.first.dtype
        frames = pixels_at(sources, y.to(kind)[:, :, None], x.to(kind)[:, None, :])
    return frames.mul_((row_inside[:, :, None] & column_inside[:, None, :])[..., None])


class _Taps(NamedTuple):
    """Along a side, for each place: two neighbouring pixels of the full image and their weights of 2048; all (n, c)."""

    near: Tensor
    far: Tensor
    near_weight: Tensor
    far_weight: Tensor

    @classmethod
    def of(cls, at: Tensor, small: Tensor, full: Tensor) -> "_Taps":
        """at: pixels of the shrunk image, (n, c); small: its sides (n, 1), full: those of the full image (n,)."""
        side = full[:, None].double()
        place = ((at + 0.5) * (side / small) - 0.5).float().clamp(min=0)
        near = place.floor()
        rest = (place - near) * (near < side - 1)
        near = near.minimum(side - 1).to(full.dtype)
        far = (near + 1).minimum(full[:, None] - 1)
        weights = ((part * _WEIGHT).round().to(torch.int32) for part in (1 - rest, rest))
        return cls(near, far, *weights)


def _shrunk(sources: Sources, down: _Taps, across: _Taps, step: int) -> Tensor:
    """(n, h, w, 3) uint8, the whole-number arithmetic of OpenCV's INTER_LINEAR."""

    def levels(row: Tensor, column: Tensor) -> Tensor:
        if step == 1:
            return pixels_at(sources, row[:, :, None], column[:, None, :]).int()
        return blocks_at(sources, row[:, :, None], column[:, None, :], step)

    left, right = (weight[:, None, :, None] for weight in across[2:])
    total: Tensor | None = None
    for row, weight in ((down.near, down.near_weight), (down.far, down.far_weight)):
        mixed = levels(row, across.near).mul_(left).add_(levels(row, across.far).mul_(right))
        part = (mixed >> 4).mul_(weight[:, :, None, None]) >> 16
        total = part if total is None else total.add_(part)
    assert total is not None
    return ((total + 2) >> 2).to(torch.uint8)


def _along(count: int, small: Tensor, before: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor]:
    """(n, count) pixel of the shrunk image at each place along a side, and whether there is one."""
    at = torch.arange(count, device=small.device) - before
    period = (2 * small - 2).clamp(min=1)
    turned = at.remainder(period)
    turned = torch.minimum(turned, period - turned)  # ... 2 1 0 1 2 ... without the edge twice
    inside = mirrored | ((at >= 0) & (at < small))
    return torch.where(mirrored, turned, at.clamp(min=0).minimum(small - 1)), inside
