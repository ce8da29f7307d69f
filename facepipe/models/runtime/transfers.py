"""Copies between host and device through pinned memory, beside the kernels.

On a CPU everything is an ordinary copy, and nothing ever waits.
"""

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


class Download:
    """A tensor on its way to the host.

    The copy keeps the current stream's order: later kernels may overwrite the tensor.
    """

    def __init__(self, tensor: Tensor):
        """Queue the copy."""
        self._event: torch.cuda.Event | None = None
        if tensor.device.type == "cpu":
            self._host = tensor.clone()
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        # A thread that waits must not spin on a core that decoding wants.
        self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> npt.NDArray[Any]:
        """Wait for the copy, not for the whole stream, and return the values."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy()


class PinnedBuffers:
    """Two pinned buffers that copies to a CUDA device take in turn, on a stream of their own.

    While one buffer is copied, the other one is filled. Filling only waits for the copy before the last.

    Attributes:
        stream: The stream of the copies.
    """

    def __init__(self, device: torch.device):
        self.stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers: list[Tensor | None] = [None, None]
        self._copies: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def acquire(self, size: int) -> Tensor:
        """Wait until the next buffer is free, and return its first `size` bytes as uint8.

        Copy from it on `stream`, then call `release`.
        """
        # Take the other buffer, and wait for the last copy from it.
        self._turn = 1 - self._turn
        last_copy = self._copies[self._turn]
        if last_copy is not None:
            last_copy.synchronize()
        buffer = self._buffers[self._turn]
        if buffer is None or len(buffer) < size:
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            self._buffers[self._turn] = buffer
        return buffer[:size]

    def release(self) -> torch.cuda.Event:
        """Mark that the copy from the acquired buffer is queued, and return the event of its end."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self.stream)
        self._copies[self._turn] = event
        return event
