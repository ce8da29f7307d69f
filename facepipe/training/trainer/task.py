"""What the loop trains. A task knows its data and its loss; of steps, optimisers and processes it knows nothing."""

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from facepipe.training.trainer.ranks import Ranks

Batch = tuple[Tensor, ...]


class Task(Protocol):
    """A network, what it is trained on and towards.

    net: the module that is exported
    objective: what the loss learns beside it (class centres); may have no parameters
    steps_per_epoch: how many batches an epoch has
    """

    net: nn.Module
    objective: nn.Module
    steps_per_epoch: int

    def batch(self, step: int, rank: int, world: int) -> Batch:
        """Rank's share of the batch of a step, on the CPU; the first tensor has the images along its first axis.

        Depends on (seed, step, rank, world) alone. May be called in another process, and ahead of time.
        """

    def loss(self, inputs: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(mean loss over the share, a scalar; figures to be shown, scalars without gradients)."""

    def validate(self, net: nn.Module) -> dict[str, float]:
        """Figures of a network in evaluation mode; `score` is among them, and higher is better. {}: no validation."""


@runtime_checkable
class Renewed(Protocol):
    """A task whose batches depend on the network as it was when their epoch began."""

    def renew(self, epoch: int, ranks: Ranks) -> bool:
        """Prepare an epoch's batches with the network as it is, unless they are prepared; all ranks call it.

        False where there is nothing left to learn.
        """

    def prepared(self) -> dict[str, Tensor]:
        """What a run that goes on within the epoch needs, for checkpoints."""

    def take_up(self, prepared: dict[str, Tensor]) -> None:
        """Put it back."""
