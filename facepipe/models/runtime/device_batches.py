"""Batches of images for a network on a GPU: few shapes, powers of two, pinned memory, one stream per thread.

Libraries choose their algorithms by the shape of a batch, so there are few of them. Each thread queues its batches on a
stream of its own, and waits for no other thread's. On a CPU the same code runs with ordinary memory, and is tested so.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from facepipe.models.runtime.batches import empty_cache, is_out_of_memory
from facepipe.models.runtime.transfers import Download
from facepipe.types import UInt8Image

Shape = tuple[int, int]
Outputs = tuple[npt.NDArray[Any], ...]

# A batch may be filled up to the next power of two by this share of its images; otherwise two smaller ones are run.
_MAX_PADDING = 0.25
# Pixels per batch: 32 frames of 640x640. RetinaFace needs some 100 bytes per pixel beside them.
_MAX_PIXELS = 32 * 640 * 640


def choose_batch_size(count: int, largest: int) -> int:
    """Choose the size of the next batch, a power of two.

    Args:
        count: images that are left, at least 1.
        largest: the largest batch, a power of two.
    """
    size: int = 1 << (count - 1).bit_length()
    if size > largest:
        return largest
    return size // 2 if size > (1 + _MAX_PADDING) * count else size


class DeviceBatches:
    """Run a function on images in batches on a device.

    Attributes:
        max_batch: images per batch, at most; a power of two. It is halved for good if the device's memory runs out.
    """

    def __init__(self, compute: Callable[[Tensor], tuple[Tensor, ...]], device: torch.device, max_batch: int):
        """Prepare the batches. The weights of the network must be on the device.

        Args:
            compute: (n, h, w, 3) uint8 on the device -> tensors (n, ...) there.
            device: a torch device.
            max_batch: images per batch, at most.
        """
        self.max_batch: int = 1 << (max(1, max_batch).bit_length() - 1)
        self._compute = compute
        self._device = device
        self._thread = threading.local()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the weights were sent on another stream

    def run(self, images: Sequence[UInt8Image], shapes: Sequence[Shape]) -> list[Outputs]:
        """Run the function on images, with black below and to the right of those that are smaller than their batch.

        All batches are queued before the first is waited for.

        Args:
            images: (h, w, 3) RGB of any sizes.
            shapes: height and width of the batch that each image goes into, no smaller than the image.

        Returns:
            The outputs of each image.
        """
        by_shape: dict[Shape, list[int]] = defaultdict(list)
        for number, shape in enumerate(shapes):
            by_shape[shape].append(number)
        # Images that share a shape share batches; each batch remembers whose outputs it holds.
        queued: list[tuple[list[int], tuple[Download, ...]]] = []
        for shape, numbers in by_shape.items():
            queued += self._queue_shape(images, numbers, shape)
        outputs: list[Outputs] = [()] * len(images)
        for numbers, downloads in queued:
            arrays = [download.wait() for download in downloads]
            for place, number in enumerate(numbers):
                outputs[number] = tuple(array[place] for array in arrays)
        return outputs

    def _queue_shape(
        self, images: Sequence[UInt8Image], numbers: list[int], shape: Shape
    ) -> Iterator[tuple[list[int], tuple[Download, ...]]]:
        """Queue the batches of one shape. If memory runs out, the same images are tried in smaller batches."""
        start = 0
        while start < len(numbers):
            fitting = max(1, _MAX_PIXELS // (shape[0] * shape[1]))
            largest = min(self.max_batch, 1 << (fitting.bit_length() - 1))
            size = choose_batch_size(len(numbers) - start, largest)
            part = numbers[start : start + size]
            try:
                downloads = self._queue_batch([images[number] for number in part], shape, size)
            except Exception as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
            else:
                yield part, downloads
                start += len(part)
                continue
            # Outside of the handler: its traceback would keep the tensors of the failed batch.
            self.max_batch = min(self.max_batch, size // 2)
            empty_cache()

    @torch.inference_mode()
    def _queue_batch(self, images: Sequence[UInt8Image], shape: Shape, size: int) -> tuple[Download, ...]:
        """Send a batch, run the function, and start the way back of its outputs."""
        with self._use_stream():
            host = torch.empty((size, *shape, 3), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
            batch = host.numpy()
            for n, image in enumerate(images):
                height, width = image.shape[:2]
                batch[n, :height, :width] = image
                batch[n, height:] = 0
                batch[n, :height, width:] = 0
            batch[len(images) :] = 0
            outputs = self._compute(host.to(self._device, non_blocking=True))
            return tuple(Download(output[: len(images)]) for output in outputs)

    @contextmanager
    def _use_stream(self) -> Iterator[None]:
        """Queue on this thread's stream inside the `with` block."""
        if self._device.type != "cuda":
            yield
            return
        if not hasattr(self._thread, "stream"):
            self._thread.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._thread.stream):
            yield
