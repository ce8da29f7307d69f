"""Embed chips on the device, in batches of one size; mirrored chips are made there too."""

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

# Bytes per pixel of a chip, for each byte of a number: what is in use at once in the widest place of a network.
# dlib's holds its input, the stem's output before and after the activation, and cuDNN's workspace, which is assumed to
# be as large again: 2 * (3 + 2 * 32 / 4).
_DLIB_NUMBERS = 40
# IResNet's first block is the widest of all: 64 planes at full size, in and out.
_WIDEST_NUMBERS = 400


class ChipEmbedder:
    """An embedder's network on a device."""

    def __init__(self, network: EmbedderNet, device: str, precision: str, flip: bool, max_batch: int):
        """Put a network on a device.

        Args:
            network: the network with its weights.
            device: cuda, cuda:N or cpu.
            precision: float32, bfloat16 or float16. A last linear layer stays in float32.
            flip: average the raw vectors of a chip and of its mirror image.
            max_batch: maximum number of chips per batch; fewer if memory is short.
        """
        self.size = network.size
        self._projection = network.projection
        self._flip = flip
        self._device = torch.device(device)
        self._dtype = DTYPES[precision]
        # The last linear layer stays in float32; find it by its name in the network.
        cast = cast_network(network.net, precision, _find_last_linear(network.net))
        self._net = to_channels_last(cast, device)
        self._mean = torch.tensor(network.input.mean, device=self._device).view(1, 3, 1, 1)
        self._scale = torch.tensor(network.input.scale, device=self._device).view(1, 3, 1, 1)
        self._is_bgr = network.input.channels == "bgr"
        self._graphs = CudaGraphCache(self.embed, self._device)
        # Plan the batch from the memory that the network leaves free.
        batch_size = plan_batch_size(measure_free_memory(device), self.estimate_chip_bytes(), max_batch)
        self.batches: Batches[Tensor] = Batches(batch_size)

    def estimate_chip_bytes(self) -> int:
        """Estimate the device memory that a chip of a batch takes, with its mirror image."""
        width, height = self.size
        numbers = _DLIB_NUMBERS if type(self._net).__name__ == "DlibResNet" else _WIDEST_NUMBERS
        chips = 2 if self._flip else 1
        return chips * width * height * numbers * self._dtype.itemsize

    def __call__(self, chips: Tensor) -> Tensor:
        """Embed chips in batches.

        Args:
            chips: RGB on the device, (n, h, w, 3) uint8, n >= 1.

        Returns:
            Raw vectors on the device, (n, d) float32.
        """
        return torch.cat(
            [vectors for _, vectors in self.batches(lambda part: self._embed_part(chips[part]), len(chips))]
        )

    def _embed_part(self, chips: Tensor) -> Tensor:
        # The next batch overwrites the output of the CUDA graph.
        return self._graphs.run_batch(chips, self.batches).clone()

    @torch.inference_mode()
    def embed(self, chips: Tensor) -> Tensor:
        """Embed one batch of chips (n, h, w, 3) as it is."""
        # Preprocess in float32, then go to the precision of the network.
        x = preprocess_with(chips, self._mean, self._scale, is_bgr=self._is_bgr).to(self._dtype)
        if not self._flip:
            return self._run_network(x)
        # Both views in one batch: the mirror image is the second half.
        vectors = self._run_network(torch.cat([x, x.flip(3)]))
        return (vectors[: len(chips)] + vectors[len(chips) :]) / 2

    def _run_network(self, x: Tensor) -> Tensor:
        vectors: Tensor = self._net(x.contiguous(memory_format=torch.channels_last)).float()
        return vectors

    def project(self, raw: Float32) -> Float32:
        """Project raw vectors (n, d) to 128 dimensions, if the model has a projection."""
        if self._projection is None:
            return raw
        # Row by row, as models.projection does it, so that the results are the same.
        return np.stack([row @ self._projection for row in raw])


def _find_last_linear(net: torch.nn.Module) -> tuple[str, ...]:
    """Find the name of the network's last layer if it is linear."""
    name, layer = list(net.named_modules())[-1]
    return (name,) if isinstance(layer, torch.nn.Linear) else ()
