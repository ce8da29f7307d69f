"""Means over the steps since the last line of the metrics. Sums stay on the device, so that steps need not wait."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from facepipe.training.trainer.ranks import Ranks


@dataclass(frozen=True)
class WindowMeans:
    """Means over the steps of one window.

    Attributes:
        loss: mean loss; None if the window has no steps.
        figures: mean of each of the loss's figures, by name.
        images_per_second: throughput of all ranks, without pauses.
    """

    loss: float | None
    figures: dict[str, float]
    images_per_second: float


class RunningMeans:
    """Sums of losses, figures and images over a window of steps."""

    def __init__(self, device: torch.device):
        self._first_bad_step = torch.full((), math.inf, dtype=torch.float64, device=device)
        self._reset()

    def _reset(self) -> None:
        self._loss_sum: Tensor | None = None
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._images = 0
        self._began = time.monotonic()
        self._paused_s = 0.0

    def add(self, step: int, loss: Tensor, images: int, figures: dict[str, Tensor]) -> None:
        """Add one step.

        Args:
            step: number of the step.
            loss: scalar.
            images: images of the step over all ranks.
            figures: the loss's figures by name, scalars.
        """
        # Only the first bad step counts, so later ones do not replace it.
        bad = self._first_bad_step
        self._first_bad_step = torch.where(torch.isfinite(loss), bad, bad.clamp(max=step))
        loss = loss.detach().double()
        self._loss_sum = loss if self._loss_sum is None else self._loss_sum + loss
        for name, figure in figures.items():
            value = figure.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += 1
        self._images += images

    def find_first_bad_step(self) -> float:
        """Return the first step since the start of this process whose loss was not finite, or infinity."""
        return float(self._first_bad_step)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time inside from the throughput."""
        began = time.monotonic()
        yield
        self._paused_s += time.monotonic() - began

    def finish_window(self, ranks: Ranks) -> WindowMeans:
        """Return the means of this window over all ranks, and begin the next one."""
        # The loss is averaged under the empty name, which no figure has.
        sums = {} if self._loss_sum is None else {"": self._loss_sum}
        sums |= self._sums
        ranks.average(sums.values())
        means = {name: float(value) / max(1, self._steps) for name, value in sums.items()}
        seconds = time.monotonic() - self._began - self._paused_s
        speed = self._images / max(1e-9, seconds)
        self._reset()
        return WindowMeans(means.pop("", None), means, speed)
