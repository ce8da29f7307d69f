"""Torch modules in inference: memory format and threads."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def to_channels_last(net: "nn.Module", device: str) -> "nn.Module":
    """Move a network to a device in inference mode, with the weights of its convolutions in channels_last."""
    import torch

    on_device: nn.Module = net.eval().to(device)
    return on_device.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@contextmanager
def limit_threads(threads: int) -> Iterator[None]:
    """Set the number of torch's threads on the CPU, and restore it afterwards."""
    import torch

    previous = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
