"""What has come up since the last line of the metrics; kept on the device, so that steps need not wait for it."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from facepipe.training.trainer.ranks import Ranks


class Window:
    """Sums over steps."""

    def __init__(self, device: torch.device):
        self._bad = torch.full((), math.inf, dtype=torch.float64, device=device)
        self._clear()

    def _clear(self) -> None:
        self._sums, self._steps, self._images = dict[str, Tensor](), 0, 0
        self._since, self._pause = time.monotonic(), 0.0

    def add(self, step: int, loss: Tensor, images: int, figures: dict[str, Tensor]) -> None:
        """Count a step: its loss, its images over all ranks, and the loss's figures."""
        self._bad = torch.where(torch.isfinite(loss), self._bad, self._bad.clamp(max=step))
        for name, value in {"": loss, **figures}.items():
            found = value.detach().double()
            self._sums[name] = self._sums[name] + found if name in self._sums else found
        self._steps, self._images = self._steps + 1, self._images + images

    def first_bad(self) -> float:
        """The first step of this attempt whose loss was not finite; infinity if there was none."""
        return float(self._bad)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count as training."""
        began = time.monotonic()
        yield
        self._pause += time.monotonic() - began

    def close(self, ranks: Ranks) -> tuple[float, dict[str, float], float]:
        """(mean loss, mean figures, images a second); begins the next window."""
        ranks.mean(self._sums.values())
        means = {name: float(value) / max(1, self._steps) for name, value in self._sums.items()}
        speed = self._images / max(1e-9, time.monotonic() - self._since - self._pause)
        self._clear()
        return means.pop("", math.nan), means, speed
