"""Blocks of vectors on their way to a device: while one is worked on, the next is read and copied."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from facepipe.types import Float32

Label = TypeVar("Label")


class Arrived(NamedTuple, Generic[Label]):
    """A block on the device: what it was labelled with, and its vectors (n, d) float32 here and there."""

    label: Label
    here: Float32
    there: torch.Tensor


def uploaded(blocks: Iterable[tuple[Label, Float32]], device: str) -> Iterator[Arrived[Label]]:
    """Each block's vectors (n, d) float32 on the device, one ahead of what is asked for, in order; empty ones left out.

    On a GPU through two pinned buffers and a stream of its own, so that copies run beside kernels; blocks are read by a
    thread. Holds three blocks at a time.
    """
    full = ((label, np.ascontiguousarray(vectors, np.float32)) for label, vectors in blocks if len(vectors))
    send = _Pinned(device) if device.startswith("cuda") else _plain
    with ThreadPoolExecutor(1) as ahead:

        def following() -> tuple[Label, Float32, torch.Tensor, torch.cuda.Event | None] | None:
            block = next(full, None)
            return None if block is None else (*block, *send(block[1]))

        coming = ahead.submit(following)
        while (block := coming.result()) is not None:
            label, here, there, copied = block
            coming = ahead.submit(following)
            if copied is not None:
                current = torch.cuda.current_stream(there.device)
                current.wait_event(copied)
                there.record_stream(current)
            del block
            yield Arrived(label, here, there)
            del here, there


def _plain(vectors: Float32) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    return torch.tensor(vectors), None  # a copy: mapped files are read-only, which torch does not know


class _Pinned:
    """Two page-locked buffers that blocks pass through in turn."""

    def __init__(self, device: str):
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._buffers: list[torch.Tensor | None] = [None, None]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def __call__(self, vectors: Float32) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        self._turn = 1 - self._turn
        last = self._copied[self._turn]
        if last is not None:
            last.synchronize()  # the buffer is free once its last copy has left
        buffer = self._buffers[self._turn]
        if buffer is None or len(buffer) < len(vectors) or buffer.shape[1] != vectors.shape[1]:
            buffer = torch.empty(vectors.shape, dtype=torch.float32, pin_memory=True)
            self._buffers[self._turn] = buffer
        np.copyto(buffer.numpy()[: len(vectors)], vectors)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            there = buffer[: len(vectors)].to(self._device, non_blocking=True)
            copied.record(self._stream)
        self._copied[self._turn] = copied
        return there, copied
