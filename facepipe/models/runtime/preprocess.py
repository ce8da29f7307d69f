"""Chips as a network takes them: planes in its channel order, shifted and scaled."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from facepipe.types import Float32, UInt8Image

if TYPE_CHECKING:
    from torch import Tensor

ChannelValues = tuple[float, float, float]


@dataclass(frozen=True)
class Input:
    """How a network wants its pixels: (x - mean) / scale of levels from 0 to 255.

    Attributes:
        channels: Channel order, "rgb" or "bgr".
        mean: Level subtracted from each channel, in that order.
        scale: Divisor of each channel, in that order.
    """

    channels: str = "rgb"
    mean: ChannelValues = (127.5, 127.5, 127.5)
    scale: ChannelValues = (127.5, 127.5, 127.5)


def preprocess(chips: "Tensor", model_input: Input) -> "Tensor":
    """Convert chips to the planes that a network takes.

    Args:
        chips: (n, h, w, 3) uint8 RGB, on any device.
        model_input: Channel order, mean and scale of the network.

    Returns:
        (n, 3, h, w) float32 on the device of the chips.
    """
    import torch

    mean = torch.tensor(model_input.mean, device=chips.device).view(1, 3, 1, 1)
    scale = torch.tensor(model_input.scale, device=chips.device).view(1, 3, 1, 1)
    return preprocess_with(chips, mean, scale, is_bgr=model_input.channels == "bgr")


def preprocess_with(chips: "Tensor", mean: "Tensor", scale: "Tensor", *, is_bgr: bool) -> "Tensor":
    """Convert chips as `preprocess` does, with constants that are on the device already.

    A CUDA graph and an ONNX export need this: neither may create a tensor from host values while it records.

    Args:
        chips: (n, h, w, 3) uint8 RGB.
        mean: (1, 3, 1, 1) float32.
        scale: (1, 3, 1, 1) float32.
        is_bgr: Whether the network takes blue first.

    Returns:
        (n, 3, h, w) float32.
    """
    planes = chips.permute(0, 3, 1, 2).float()
    ordered = planes.flip(1) if is_bgr else planes
    return (ordered - mean) / scale


def preprocess_array(chips: UInt8Image, model_input: Input) -> Float32:
    """Convert chips as `preprocess` does, without torch and with the channels last.

    Args:
        chips: (n, h, w, 3) uint8 RGB.
        model_input: Channel order, mean and scale of the network.

    Returns:
        (n, h, w, 3) float32 in the channel order of the network.
    """
    ordered = chips[..., ::-1] if model_input.channels == "bgr" else chips
    mean = np.array(model_input.mean, np.float32)
    scale = np.array(model_input.scale, np.float32)
    return (ordered.astype(np.float32) - mean) / scale
