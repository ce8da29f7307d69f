"""The engines that run the default models: ONNX Runtime on CPUs (measured faster there than torch), torch on CUDA.

An engine on a CPU computes image by image: with one thread a batch is no faster, and what comes out then cannot
depend on what else was in the batch.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from facepipe.models.detectors import retinaface_decode as decoding
from facepipe.models.protocols import Faces, Floats, Pixels

if TYPE_CHECKING:
    from torch import nn

_CHIPS_PER_RUN = 8


def session(graph: bytes, threads: int) -> Any:
    """An ONNX Runtime session on CPU with a fixed number of threads."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def channels_last(net: "nn.Module", device: str) -> "nn.Module":
    """The network on a device, in inference mode, with its convolutions' weights in channels_last."""
    import torch

    on_device: nn.Module = net.eval().to(device)
    return on_device.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class OnnxRetinaFace:
    """RetinaFace on a CPU. `limits`: lowest score, highest overlap kept."""

    stride = 32

    def __init__(self, graph: bytes, limits: tuple[float, float], threads: int = 1):
        self._session = session(graph, threads)
        self._limits = limits

    def detect(self, images: Pixels) -> list[Faces]:
        return [self._one(image) for image in images]

    def _one(self, image: Pixels) -> Faces:
        loc, conf, points = self._session.run(None, {"input": decoding.preprocess(image[None])})
        return decoding.postprocess(loc[0], conf[0, :, 1], points[0], image.shape[:2], self._limits)


class TorchRetinaFace:
    """RetinaFace on any torch device; whole batches at once, in channels_last."""

    stride = 32

    def __init__(self, net: "nn.Module", limits: tuple[float, float], device: str):
        import torch

        self._net = channels_last(net, device)
        self._device, self._limits = torch.device(device), limits
        self._mean = torch.tensor(decoding.MEAN_BGR[::-1], device=device).view(1, 3, 1, 1)

    def detect(self, images: Pixels) -> list[Faces]:
        import torch

        with torch.inference_mode():
            x = torch.from_numpy(images).to(self._device, non_blocking=True).permute(0, 3, 1, 2).float()
            x = (x - self._mean).flip(1).contiguous(memory_format=torch.channels_last)
            offsets, scores, points = (out.float().cpu().numpy() for out in self._net(x))
        shape = images.shape[1:3]
        return [
            decoding.postprocess(o, s, p, shape, self._limits) for o, s, p in zip(offsets, scores, points, strict=True)
        ]


class OnnxDlib:
    """dlib's network on a CPU."""

    def __init__(self, graph: bytes, size: tuple[int, int], template: npt.NDArray[np.float64], threads: int = 1):
        self._session = session(graph, threads)
        self.size, self.template, self.dim = size, template, 128

    def embed(self, chips: Pixels) -> Floats:
        parts = [
            self._session.run(None, {"chips": chips[start : start + _CHIPS_PER_RUN]})[0]
            for start in range(0, len(chips), _CHIPS_PER_RUN)
        ]
        return np.concatenate(parts) if parts else np.empty((0, self.dim), np.float32)


class TorchEmbedder:
    """An embedding network on any torch device; chips in, channels_last inside."""

    def __init__(self, net: "nn.Module", size: tuple[int, int], template: npt.NDArray[np.float64], device: str):
        import torch

        self._net = channels_last(net, device)
        self._device = torch.device(device)
        self.size, self.template, self.dim = size, template, 128

    def embed(self, chips: Pixels) -> Floats:
        import torch

        with torch.inference_mode():
            x = torch.from_numpy(np.ascontiguousarray(chips)).to(self._device, non_blocking=True)
            x = x.permute(0, 3, 1, 2).float().contiguous(memory_format=torch.channels_last)
            return np.asarray(self._net(x).float().cpu().numpy(), np.float32)
