"""In which numbers the network computes; weights, gradients' sums, losses and optimisers are float32 throughout."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from facepipe.errors import ConfigError
from facepipe.training.trainer.ranks import Ranks

_TYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose(precision: str, device: torch.device) -> str:
    """`auto` as one of fp32, bf16, fp16. Raises ConfigError for fp16 on a CPU, which has no loss scaling."""
    if precision == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if precision == "fp16" and device.type != "cuda":
        raise ConfigError("run.precision fp16 needs a GPU: choose fp32 or bf16")
    return precision


class Precision:
    """Autocast, and the scaling of losses that float16's small range makes necessary."""

    def __init__(self, precision: str, device: torch.device):
        self.name = choose(precision, device)
        self._device, self._type = device.type, _TYPES[self.name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.name == "fp16")

    def autocast(self) -> AbstractContextManager[object]:
        """What the forward pass runs in."""
        return torch.autocast(self._device, self._type) if self._type else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss, scaled."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self, optimizer: optim.Optimizer, clip: float, gradients: "Gradients") -> None:
        """Clip and apply the gradients; where float16 overflowed, the step is left out and the scale halved."""
        if self.scaler.is_enabled():
            gradients.spread_overflow()  # before they are unscaled, which is when the scaler looks for overflows
        if clip:
            self.scaler.unscale_(optimizer)
            gradients.clip(clip)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Gradients:
    """All parameters with gradients: those that all ranks share, and those of which each has its own rows."""

    shared: list[nn.Parameter]
    own: list[nn.Parameter]
    ranks: Ranks

    def clip(self, limit: float) -> None:
        """Scale all gradients down together such that their norm, over all ranks, is at most the limit."""
        shared, own = (get_total_norm([p.grad for p in ps if p.grad is not None]) for ps in (self.shared, self.own))
        if self.ranks.world > 1 and self.own:
            square = own**2
            dist.all_reduce(square)
            own = square.sqrt()
        norm = torch.hypot(shared.to(self.ranks.device), own.to(self.ranks.device))
        clip_grads_with_norm_([*self.shared, *self.own], limit, norm)

    def spread_overflow(self) -> None:
        """Where a rank's own gradients have overflowed, all ranks must leave the step out."""
        if self.ranks.world == 1 or not self.own:
            return
        sums = torch.stack([p.grad.sum() for p in self.own if p.grad is not None]).sum()
        dist.all_reduce(sums)
        poison = sums * 0  # NaN where it is not finite
        first = next(p.grad for p in self.shared if p.grad is not None)
        assert first is not None
        first += poison
