"""Batch sizes: planned from a device's free memory, and halved if it runs out all the same."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Result = TypeVar("Result")

_SHARE = 0.8  # of the free memory; the allocator rounds up, and other processes may want some


def measure_free_memory(device: str) -> int | None:
    """Measure the free bytes of a CUDA device, including what torch has reserved and does not use.

    Returns:
        None for a CPU.
    """
    if not device.startswith("cuda"):
        return None
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def plan_batch_size(free: int | None, bytes_per_item: int, max_size: int, fixed_bytes: int = 0) -> int:
    """Find the largest power of two of items that fits the memory.

    Args:
        free: Free bytes; None if memory is not the limit.
        bytes_per_item: Bytes that one item takes.
        max_size: Upper bound of the result.
        fixed_bytes: Bytes needed besides the items.

    Returns:
        At least 1.
    """
    fits = max_size if free is None else min(max_size, int((free * _SHARE - fixed_bytes) // max(1, bytes_per_item)))
    return 1 << max(0, fits.bit_length() - 1) if fits > 0 else 1


class Batches(Generic[Result]):
    """Work on items in batches, whose size is halved for good when the device's memory runs out.

    Attributes:
        size: Items per batch, at most.
    """

    def __init__(self, size: int):
        self.size = size

    def __call__(self, work: Callable[[slice], Result], count: int) -> Iterator[tuple[slice, Result]]:
        """Call a function on each batch, in order.

        Args:
            work: The function; it gets the slice of the items.
            count: Number of items.

        Yields:
            The slice and the result of each batch.

        Raises:
            Exception: Whatever `work` raises; an out-of-memory error if one item alone is too much.
        """
        # The start only moves when a batch has succeeded; after a failure a smaller one starts at the same item.
        start = 0
        while start < count:
            part = slice(start, min(start + self.size, count))
            try:
                result = work(part)
            except Exception as error:
                if part.stop - start == 1 or not is_out_of_memory(error):
                    raise
            else:
                yield part, result
                start = part.stop
                continue
            # Outside of the handler: its traceback would keep the tensors of the failed batch.
            self.size = max(1, (part.stop - start) // 2)
            empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that a device is out of memory: torch's, ONNX Runtime's, or a library's."""
    if type(error).__name__ == "OutOfMemoryError":
        return True
    message = str(error).lower()
    return any(words in message for words in ("out of memory", "failed to allocate memory", "alloc_failed"))


def empty_cache() -> None:
    """Give the memory back that torch keeps for later."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
