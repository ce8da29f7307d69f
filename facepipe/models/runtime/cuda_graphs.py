"""A function of fixed shapes, captured as a CUDA graph and replayed; a plain call elsewhere, and for rare shapes."""

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from facepipe.models.runtime.batches import Batches, is_out_of_memory

_log = logging.getLogger(__name__)
Shape = tuple[int, ...]
# Calls of a shape before it is captured: a capture takes the time of a hundred calls, and shapes may be many.
_PLAIN = 3


class CapturedShape:
    """One shape: its static input, and the function on it.

    Fewer items than the bucket holds are computed beside what was there before: libraries choose algorithms by the
    shape of a batch, so that what comes out does not depend on how full it is.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], shape: Shape, device: torch.device, pool: Any):
        self._function, self._device, self._pool = function, device, pool
        self._input = torch.zeros(shape, dtype=torch.uint8, device=device)
        self._calls = 0
        self._output: Tensor | None = None
        self.cuda_graph: torch.cuda.CUDAGraph | None = None
        self.capturable = device.type == "cuda"

    def _try_to_capture(self) -> None:
        """What cannot be captured, with some driver or network, runs as it is: slower, and the same."""
        try:
            self._capture()
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self.capturable, self._output = False, None
            _log.warning("no CUDA graph could be captured, kernels are launched one by one: %s", error)

    def _capture(self) -> None:
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._function(self._input)  # libraries set their workspaces up, one a stream
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may pin memory or copy meanwhile; only this one's calls are captured.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            self._output = self._function(self._input)
        self.cuda_graph = graph

    def __call__(self, items: Tensor) -> Tensor:
        """The function's output for items (n, ...), n <= the bucket's; the next call to any bucket overwrites it."""
        self._input[: len(items)].copy_(items)
        self._calls += 1
        if self.capturable and self.cuda_graph is None and self._calls > _PLAIN:
            self._try_to_capture()
        if self.cuda_graph is None or self._output is None:
            return self._function(self._input)[: len(items)]
        self.cuda_graph.replay()
        return self._output[: len(items)]


class CudaGraphCache:
    """The buckets of one function (n, ...) uint8 -> (n, ...), one a shape; the `most` last used are kept.

    All are replayed on one stream, one after the other, and so share their memory for what is in between.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], device: torch.device, most: int = 24):
        self._function, self._device, self._most = function, device, most
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._held: OrderedDict[Shape, CapturedShape] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def __call__(self, items: Tensor, size: int) -> Tensor:
        """The outputs of items (n, ...), computed in a batch of `size` >= n."""
        shape = (size, *items.shape[1:])
        bucket = self._held.pop(shape, None)
        if bucket is None:
            self._make_room(self._most - 1)
            bucket = CapturedShape(self._function, shape, self._device, self._pool)
        self._held[shape] = bucket
        return bucket(items)

    def run_batch(self, items: Tensor, batches: Batches[Any]) -> Tensor:
        """The outputs of items that `batches` has cut off, computed in batches of its size.

        Where a full batch does not fit the memory and these items are fewer, it is the size that is halved, for good.
        """
        while True:
            try:
                return self(items, batches.size)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self.clear()
                if batches.size <= len(items):
                    raise  # `batches` itself goes on with fewer
            # Outside of the handler, whose traceback would keep the failed batch's tensors.
            batches.size = max(len(items), batches.size // 2)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def clear(self) -> None:
        """Let go of all buckets, as when memory runs out."""
        self._make_room(0)

    def _make_room(self, most: int) -> None:
        while len(self._held) > most:
            _, bucket = self._held.popitem(last=False)
            if bucket.cuda_graph is not None:
                torch.cuda.synchronize(self._device)  # a graph must not go while it runs
