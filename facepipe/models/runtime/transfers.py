"""Copies between host and device through pinned memory, beside the kernels.

On a CPU everything is an ordinary copy, and nothing ever waits.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from facepipe.types import UInt8, UInt8Image

# `map`, or that of a thread pool.
MapFunction = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]

_PARALLEL_COPIES = 4  # if there is a pool: one core moves less than the bus does


def send_array(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Copy a small array to the device through pinned memory, so that the host does not wait for the stream."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


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
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
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


class Uploads:
    """Copies of images to a device.

    Attributes:
        map_function: Makes the copies into the buffers: `map`, or that of a thread pool.
    """

    def __init__(self, device: torch.device, map_function: MapFunction = map, buffer_size: int = 1 << 26):
        """Prepare the buffers.

        Args:
            device: Where the images go.
            map_function: Makes the copies into the buffers: `map`, or that of a thread pool.
            buffer_size: Bytes of each of the two buffers.
        """
        self.map_function = map_function
        self._device = device
        self._buffer_size = buffer_size
        self._buffers = PinnedBuffers(device) if device.type == "cuda" else None

    def __call__(self, images: Sequence[UInt8Image]) -> Tensor:
        """Copy images to the device, one after the other.

        What is queued on the current stream afterwards runs after the copy.

        Args:
            images: Arrays (h, w, 3).

        Returns:
            Their pixels, (n, 3) uint8.
        """
        flat = [np.ascontiguousarray(image).reshape(-1) for image in images]
        if self._buffers is None:
            return torch.from_numpy(np.concatenate(flat)).view(-1, 3)
        stream = torch.cuda.current_stream(self._device)
        # Fill and copy buffer by buffer on the copy stream, while kernels run on the current one.
        with torch.cuda.stream(self._buffers.stream):
            on_device = torch.empty(sum(map(len, flat)), dtype=torch.uint8, device=self._device)
            start = 0
            for pieces in fill_buffers(flat, self._buffer_size):
                buffer = self._buffers.acquire(self._buffer_size)
                count = gather_pieces(pieces, buffer.numpy(), self.map_function)
                on_device[start : start + count].copy_(buffer[:count], non_blocking=True)
                self._buffers.release()
                start += count
        # What is queued on the current stream from here on waits for the copies.
        stream.wait_stream(self._buffers.stream)
        on_device.record_stream(stream)  # its memory belongs to the copy stream, but this one reads it
        return on_device.view(-1, 3)


def fill_buffers(arrays: Iterable[UInt8], size: int) -> Iterator[list[UInt8]]:
    """Group arrays (n,) into lists of `size` bytes each, cutting them where necessary; the last list may be shorter."""
    pieces: list[UInt8] = []
    room = size
    for array in arrays:
        start = 0
        while start < len(array):
            piece = array[start : start + room]
            pieces.append(piece)
            start += len(piece)
            room -= len(piece)
            if not room:
                yield pieces
                pieces = []
                room = size
    if pieces:
        yield pieces


def gather_pieces(pieces: Sequence[UInt8], buffer: UInt8, map_function: MapFunction = map) -> int:
    """Copy arrays (n,) into a buffer, one after the other.

    Returns:
        Their total number of bytes.
    """
    offsets = np.cumsum([0, *map(len, pieces)])

    def copy_range(numbers: range) -> None:
        for n in numbers:
            buffer[offsets[n] : offsets[n + 1]] = pieces[n]

    # Each task copies a range of pieces.
    pieces_per_task = max(1, -(-len(pieces) // _PARALLEL_COPIES))
    starts = range(0, len(pieces), pieces_per_task)
    tasks = [range(start, min(start + pieces_per_task, len(pieces))) for start in starts]
    for _ in map_function(copy_range, tasks):
        pass
    return int(offsets[-1])
