"""Embedders run by ONNX Runtime, and by torch on any device.

ONNX Runtime gets 8 chips per call. The vector of a chip is then the same bit by bit whatever else is in the call
(measured with dlib's network and MobileFaceNet). On a CPU torch gets one chip per call for the same reason.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from facepipe.errors import ModelError
from facepipe.models.runtime.onnx_session import DeviceRun, open_session
from facepipe.models.runtime.preprocess import Input, preprocess_array, preprocess_with
from facepipe.models.runtime.torch_inference import limit_threads, to_channels_last
from facepipe.types import Float32, UInt8Image

if TYPE_CHECKING:
    from torch import Tensor, nn

_CHIPS_PER_RUN = 8
_MAX_DEVICE_BATCH = 128
# Names of the input and the output of the graphs that `facepipe models export` writes.
_EXPORTED_NAMES = ("chips", "vectors")
_UNCHANGED = Input("rgb", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


class OnnxDlib:
    """dlib's network on a CPU, as the graph that `facepipe.models.dlib.dlib_onnx` writes.

    Attributes:
        dim: Length of a vector.
        size: (width, height) of a chip.
    """

    dim = 128
    size = (150, 150)

    def __init__(self, graph: bytes, threads: int = 1):
        """Open the graph with a number of threads."""
        self._session = open_session(graph, threads=threads)

    def embed(self, chips: UInt8Image) -> Float32:
        """Embed chips; see `Embedder`."""
        return _embed_in_runs(self._run, chips, self.dim, _CHIPS_PER_RUN)

    def _run(self, chips: UInt8Image) -> Float32:
        return np.asarray(self._session.run(None, {"chips": chips})[0], np.float32)


class TorchEmbedder:
    """An embedding network on any torch device, in channels_last: whole batches on a GPU, chip by chip on a CPU.

    Attributes:
        size: (width, height) of a chip.
        dim: Length of a vector.
    """

    def __init__(
        self,
        net: "nn.Module",
        model_input: Input,
        size: tuple[int, int],
        *,
        device: str,
        threads: int = 1,
        batches_on_cpu: bool = False,
    ):
        """Move the network to the device and try it on one chip.

        Args:
            net: The network with its weights.
            model_input: Channel order, mean and scale.
            size: (width, height) of a chip.
            device: A torch device.
            threads: Chips that are embedded at a time on a CPU.
            batches_on_cpu: Make the batches of a GPU on a CPU too, to compare the two.

        Raises:
            ModelError: The network does not take chips of this size.
        """
        import torch

        self._device = torch.device(device)
        if self._device.type == "cpu":
            from facepipe.models.embedders.layers import fold_batch_norms

            net = fold_batch_norms(net)
        self._net = to_channels_last(net, device)
        self._threads = threads
        # A CPU gets one chip at a time, so that a vector does not depend on the batch.
        self._in_batches = batches_on_cpu or self._device.type != "cpu"
        self._mean = torch.tensor(model_input.mean, device=device).view(1, 3, 1, 1)
        self._scale = torch.tensor(model_input.scale, device=device).view(1, 3, 1, 1)
        self._is_bgr = model_input.channels == "bgr"
        self.size = size
        self.configure("float32", _MAX_DEVICE_BATCH)
        self.dim = self._measure_dim()

    def configure(self, precision: str, max_batch: int) -> None:
        """Choose precision and batches; see `RunsOnDevice`. A last linear layer stays in float32."""
        from facepipe.models.runtime.device_batches import DeviceBatches
        from facepipe.models.runtime.precision import DTYPES, cast_network, set_float32_products

        set_float32_products(precision)
        cast_network(self._net, precision, _find_last_linear(self._net))
        self._dtype = DTYPES[precision]
        self._batches = DeviceBatches(self._predict, self._device, max_batch if self._in_batches else 1)

    def embed(self, chips: UInt8Image) -> Float32:
        """Embed chips; see `Embedder`."""
        if self._device.type != "cpu":
            return self._run(chips)
        # The threads share out chips, not the layers of one. Threads that share a layer of a millisecond mostly wait,
        # and waiting burns CPU: nine times as much per chip on two busy cores. One thread per chip also gives the same
        # vectors on any number of threads.
        with limit_threads(1):
            count = min(self._threads, len(chips))
            if self._in_batches or count <= 1:
                return self._run(chips)
            with ThreadPoolExecutor(count, "embed", initializer=_use_one_thread) as pool:
                return np.concatenate(list(pool.map(self._run, np.array_split(chips, count))))

    def _measure_dim(self) -> int:
        width, height = self.size
        try:
            return int(self._run(np.zeros((1, height, width, 3), np.uint8)).shape[1])
        except RuntimeError as error:
            raise ModelError(f"the network does not take chips of {self.size}: {str(error)[:300]}") from error

    def _run(self, chips: UInt8Image) -> Float32:
        if not len(chips):
            return np.empty((0, self.dim), np.float32)
        width, height = self.size
        outputs = self._batches.run(list(chips), [(height, width)] * len(chips))
        return np.stack([vector for (vector,) in outputs])

    def _predict(self, chips: "Tensor") -> "tuple[Tensor, ...]":
        """Compute the raw vectors of chips (n, h, w, 3) uint8 on the device."""
        import torch

        planes = preprocess_with(chips, self._mean, self._scale, is_bgr=self._is_bgr).to(self._dtype)
        return (self._net(planes.contiguous(memory_format=torch.channels_last)).float(),)


def _use_one_thread() -> None:
    """Let torch use one thread for what the calling thread computes."""
    import torch

    torch.set_num_threads(1)


def _find_last_linear(net: "nn.Module") -> tuple[str, ...]:
    """Find the name of the network's last layer if it is linear."""
    from torch import nn

    name, layer = list(net.named_modules())[-1]
    return (name,) if isinstance(layer, nn.Linear) else ()


class OnnxEmbedder:
    """The ONNX graph of any embedder: one image input, one output of vectors.

    A float input gets preprocessed chips, as (n, 3, h, w) or (n, h, w, 3), whichever its dimensions say. A uint8 input
    gets the chips (n, h, w, 3) unchanged: the graph preprocesses them itself.

    Attributes:
        size: (width, height) of a chip.
        dim: Length of a vector.
    """

    def __init__(
        self, graph: bytes, model_input: Input, size: tuple[int, int], *, device: str = "cpu", threads: int = 1
    ):
        """Open the graph and try it on empty chips.

        Args:
            graph: The serialised ONNX model.
            model_input: What the network inside the graph takes. For a uint8 input that is not one of our own exports
                it must be RGB, mean 0, scale 1, because nothing else can be done to whole levels.
            size: (width, height) of a chip.
            device: "cpu", "cuda" or "cuda:N".
            threads: Threads of ONNX Runtime.

        Raises:
            ModelError: The graph is not one of an embedder, or does not take chips of this size.
        """
        self._session = open_session(graph, threads=threads, device=device)
        self._model_input = model_input
        self.size = size
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4:
            raise ModelError(f"an embedder's graph has one input of four dimensions, this one {_format_inputs(inputs)}")
        self._input_name = inputs[0].name
        self._output_name = self._session.get_outputs()[0].name
        # Type and dimensions of the input tell what the graph takes; a free batch size is a string there.
        self._takes_uint8 = inputs[0].type == "tensor(uint8)"
        self._has_channels_last = inputs[0].shape[3] == 3
        self._has_fixed_batch = isinstance(inputs[0].shape[0], int)
        # A GPU needs real batches; there vectors may depend on them, within the rounding of single precision.
        free_batch_size = _CHIPS_PER_RUN if device == "cpu" else _MAX_DEVICE_BATCH
        self._batch_size = inputs[0].shape[0] if self._has_fixed_batch else free_batch_size
        self._device_run = None if device == "cpu" else DeviceRun(self._session, device)
        is_exported = (self._input_name, self._output_name) == _EXPORTED_NAMES
        if self._takes_uint8 and not is_exported and model_input != _UNCHANGED:
            raise ModelError(
                f"the graph takes uint8 chips unchanged, but its TOML file asks for {model_input}: set channels = "
                '"rgb", mean = 0, scale = 1 there, or use a graph with a float input'
            )
        # Empty chips give the length of the vectors, and show that the graph takes chips of this size.
        width, height = size
        self.dim = int(self._run(np.zeros((self._batch_size, height, width, 3), np.uint8)).shape[1])

    def embed(self, chips: UInt8Image) -> Float32:
        """Embed chips; see `Embedder`."""
        return _embed_in_runs(self._run_padded, chips, self.dim, self._batch_size)

    def _run_padded(self, chips: UInt8Image) -> Float32:
        """Embed at most one batch; a graph of a fixed batch size gets a full one, padded with the last chip."""
        missing = self._batch_size - len(chips) if self._has_fixed_batch else 0
        padded = np.concatenate([chips, np.repeat(chips[-1:], missing, 0)]) if missing else chips
        return self._run(padded)[: len(chips)]

    def _run(self, chips: UInt8Image) -> Float32:
        pixels = np.ascontiguousarray(chips) if self._takes_uint8 else self._preprocess(chips)
        try:
            if self._device_run is not None:
                outputs = [self._device_run(self._input_name, pixels, self._output_name)]
            else:
                outputs = self._session.run([self._output_name], {self._input_name: pixels})
        except Exception as error:  # ONNX Runtime's own exceptions share no base class but Exception
            raise ModelError(f"the graph does not take chips of {self.size}: {str(error)[:300]}") from error
        vectors = np.asarray(outputs[0], np.float32)
        if vectors.size % len(chips):
            raise ModelError(f"the graph's first output has shape {vectors.shape} for {len(chips)} chips")
        return vectors.reshape(len(chips), -1)

    def _preprocess(self, chips: UInt8Image) -> Float32:
        pixels = preprocess_array(chips, self._model_input)
        return np.ascontiguousarray(pixels if self._has_channels_last else pixels.transpose(0, 3, 1, 2), np.float32)


def _embed_in_runs(run: Callable[[UInt8Image], Float32], chips: UInt8Image, dim: int, chips_per_run: int) -> Float32:
    vectors = [run(chips[start : start + chips_per_run]) for start in range(0, len(chips), chips_per_run)]
    return np.concatenate(vectors) if vectors else np.empty((0, dim), np.float32)


def _format_inputs(inputs: Any) -> str:
    return ", ".join(f"{i.name} {i.shape}" for i in inputs) or "none"
