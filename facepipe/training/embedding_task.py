"""Training of an embedder: chips and their labels, an objective over embeddings, verification of pairs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from facepipe.models.runtime.preprocess import Input
from facepipe.training.data.augment import AugmentConfig, augment_chip
from facepipe.training.trainer.task import Batch
from facepipe.types import Float32, Int64, UInt8Image

EmbedChips = Callable[[UInt8Image], Float32]


class LabelledChips(Protocol):
    """What is needed of a chip set: labels (n,) int64, and chips (h, w, 3) uint8 RGB by row."""

    @property
    def labels(self) -> Int64: ...

    def load_chip(self, row: int) -> UInt8Image: ...


class RowSampler(Protocol):
    """Which rows of the chips make up a batch: see `Sampler`."""

    @property
    def steps_per_epoch(self) -> int: ...

    def draw_rows(self, step: int, rank: int = 0, world: int = 1) -> Int64: ...


S = TypeVar("S", bound=RowSampler, covariant=True)


def _skip_verification(embed: EmbedChips) -> dict[str, float]:
    return {}


@dataclass(frozen=True)
class Examples(Generic[S]):
    """What an embedder is trained on and judged by.

    chips: a training set with labels from 0 without gaps; verify: figures of an embedding function, with `score`
    """

    chips: LabelledChips
    sampler: S
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    verify: Callable[[EmbedChips], dict[str, float]] = _skip_verification


class EmbeddingTask:
    """A `Task`: a batch is chips (n, h, w, 3) uint8 RGB and labels (n,) int64."""

    def __init__(self, net: nn.Module, objective: nn.Module, examples: Examples[RowSampler], fed: Input, seed: int = 0):
        self.net, self.objective, self._examples = net, objective, examples
        self._fed, self._seed = fed, seed
        self.steps_per_epoch = examples.sampler.steps_per_epoch

    def make_batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Rank's rows of the step, each varied by random numbers of its own place in the whole batch."""
        rows = self._examples.sampler.draw_rows(step, rank, world)
        first = rank * len(rows)
        chips = [self._augment_row(int(row), step, first + n) for n, row in enumerate(rows)]
        return torch.from_numpy(np.stack(chips)), torch.from_numpy(self._examples.chips.labels[rows].copy())

    def _augment_row(self, row: int, step: int, place: int) -> UInt8Image:
        rng = np.random.default_rng((self._seed, step, place))
        return augment_chip(self._examples.chips.load_chip(row), self._examples.augment, rng)

    def compute_loss(self, inputs: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective of the batch, in float32 whatever the network computes in."""
        chips, labels = inputs
        embeddings = self.net(fed(chips, self._fed))
        with torch.autocast(chips.device.type, enabled=False):
            loss = self.objective(embeddings.float(), labels)
        figures: Any = getattr(self.objective, "figures", {})
        return loss, dict(figures)

    def validate(self, net: nn.Module) -> dict[str, float]:
        """Verification of pairs with the network's raw embeddings."""
        device = next(net.parameters()).device
        return self._examples.verify(lambda chips: embed_chips(net, chips, self._fed, device))


def fed(chips: Tensor, given: Input) -> Tensor:
    """Chips (n, h, w, 3) uint8 RGB as a network wants them: (n, 3, h, w) float32, (x - mean) / scale."""
    x = chips.permute(0, 3, 1, 2).float()
    mean, scale = (torch.tensor(v, device=chips.device).view(1, 3, 1, 1) for v in (given.mean, given.scale))
    return (x.flip(1) if given.channels == "bgr" else x).sub(mean).div(scale)


def embed_chips(net: nn.Module, chips: UInt8Image, given: Input, device: torch.device) -> Float32:
    """Embeddings (n, dim) float32 of chips (n, h, w, 3), not normalised."""
    with torch.inference_mode():
        pixels = torch.from_numpy(np.ascontiguousarray(chips)).to(device)
        return np.asarray(net(fed(pixels, given)).float().cpu().numpy())
