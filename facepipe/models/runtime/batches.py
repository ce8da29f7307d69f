"""How many items a device takes at a time: planned from its free memory, halved where that runs out all the same."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Result = TypeVar("Result")

_SHARE = 0.8  # of the free memory; the allocator rounds up, and others may want some


def measure_free_memory(device: str) -> int | None:
    """Free bytes of a CUDA device, with what torch holds of it unused; None for a CPU."""
    if not device.startswith("cuda"):
        return None
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def plan_batch_size(free: int | None, each: int, most: int, fixed: int = 0) -> int:
    """The largest power of two, at most `most`, of items of `each` bytes beside `fixed` bytes; at least 1.

    free: bytes; None where memory is not what decides
    """
    fits = most if free is None else min(most, int((free * _SHARE - fixed) // max(1, each)))
    return 1 << max(0, fits.bit_length() - 1) if fits > 0 else 1


class Batches(Generic[Result]):
    """Work on items in batches of at most `size`, which is halved for good when the device's memory runs out.

    Raises what the work raises, an out-of-memory error where one item alone is too much.
    """

    def __init__(self, size: int):
        self.size = size

    def __call__(self, work: Callable[[slice], Result], count: int) -> Iterator[tuple[slice, Result]]:
        """(slice of the `count` items, work(slice)), in order."""
        at = 0
        while at < count:
            part = slice(at, min(at + self.size, count))
            try:
                result = work(part)
            except Exception as error:
                if part.stop - at == 1 or not is_out_of_memory(error):
                    raise
            else:
                yield part, result
                at = part.stop
                continue
            # Outside of the handler, whose traceback would keep the failed batch's tensors.
            self.size = max(1, (part.stop - at) // 2)
            _give_back()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device's memory is used up: torch's own, ONNX Runtime's, or a library's."""
    if type(error).__name__ == "OutOfMemoryError":
        return True
    said = str(error).lower()
    return any(words in said for words in ("out of memory", "failed to allocate memory", "alloc_failed"))


def _give_back() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
