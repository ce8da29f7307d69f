"""Chips on the device to raw vectors, in batches of one size; the mirrored chips are made there as well."""

import numpy as np
import torch
from torch import Tensor

from facepipe.models.runtime.batches import Batches, measure_free_memory, plan_batch_size
from facepipe.models.runtime.cuda_graphs import CudaGraphCache
from facepipe.models.runtime.precision import DTYPES, cast_network
from facepipe.models.runtime.preprocess import preprocess_with
from facepipe.models.runtime.torch_inference import to_channels_last
from facepipe.models.zoo.networks import EmbedderNet
from facepipe.types import Float32

# Bytes of a pixel of a chip, for each byte of a number: what is live at once in the widest place of the networks here.
# dlib's holds its input, the stem's output before and after the activation, and cuDNN's workspace, which is taken to be
# as much again: 2 * (3 + 2 * 32 / 4). IResNet's first block is the widest of all: 64 planes at full size, in and out.
_PER_PIXEL = {"dlib": 40}
_WIDEST = 400


class ChipEmbedder:
    """An embedder's network on a device.

    flip: the raw vectors of a chip and of its mirror image are averaged
    most: chips of a batch, where the device has the memory
    """

    def __init__(self, network: EmbedderNet, device: str, precision: str, flip: bool, max_batch: int):
        self.size, self._matrix, self._flip = network.size, network.projection, flip
        self._device, self._dtype = torch.device(device), DTYPES[precision]
        self._net = to_channels_last(cast_network(network.net, precision, _exact(network.net)), device)
        mean, scale = (
            torch.tensor(v, device=self._device).view(1, 3, 1, 1) for v in (network.input.mean, network.input.scale)
        )
        self._mean, self._scale, self._swapped = mean, scale, network.input.channels == "bgr"
        self._buckets = CudaGraphCache(self.embed, self._device)
        self.batches: Batches[Tensor] = Batches(
            plan_batch_size(measure_free_memory(device), self.estimate_chip_bytes(), max_batch)
        )

    def estimate_chip_bytes(self) -> int:
        """Device memory that a chip of a batch takes, with its mirror image."""
        width, height = self.size
        planes = _PER_PIXEL["dlib"] if type(self._net).__name__ == "DlibResNet" else _WIDEST
        return (2 if self._flip else 1) * width * height * planes * self._dtype.itemsize

    def __call__(self, chips: Tensor) -> Tensor:
        """(n, h, w, 3) uint8 RGB on the device -> raw vectors (n, d) float32 on the device; n is 1 or more."""
        parts = [vectors for _, vectors in self.batches(lambda part: self._batch(chips[part]), len(chips))]
        return torch.cat(parts)

    def _batch(self, chips: Tensor) -> Tensor:
        return self._buckets.run_batch(chips, self.batches).clone()  # the next batch overwrites the bucket's output

    @torch.inference_mode()
    def embed(self, chips: Tensor) -> Tensor:
        """One batch, as it is."""
        x = preprocess_with(chips, self._mean, self._scale, is_bgr=self._swapped).to(self._dtype)
        both = torch.cat([x, x.flip(3)]) if self._flip else x
        vectors: Tensor = self._net(both.contiguous(memory_format=torch.channels_last)).float()
        return (vectors[: len(chips)] + vectors[len(chips) :]) / 2 if self._flip else vectors

    def project(self, raw: Float32) -> Float32:
        """Vectors (n, d) as they came from the device, brought to 128 dimensions where the model has a projection."""
        if self._matrix is None:
            return raw
        return np.stack([row @ self._matrix for row in raw])  # as models.projection: row by row


def _exact(net: torch.nn.Module) -> tuple[str, ...]:
    """The last linear layer, where it is the network's last word."""
    last = list(net.named_modules())[-1]
    return (last[0],) if isinstance(last[1], torch.nn.Linear) else ()
