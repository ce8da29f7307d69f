"""The training of an embedder: labelled chips, a loss over embeddings, and verification of pairs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from facepipe.models.runtime.preprocess import Input, preprocess
from facepipe.training.data.augment import AugmentConfig, augment_chip
from facepipe.training.trainer.task import Batch
from facepipe.types import Float32, Int64, UInt8Image

EmbedChips = Callable[[UInt8Image], Float32]  # chips (n, h, w, 3) uint8 RGB -> raw vectors (n, dim)


class LabelledChips(Protocol):
    """The part of a chip set that training needs."""

    @property
    def labels(self) -> Int64:
        """Label of each row, (n,)."""

    def load_chip(self, row: int) -> UInt8Image:
        """Load a chip, (h, w, 3) RGB."""

    def load_chips(self, rows: Int64) -> UInt8Image:
        """Load the chips of rows, (m, h, w, 3) RGB."""


class RowSampler(Protocol):
    """The choice of the rows of each batch; see `BatchSampler`."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch."""

    def draw_rows(self, step: int, rank: int = 0, world: int = 1) -> Int64:
        """Draw the rank's rows of a step's batch."""


S = TypeVar("S", bound=RowSampler, covariant=True)


def _skip_verification(embed: EmbedChips) -> dict[str, float]:
    return {}


@dataclass(frozen=True)
class Examples(Generic[S]):
    """What an embedder is trained and scored on.

    Attributes:
        chips: training set, with labels from 0 without gaps.
        sampler: the choice of each batch's rows.
        augment: augmentation of the chips.
        verify: function that scores an embedding function, with "score" among the scores.
    """

    chips: LabelledChips
    sampler: S
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    verify: Callable[[EmbedChips], dict[str, float]] = _skip_verification


@dataclass(frozen=True)
class ChipBatches:
    """Batches of chips and labels, made without a network, in any process.

    Attributes:
        chips: training set.
        sampler: the choice of each batch's rows.
        augment: augmentation of the chips.
        seed: random seed of the augmentation.
    """

    chips: LabelledChips
    sampler: RowSampler
    augment: AugmentConfig
    seed: int

    def make_batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Load and augment the rank's rows of a step.

        A chip's random numbers depend on its position in the whole batch, so that they do not depend on the ranks.
        """
        rows = self.sampler.draw_rows(step, rank, world)
        first = rank * len(rows)
        chips = [self._augment_row(int(row), step, first + n) for n, row in enumerate(rows)]
        return torch.from_numpy(np.stack(chips)), torch.from_numpy(self.chips.labels[rows].copy())

    def _augment_row(self, row: int, step: int, position: int) -> UInt8Image:
        rng = np.random.default_rng((self.seed, step, position))
        return augment_chip(self.chips.load_chip(row), self.augment, rng)


class EmbeddingTask:
    """A `TrainingTask` whose batches are chips (n, h, w, 3) uint8 RGB and labels (n,) int64.

    Args:
        net: the network.
        objective: the loss, a module (embeddings, labels) -> scalar.
        examples: the data.
        model_input: channel order, mean and scale of the network.
        seed: random seed of the augmentation.
    """

    def __init__(
        self, net: nn.Module, objective: nn.Module, examples: Examples[RowSampler], model_input: Input, seed: int = 0
    ):
        self.net = net
        self.objective = objective
        self.steps_per_epoch = examples.sampler.steps_per_epoch
        self._examples = examples
        self._input = model_input
        self._seed = seed

    @property
    def batches(self) -> "ChipBatches":
        """What makes the batches."""
        return ChipBatches(self._examples.chips, self._examples.sampler, self._examples.augment, self._seed)

    def make_batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Load and augment the rank's rows of a step."""
        return self.batches.make_batch(step, rank, world)

    def compute_loss(self, inputs: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch, in float32 even if the network computes in 16 bits."""
        chips, labels = inputs
        embeddings = self.net(preprocess(chips, self._input))
        # Losses need the full precision of their exponentials.
        with torch.autocast(chips.device.type, enabled=False):
            loss = self.objective(embeddings.float(), labels)
        figures: Any = getattr(self.objective, "figures", {})
        return loss, dict(figures)

    def validate(self, net: nn.Module) -> dict[str, float]:
        """Verify pairs with the network's raw embeddings."""
        device = next(net.parameters()).device
        return self._examples.verify(lambda chips: embed_chips(net, chips, self._input, device))


def embed_chips(net: nn.Module, chips: UInt8Image, model_input: Input, device: torch.device) -> Float32:
    """Embed chips with a network in torch.

    Args:
        net: network in evaluation mode.
        chips: (n, h, w, 3) uint8 RGB.
        model_input: channel order, mean and scale of the network.
        device: device of the network.

    Returns:
        Raw embeddings, (n, dim) float32, not normalised.
    """
    with torch.inference_mode():
        pixels = torch.from_numpy(np.ascontiguousarray(chips)).to(device)
        return np.asarray(net(preprocess(pixels, model_input)).float().cpu().numpy())
