"""The engines that run the models: ONNX Runtime for graphs (on CPUs faster than torch), torch for modules and on CUDA.

On a CPU detectors and torch modules compute image by image: with one thread a batch is no faster, and what comes out
then cannot depend on what else was in the batch. Embedders' graphs run on 8 chips at a time, where a chip's vector is
the same bit by bit whatever is beside it (measured with dlib's network and MobileFaceNet).
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from facepipe.errors import ModelError
from facepipe.models.detectors import retinaface_decode as decoding
from facepipe.models.protocols import Faces
from facepipe.models.runtime.preprocess import Input
from facepipe.types import Float32, UInt8Image

if TYPE_CHECKING:
    from torch import nn

    from facepipe.models.detectors.retinaface import Channels, RetinaFaceNet

_CHIPS_PER_RUN = 8
_EXPORTED = ("chips", "vectors")
_AS_THEY_ARE = Input("rgb", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def open_session(graph: bytes, threads: int, device: str = "cpu", as_written: bool = False) -> Any:
    """An ONNX Runtime session with a fixed number of threads. Raises ModelError for what is no graph, and where a GPU
    is asked for that this ONNX Runtime cannot use: falling back to the CPU unsaid is what nobody wants.

    as_written: no node is fused with another or computed otherwise than the graph says; slow
    """
    import onnxruntime as ort

    provider = "CPUExecutionProvider" if device == "cpu" else "CUDAExecutionProvider"
    number = device.partition(":")[2]
    if provider not in ort.get_available_providers():
        raise ModelError(
            "this onnxruntime has no CUDA: pip install onnxruntime-gpu in its place, or run the model with device=cpu"
        )

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if as_written:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        made = ort.InferenceSession(graph, options, providers=[(provider, {"device_id": number} if number else {})])
    except Exception as error:  # ONNX Runtime's own exceptions derive from nothing else
        raise ModelError(f"ONNX Runtime cannot load the graph: {str(error)[:300]}") from error
    if provider not in made.get_providers():
        raise ModelError(
            f"ONNX Runtime could not start {provider} and would run on the CPU: are its CUDA and cuDNN the ones that "
            "this onnxruntime-gpu was built with?"
        )
    return made


def to_channels_last(net: "nn.Module", device: str) -> "nn.Module":
    """The network on a device, in inference mode, with its convolutions' weights in channels_last."""
    import torch

    on_device: nn.Module = net.eval().to(device)
    return on_device.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class OnnxRetinaFace:
    """RetinaFace on a CPU. `limits`: lowest score, highest overlap kept; `channels`: the order it was trained on."""

    stride = 32

    def __init__(self, graph: bytes, limits: tuple[float, float], threads: int = 1, channels: "Channels" = "bgr"):
        self._session = open_session(graph, threads)
        self._limits, self._order = limits, 1 if channels == "bgr" else -1

    def detect(self, images: UInt8Image) -> list[Faces]:
        return [decoding.decode_faces(*self._run(image), image.shape[:2], self._limits) for image in images]

    def detect_confident(self, images: UInt8Image, doubtful: float, sure: float) -> list[Faces | None]:
        limits = (doubtful, sure, self._limits[1])
        return [decoding.decode_confident_faces(self._run(image), image.shape[:2], limits) for image in images]

    def _run(self, image: UInt8Image) -> decoding.RetinaFaceOutputs:
        # The means go by a channel's place in the input, not by its colour: turned round, RGB stands where BGR did.
        planes = decoding.to_bgr_planes(image[None, ..., :: self._order])
        offsets, scores, points = self._session.run(None, {"input": planes})
        return decoding.RetinaFaceOutputs(offsets[0], scores[0, :, 1], points[0])


class TorchRetinaFace:
    """RetinaFace on any torch device, in channels_last: whole batches at once on a GPU, image by image on a CPU.

    channels: the order in which the network was trained to get them
    """

    stride = 32

    def __init__(self, net: "RetinaFaceNet", limits: tuple[float, float], device: str, channels: "Channels" = "bgr"):
        import torch

        from facepipe.models.detectors.retinaface import fold_batch_norms

        self._net = to_channels_last(fold_batch_norms(net), device)
        self._device, self._limits, self._channels = torch.device(device), limits, channels

    def detect(self, images: UInt8Image) -> list[Faces]:
        return [decoding.decode_faces(*out, images.shape[1:3], self._limits) for out in self._outputs(images)]

    def detect_confident(self, images: UInt8Image, doubtful: float, sure: float) -> list[Faces | None]:
        limits = (doubtful, sure, self._limits[1])
        return [decoding.decode_confident_faces(out, images.shape[1:3], limits) for out in self._outputs(images)]

    def _outputs(self, images: UInt8Image) -> Iterator[decoding.RetinaFaceOutputs]:
        part = 1 if self._device.type == "cpu" else max(1, len(images))
        for at in range(0, len(images), part):
            yield from self._batch(images[at : at + part])

    def _batch(self, images: UInt8Image) -> list[decoding.RetinaFaceOutputs]:
        import torch

        from facepipe.models.detectors.retinaface import normalise_pixels

        with torch.inference_mode():
            x = normalise_pixels(torch.from_numpy(images).to(self._device, non_blocking=True), self._channels)
            offsets, scores, points = (out.float().cpu().numpy() for out in self._net(x))
        return [decoding.RetinaFaceOutputs(*one) for one in zip(offsets, scores, points, strict=True)]


class OnnxDlib:
    """dlib's network on a CPU, as the graph that models/dlib/dlib_onnx.py writes."""

    dim, size = 128, (150, 150)

    def __init__(self, graph: bytes, threads: int = 1):
        self._session = open_session(graph, threads)

    def embed(self, chips: UInt8Image) -> Float32:
        return _in_parts(self._run, chips, self.dim)

    def _run(self, chips: UInt8Image) -> Float32:
        return np.asarray(self._session.run(None, {"chips": chips})[0], np.float32)


class TorchEmbedder:
    """An embedding network on any torch device; chips in, channels_last inside.

    On a CPU chips go one by one: what comes out then cannot depend on what else was in the batch.
    Raises ModelError for a size that the network does not take.
    """

    def __init__(self, net: "nn.Module", fed: Input, size: tuple[int, int], device: str, threads: int = 1):
        import torch

        self._net, self._threads = to_channels_last(net, device), threads
        self._device, self._fed = torch.device(device), fed
        mean, scale = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (fed.mean, fed.scale))
        self._mean, self._scale = mean, scale
        self.size = size
        self.dim = self._probed()

    def embed(self, chips: UInt8Image) -> Float32:
        if self._device.type != "cpu":
            return self._run(chips)
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            return _in_parts(self._run, chips, self.dim, 1)
        finally:
            torch.set_num_threads(before)

    def _probed(self) -> int:
        """Length of the vectors. Raises ModelError where the network does not take chips of this size."""
        import torch

        width, height = self.size
        try:
            with torch.inference_mode():
                return int(self._net(torch.zeros(1, 3, height, width, device=self._device)).shape[1])
        except RuntimeError as error:
            raise ModelError(f"the network does not take chips of {self.size}: {str(error)[:300]}") from error

    def _run(self, chips: UInt8Image) -> Float32:
        import torch

        with torch.inference_mode():
            x = torch.from_numpy(np.ascontiguousarray(chips)).to(self._device, non_blocking=True)
            x = x.permute(0, 3, 1, 2).float()
            x = (x.flip(1) if self._fed.channels == "bgr" else x).sub(self._mean).div(self._scale)
            return np.asarray(self._net(x.contiguous(memory_format=torch.channels_last)).float().cpu().numpy())


class OnnxEmbedder:
    """Any embedder's ONNX graph: one image input, one output of vectors.

    A float input is fed what `fed` says, in the order of its dimensions (n, 3, h, w) or (n, h, w, 3); a uint8 one chips
    (n, h, w, 3) as they are. Of our own exports (`chips` to `vectors`) `fed` says what the network inside is fed. Of
    other uint8 graphs it has to be RGB, mean 0, scale 1, since nothing else can be done to whole levels.
    Raises ModelError for other graphs.
    """

    def __init__(self, graph: bytes, fed: Input, size: tuple[int, int], device: str = "cpu", threads: int = 1):
        self._session = open_session(graph, threads, device)
        self._fed, self.size = fed, size
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4:
            raise ModelError(f"an embedder's graph has one input of four dimensions, this one {_named(inputs)}")
        self._input = inputs[0].name
        self._raw = inputs[0].type == "tensor(uint8)"
        self._planes_last = inputs[0].shape[3] == 3
        self._fixed = isinstance(inputs[0].shape[0], int)
        self._part = inputs[0].shape[0] if self._fixed else _CHIPS_PER_RUN
        self._output = self._session.get_outputs()[0].name
        if self._raw and (self._input, self._output) != _EXPORTED and fed != _AS_THEY_ARE:
            raise ModelError(
                f"the graph takes uint8 chips as they are, and was to be fed {fed}: in its TOML file say channels = "
                '"rgb", mean = 0, scale = 1, or take a graph whose input is float'
            )
        width, height = size
        self.dim = int(self._run(np.zeros((self._part, height, width, 3), np.uint8)).shape[1])

    def embed(self, chips: UInt8Image) -> Float32:
        return _in_parts(self._padded, chips, self.dim, self._part)

    def _padded(self, chips: UInt8Image) -> Float32:
        """A graph of a fixed batch gets a full one; the others run as many as there are."""
        lacking = self._part - len(chips) if self._fixed else 0
        full = np.concatenate([chips, np.repeat(chips[-1:], lacking, 0)]) if lacking else chips
        return self._run(full)[: len(chips)]

    def _run(self, chips: UInt8Image) -> Float32:
        fed = np.ascontiguousarray(chips) if self._raw else self._scaled(chips)
        try:
            vectors = np.asarray(self._session.run([self._output], {self._input: fed})[0], np.float32)
        except Exception as error:  # ONNX Runtime's own exceptions derive from nothing else
            raise ModelError(f"the graph does not take chips of {self.size}: {str(error)[:300]}") from error
        if vectors.size % len(chips):
            raise ModelError(f"the graph's first output has shape {vectors.shape} for {len(chips)} chips")
        return vectors.reshape(len(chips), -1)

    def _scaled(self, chips: UInt8Image) -> Float32:
        ordered = chips[..., ::-1] if self._fed.channels == "bgr" else chips
        mean, scale = (np.array(v, np.float32) for v in (self._fed.mean, self._fed.scale))
        x = (ordered.astype(np.float32) - mean) / scale
        return np.ascontiguousarray(x if self._planes_last else x.transpose(0, 3, 1, 2), np.float32)


def _in_parts(run: Callable[[UInt8Image], Float32], chips: UInt8Image, dim: int, part: int = _CHIPS_PER_RUN) -> Float32:
    vectors = [run(chips[at : at + part]) for at in range(0, len(chips), part)]
    return np.concatenate(vectors) if vectors else np.empty((0, dim), np.float32)


def _named(inputs: Any) -> str:
    return ", ".join(f"{i.name} {i.shape}" for i in inputs) or "none"
