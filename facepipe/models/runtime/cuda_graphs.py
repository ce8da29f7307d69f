"""CUDA graphs: a function of fixed shapes is captured once and replayed.

On a CPU, and for rare shapes, the function is called as usual.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from facepipe.models.runtime.batches import Batches, is_out_of_memory

_log = logging.getLogger(__name__)
Shape = tuple[int, ...]
# Calls of a shape before it is captured. A capture takes the time of a hundred calls, and there may be many shapes.
_CALLS_BEFORE_CAPTURE = 3


class CapturedShape:
    """One shape: its static input, and the function on it.

    If there are fewer items than the shape has, what the input held before is computed beside them. Libraries choose
    algorithms by the shape of a batch, so the result does not depend on how full it is.

    Attributes:
        cuda_graph: The graph, once captured.
        is_capturable: Whether a capture is still worth trying.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], shape: Shape, device: torch.device, pool: Any):
        """Allocate the input.

        Args:
            function: (n, ...) uint8 -> (n, ...).
            shape: Shape of the input.
            device: Where it is computed.
            pool: Memory pool shared by all graphs, from `torch.cuda.graph_pool_handle`.
        """
        self._function = function
        self._device = device
        self._pool = pool
        self._input = torch.zeros(shape, dtype=torch.uint8, device=device)
        self._output: Tensor | None = None
        self._calls = 0
        self.cuda_graph: torch.cuda.CUDAGraph | None = None
        self.is_capturable = device.type == "cuda"

    def __call__(self, items: Tensor) -> Tensor:
        """Compute the function's output.

        Args:
            items: (n, ...), with n at most that of the shape.

        Returns:
            (n, ...). The next call of any shape of the same cache overwrites it.
        """
        self._input[: len(items)].copy_(items)
        self._calls += 1
        if self.is_capturable and self.cuda_graph is None and self._calls > _CALLS_BEFORE_CAPTURE:
            self._try_capture()
        if self.cuda_graph is None or self._output is None:
            return self._function(self._input)[: len(items)]
        self.cuda_graph.replay()
        return self._output[: len(items)]

    def _try_capture(self) -> None:
        """Capture the graph. If the driver or the network does not allow it, calls stay plain: slower, same result."""
        try:
            self._capture()
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self.is_capturable = False
            self._output = None
            _log.warning("no CUDA graph could be captured, kernels are launched one by one: %s", error)

    def _capture(self) -> None:
        # Call the function once on the capturing stream: libraries set up one workspace per stream.
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._function(self._input)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        # Capture it. Other threads may pin memory or copy meanwhile; only this thread's calls are captured.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            self._output = self._function(self._input)
        self.cuda_graph = graph


class CudaGraphCache:
    """The captured shapes of one function; the least recently used are dropped.

    All graphs are replayed on one stream, one after the other, and so share the memory of their intermediate results.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], device: torch.device, max_shapes: int = 24):
        """Create an empty cache.

        Args:
            function: (n, ...) uint8 -> (n, ...).
            device: Where it is computed.
            max_shapes: Number of shapes that are kept.
        """
        self._function = function
        self._device = device
        self._max_shapes = max_shapes
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._captured: OrderedDict[Shape, CapturedShape] = OrderedDict()

    def __len__(self) -> int:
        return len(self._captured)

    def __call__(self, items: Tensor, size: int) -> Tensor:
        """Compute the outputs of items (n, ...) in a batch of `size`, which is at least n."""
        shape = (size, *items.shape[1:])
        # Taking the shape out and putting it back makes it the most recently used one.
        captured = self._captured.pop(shape, None)
        if captured is None:
            self._drop_oldest(self._max_shapes - 1)
            captured = CapturedShape(self._function, shape, self._device, self._pool)
        self._captured[shape] = captured
        return captured(items)

    def run_batch(self, items: Tensor, batches: Batches[Any]) -> Tensor:
        """Compute the outputs of one batch of `batches`, padded to its batch size.

        If a full batch does not fit the memory and there are fewer items, the batch size is halved for good.
        """
        while True:
            try:
                return self(items, batches.size)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self.clear()
                if batches.size <= len(items):
                    raise  # `batches` itself retries with fewer
            # Outside of the handler: its traceback would keep the tensors of the failed batch.
            batches.size = max(len(items), batches.size // 2)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def clear(self) -> None:
        """Drop all shapes, to free their memory."""
        self._drop_oldest(0)

    def _drop_oldest(self, max_shapes: int) -> None:
        while len(self._captured) > max_shapes:
            _, captured = self._captured.popitem(last=False)
            if captured.cuda_graph is not None:
                torch.cuda.synchronize(self._device)  # a graph must not be freed while it runs
