"""Blocks of vectors on their way to a device: while one is worked on, the next is read and copied."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from facepipe.models.runtime.transfers import PinnedBuffers
from facepipe.types import Float32

Label = TypeVar("Label")


class UploadedBlock(NamedTuple, Generic[Label]):
    """A block of vectors on the host and on the device.

    Attributes:
        label: What the caller named the block.
        on_host: Vectors (n, d).
        on_device: The same vectors on the device.
    """

    label: Label
    on_host: Float32
    on_device: torch.Tensor


class _Copy(NamedTuple):
    """A copy to a device, and the event that ends it; None if it is complete."""

    vectors: torch.Tensor
    done: torch.cuda.Event | None


def upload_blocks(blocks: Iterable[tuple[Label, Float32]], device: str) -> Iterator[UploadedBlock[Label]]:
    """Copy each block to the device, in order, one ahead of the block that the caller works on.

    On a GPU blocks pass through two pinned buffers and a stream of their own, so that copies run beside kernels. A
    thread reads the blocks. Three blocks are in memory at a time.

    Args:
        blocks: labels and vectors (n, d); empty blocks are skipped.
        device: of torch.
    """
    full = ((label, np.ascontiguousarray(vectors, np.float32)) for label, vectors in blocks if len(vectors))
    send = _PinnedSender(device) if device.startswith("cuda") else _copy_on_host
    with ThreadPoolExecutor(1) as reader:

        def send_next() -> tuple[Label, Float32, _Copy] | None:
            block = next(full, None)
            return None if block is None else (*block, send(block[1]))

        upcoming = reader.submit(send_next)
        while (block := upcoming.result()) is not None:
            label, on_host, (on_device, done) = block
            # Let the reader fetch the next block while the caller works on this one.
            upcoming = reader.submit(send_next)
            if done is not None:
                current = torch.cuda.current_stream(on_device.device)
                current.wait_event(done)
                on_device.record_stream(current)
            # Names that outlive the yield would keep a fourth block in memory.
            del block
            yield UploadedBlock(label, on_host, on_device)
            del on_host, on_device


def _copy_on_host(vectors: Float32) -> _Copy:
    # A copy: mapped files are read-only, and torch has no tensors that are.
    return _Copy(torch.tensor(vectors), None)


class _PinnedSender:
    """Copies of blocks to a GPU through pinned buffers."""

    def __init__(self, device: str):
        self._device = torch.device(device)
        self._buffers = PinnedBuffers(self._device)

    def __call__(self, vectors: Float32) -> _Copy:
        buffer = self._buffers.acquire(vectors.nbytes).view(torch.float32).view(vectors.shape)
        np.copyto(buffer.numpy(), vectors)
        with torch.cuda.device(self._device), torch.cuda.stream(self._buffers.stream):
            copy = buffer.to(self._device, non_blocking=True)
            return _Copy(copy, self._buffers.release())
