"""The interface between the loop and what it trains.

A task knows its data and its loss. It knows nothing about steps, optimisers or processes.
"""

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from facepipe.training.trainer.ranks import Ranks

Batch = tuple[Tensor, ...]


class TrainingTask(Protocol):
    """A network with its data and its loss.

    Attributes:
        net: the module that is exported.
        objective: what the loss learns beside the network, such as class centres; may have no parameters.
        steps_per_epoch: batches per epoch.
    """

    net: nn.Module
    objective: nn.Module
    steps_per_epoch: int

    def make_batch(self, step: int, rank: int, world: int) -> Batch:
        """Make the rank's share of a step's batch, on the CPU.

        The result depends on (seed, step, rank, world) only. The loop may call this in another process and ahead of
        time.

        Returns:
            Tensors; the first one holds the images along its first axis.
        """

    def compute_loss(self, inputs: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a share of a batch.

        Returns:
            The mean loss, a scalar; and figures to show by name, scalars without gradients.
        """

    def validate(self, net: nn.Module) -> dict[str, float]:
        """Score a network that is in evaluation mode.

        Returns:
            Scores by name; "score" is one of them, and higher is better. Empty if the task has no validation.
            "impostor_distance" and "genuine_distance", if they are there, are the median distances of pairs: a
            fine-tuning stops if that of impostors becomes a tenth of what it was at the start.
        """


class BatchMaker(Protocol):
    """What makes a task's batches, without its network, so that it can be sent to other processes."""

    def make_batch(self, step: int, rank: int, world: int) -> Batch:
        """Make the rank's share of a step's batch; see `TrainingTask.make_batch`."""


@runtime_checkable
class HasBatchMaker(Protocol):
    """A task whose batches may be made in other processes. They get the batch maker alone."""

    @property
    def batches(self) -> BatchMaker:
        """What makes the batches."""


@runtime_checkable
class EpochTask(Protocol):
    """A task whose batches depend on the network as it was when their epoch began."""

    def prepare_epoch(self, epoch: int, ranks: Ranks) -> bool:
        """Prepare an epoch's batches with the current network, unless they are prepared already.

        All ranks call it.

        Returns:
            Whether anything is left to learn.
        """

    def get_epoch_state(self) -> dict[str, Tensor]:
        """Get what a run needs to resume within the epoch, for checkpoints."""

    def load_epoch_state(self, prepared: dict[str, Tensor]) -> None:
        """Restore what `get_epoch_state` returned."""
