"""The training of an embedder on triplets that are mined over the whole training set at the start of each epoch."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from facepipe.errors import ConfigError
from facepipe.hashing import hash64
from facepipe.models.runtime.preprocess import Input
from facepipe.training.embedding_task import EmbeddingTask, Examples, embed_chips
from facepipe.training.losses import LossConfig, mine_triplets
from facepipe.training.trainer.ranks import Ranks
from facepipe.types import Float32, Int64

# Chips per call of the network.
_CHIPS_PER_RUN = 64
_MAX_REPEATS = 3  # of a triplet per epoch: the hardest triplets often have wrong labels
_EPOCH = "epoch"
_TRIPLETS = "triplets"


class TripletSampler:
    """Batches of an epoch's triplets in random order.

    A rank's rows are its anchors, then their positives, then their negatives. An epoch has as many triplets as there
    are images with another image of their identity. Triplets with a loss above 0 come up to three times; triplets
    without one fill the rest. Memory is 24 bytes per triplet.

    Args:
        labels: label of each image, (n,) int64.
        loss: the triplet loss.
        batch: images of a whole batch, three per triplet.
        seed: random seed of the mining and the order.

    Raises:
        ConfigError: A batch has more triplets than there are images with another image of their identity.
    """

    def __init__(self, labels: Int64, loss: LossConfig, batch: int, seed: int = 0):
        self._labels = labels
        self._loss = loss
        self._seed = seed
        # Triplets per batch; an image can be an anchor if its identity has another one.
        self._width = batch // 3
        anchors = int((np.bincount(labels)[labels] > 1).sum())
        if not self._width or self._width > anchors:
            raise ConfigError(
                f"sample.batch={batch} needs {self._width} triplets, but {anchors} images have another image of their "
                f"identity: set sample.batch between 3 and {3 * anchors}"
            )
        self.steps_per_epoch = -(-anchors // self._width)
        self.epoch = -1
        self.triplets: Int64 = np.empty((0, 3), np.int64)

    def mine_epoch(self, vectors: Float32, epoch: int) -> None:
        """Mine the triplets of an epoch.

        Args:
            vectors: raw vectors of all images, (n, dim).
            epoch: number of the epoch.
        """
        seed = hash64("triplets", str(self._seed), str(epoch))
        rng = np.random.default_rng(seed)
        # Split what was mined into triplets with a loss and those without.
        mined = mine_triplets(vectors, self._labels, self._loss, seed)
        active = rng.permutation(mined.rows[mined.active])
        inactive = rng.permutation(mined.rows[~mined.active])
        # Repeat the active triplets as often as allowed, and fill the rest with inactive ones.
        places = self.steps_per_epoch * self._width
        repeats = min(_MAX_REPEATS, -(-places // max(1, len(active))))
        repeated = np.tile(active, (repeats, 1))[:places]
        filled = np.concatenate([repeated, inactive[: places - len(repeated)]])
        self.set_triplets(epoch, rng.permutation(filled) if len(active) else active)

    def set_triplets(self, epoch: int, triplets: Int64) -> None:
        """Use triplets that were mined elsewhere.

        Args:
            epoch: number of the epoch.
            triplets: rows of anchor, positive and negative, (t, 3), in the order of the epoch.
        """
        self.epoch = epoch
        self.triplets = triplets

    def draw_rows(self, step: int, rank: int = 0, world: int = 1) -> Int64:
        """Return the rank's rows of a step's batch, (size / world,) int64. The step must be in the mined epoch.

        Raises:
            ConfigError: The triplets of a batch do not divide by the number of ranks.
        """
        if self._width % world:
            raise ConfigError(
                f"the {self._width} triplets of a batch do not divide by {world} ranks: set sample.batch to a multiple "
                f"of {3 * world}"
            )
        epoch, batch = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            raise ValueError(f"step {step} is in epoch {epoch}, but the triplets are of epoch {self.epoch}")
        # The rank's triplets as all anchors, then positives, then negatives.
        share = self._width // world
        places = batch * self._width + rank * share + np.arange(share)
        return self.triplets[places % len(self.triplets)].T.reshape(-1)


class TripletTask(EmbeddingTask):
    """A `TrainingTask` and `EpochTask` whose batches come from a TripletSampler."""

    def __init__(
        self,
        net: nn.Module,
        objective: nn.Module,
        examples: Examples[TripletSampler],
        model_input: Input,
        seed: int = 0,
    ):
        super().__init__(net, objective, examples, model_input, seed)
        self._sampler = examples.sampler

    def prepare_epoch(self, epoch: int, ranks: Ranks) -> bool:
        """Mine the epoch's triplets on the first rank and send them to all."""
        # A resumed run has the epoch's triplets already.
        if self._sampler.epoch != epoch:
            if ranks.is_first:
                self._sampler.mine_epoch(self._embed_all(ranks.device), epoch)
            mined: dict[str, Any] = {_TRIPLETS: self._sampler.triplets}
            self._sampler.set_triplets(epoch, ranks.broadcast(mined)[_TRIPLETS])
        return len(self._sampler.triplets) > 0

    def _embed_all(self, device: torch.device) -> Float32:
        chips = self._examples.chips
        count = len(chips.labels)
        parts = []
        for start in range(0, count, _CHIPS_PER_RUN):
            rows = range(start, min(start + _CHIPS_PER_RUN, count))
            stack = np.stack([chips.load_chip(row) for row in rows])
            parts.append(embed_chips(self.net, stack, self._input, device))
        return np.concatenate(parts)

    def get_epoch_state(self) -> dict[str, Tensor]:
        """Get the epoch and its triplets."""
        return {_EPOCH: torch.tensor(self._sampler.epoch), _TRIPLETS: torch.from_numpy(self._sampler.triplets)}

    def load_epoch_state(self, prepared: dict[str, Tensor]) -> None:
        """Restore the epoch and its triplets."""
        self._sampler.set_triplets(int(prepared[_EPOCH]), prepared[_TRIPLETS].numpy())
