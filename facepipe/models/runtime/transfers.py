"""Pinned memory between host and device: uploads through two buffers in turn, downloads that are waited for by event.

On a CPU everything is an ordinary copy, and nothing is ever waited for.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from facepipe.types import UInt8Image

Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]

_PARTS = 4  # copies side by side where there is a pool: one core moves less than the bus does


def send_array(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A small array on the device, by way of pinned memory, so that the host does not wait for the stream."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


class Download:
    """A tensor on its way to the host, copied in the current stream's order: what comes later may overwrite it."""

    def __init__(self, tensor: Tensor):
        self._event: torch.cuda.Event | None = None
        if tensor.device.type == "cpu":
            self._host = tensor.clone()
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> npt.NDArray[Any]:
        """The values, as soon as they are here; the stream itself is not waited for."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy()


class Uploads:
    """Images to the device on a stream of their own, through two pinned buffers that are filled in turn.

    While one buffer is copied the other one is filled; filling waits only for the copy before the last. Copies into
    the buffers are made by `each`: map, or that of a thread pool.
    """

    def __init__(self, device: torch.device, each: Each = map, size: int = 1 << 26):
        self._device, self.each, self._size = device, each, size
        self._turn = 0
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
        self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2 if cuda else 0)]
        self._copied: list[torch.cuda.Event | None] = [None, None]

    def __call__(self, images: Sequence[UInt8Image]) -> Tensor:
        """The bytes of the images (h, w, 3) one behind the other: (pixels, 3) uint8 on the device.

        What is queued on the current stream afterwards comes after the copy.
        """
        flat = [np.ascontiguousarray(image).reshape(-1) for image in images]
        if self._stream is None:
            return torch.from_numpy(np.concatenate(flat)).view(-1, 3)
        stream = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            there = torch.empty(sum(map(len, flat)), dtype=torch.uint8, device=self._device)
            at = 0
            for pieces in fill_buffers(flat, self._size):
                at += self._send(pieces, there[at:])
        stream.wait_stream(self._stream)
        there.record_stream(stream)  # its memory is the copy stream's, and is read on this one
        return there.view(-1, 3)

    def _send(self, pieces: list[UInt8Image], there: Tensor) -> int:
        """Queue a buffer's copy to the beginning of `there`; its length."""
        self._turn ^= 1
        before = self._copied[self._turn]
        if before is not None:
            before.synchronize()
        count = gather_pieces(pieces, self._buffers[self._turn].numpy(), self.each)
        there[:count].copy_(self._buffers[self._turn][:count], non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        self._copied[self._turn] = event
        return count


def fill_buffers(arrays: Iterable[UInt8Image], size: int) -> Iterator[list[UInt8Image]]:
    """Arrays (n,) in lists of `size` bytes together, the last of which has what is left; they are cut where need be."""
    pieces: list[UInt8Image] = []
    room = size
    for array in arrays:
        at = 0
        while at < len(array):
            piece = array[at : at + room]
            pieces.append(piece)
            at, room = at + len(piece), room - len(piece)
            if not room:
                yield pieces
                pieces, room = [], size
    if pieces:
        yield pieces


def gather_pieces(pieces: Sequence[UInt8Image], into: UInt8Image, each: Each = map) -> int:
    """Copy arrays (n,) one behind the other into a buffer; how many bytes they are."""
    ends = np.cumsum([0, *map(len, pieces)])

    def copy(numbers: range) -> None:
        for n in numbers:
            into[ends[n] : ends[n + 1]] = pieces[n]

    part = max(1, -(-len(pieces) // _PARTS))
    for _ in each(copy, [range(at, min(at + part, len(pieces))) for at in range(0, len(pieces), part)]):
        pass
    return int(ends[-1])
