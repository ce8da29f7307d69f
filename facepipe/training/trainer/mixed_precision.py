"""Mixed precision: the network may compute in 16 bits.

Weights, sums of gradients, losses and optimisers stay in float32.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from facepipe.errors import ConfigError
from facepipe.models.runtime.precision import set_float32_products
from facepipe.training.trainer.ranks import Ranks

_TYPES = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(precision: str, device: torch.device) -> str:
    """Resolve `auto` to fp32, bf16 or fp16. fp32 is IEEE on GPUs too, and tf32 what their tensor cores make of it.

    Raises:
        ConfigError: The precision is fp16 on a CPU, which has no loss scaling.
    """
    if precision == "auto":
        on_gpu = device.type == "cuda"
        return "bf16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if precision == "fp16" and device.type != "cuda":
        raise ConfigError("run.precision=fp16 needs a GPU: choose fp32 or bf16")
    return precision


class MixedPrecision:
    """Autocast, and the loss scaling that float16 needs because of its small range."""

    def __init__(self, precision: str, device: torch.device):
        self.name = choose_precision(precision, device)
        self._device = device.type
        self._type = _TYPES[self.name]
        set_float32_products(self.name)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.name == "fp16")

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context for the forward pass."""
        return torch.autocast(self._device, self._type) if self._type else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of the scaled loss."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self, optimizer: optim.Optimizer, clip: float, gradients: "Gradients") -> None:
        """Clip and apply the gradients, and clear them.

        If float16 overflowed, no weight changes and the scale is halved.
        """
        if self.scaler.is_enabled():
            # Before unscaling, which is when the scaler looks for overflows.
            gradients.spread_overflow()
        # The limit is for the real size of the gradients, so they are unscaled before they are clipped.
        if clip:
            self.scaler.unscale_(optimizer)
            gradients.clip(clip)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Gradients:
    """All parameters with gradients.

    Attributes:
        shared: parameters that all ranks hold.
        own: parameters of which each rank holds its own rows.
        ranks: the processes of the training.
    """

    shared: list[nn.Parameter]
    own: list[nn.Parameter]
    ranks: Ranks

    def clip(self, limit: float) -> None:
        """Scale all gradients down together, so that their norm over all ranks is at most the limit."""
        # Norms of shared gradients are the same on all ranks; squares of own ones are added up.
        shared_norm = _measure_norm(self.shared)
        own_norm = _measure_norm(self.own)
        if self.ranks.world > 1 and self.own:
            square = own_norm**2
            dist.all_reduce(square)
            own_norm = square.sqrt()
        norm = torch.hypot(shared_norm.to(self.ranks.device), own_norm.to(self.ranks.device))
        clip_grads_with_norm_([*self.shared, *self.own], limit, norm)

    def spread_overflow(self) -> None:
        """Make all ranks skip the step if the own gradients of one rank overflowed."""
        if self.ranks.world == 1 or not self.own:
            return
        sums = torch.stack([p.grad.sum() for p in self.own if p.grad is not None]).sum()
        dist.all_reduce(sums)
        nan_or_zero = sums * 0  # NaN if the sum is not finite
        shared_gradient = next(p.grad for p in self.shared if p.grad is not None)
        assert shared_gradient is not None
        shared_gradient += nan_or_zero


def _measure_norm(parameters: list[nn.Parameter]) -> Tensor:
    return get_total_norm([p.grad for p in parameters if p.grad is not None])
