"""Training of an embedder on triplets that are mined over the whole training set at the beginning of each epoch."""

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

_CHIPS = 64
_MOST = 3  # times that a triplet comes in an epoch: the hardest are often labelled wrongly
_EPOCH, _TRIPLETS = "epoch", "triplets"


class TripletSampler:
    """Draws an epoch's triplets in a random order; a rank's share are the anchors, then their positives, negatives.

    labels (n,) int64; batch: images of a whole batch, three a triplet. An epoch has a place for every image that has
    another of its identity. Triplets that cost something come up to three times; the places that are left are of those
    that cost nothing as yet. Memory is 24 bytes a triplet. Raises ConfigError where there are fewer such images than a
    batch has triplets.
    """

    def __init__(self, labels: Int64, loss: LossConfig, batch: int, seed: int = 0):
        self._labels, self._loss, self._seed = labels, loss, seed
        self._width = batch // 3
        anchors = int((np.bincount(labels)[labels] > 1).sum())
        if not self._width or self._width > anchors:
            raise ConfigError(
                f"a batch of {self._width} triplets cannot be drawn from {anchors} images with another of their "
                "identity: change sample.batch, which counts three images a triplet"
            )
        self.steps_per_epoch = -(-anchors // self._width)
        self.epoch, self.triplets = -1, np.empty((0, 3), np.int64)

    def mine_epoch(self, vectors: Float32, epoch: int) -> None:
        """Find an epoch's triplets: vectors (n, dim) of all images, raw."""
        seed = hash64("triplets", str(self._seed), str(epoch))
        rng, found = np.random.default_rng(seed), mine_triplets(vectors, self._labels, self._loss, seed)
        places = self.steps_per_epoch * self._width
        costly, others = (rng.permutation(found.rows[part]) for part in (found.active, ~found.active))
        again = np.tile(costly, (min(_MOST, -(-places // max(1, len(costly)))), 1))[:places]
        filled = np.concatenate([again, others[: places - len(again)]])
        self.set_triplets(epoch, rng.permutation(filled) if len(costly) else costly)

    def set_triplets(self, epoch: int, triplets: Int64) -> None:
        """Triplets (t, 3) that were mined, in their order."""
        self.epoch, self.triplets = epoch, triplets

    def draw_rows(self, step: int, rank: int = 0, world: int = 1) -> Int64:
        """Rows (size / world,) int64 of a step's batch that are the rank's; the step is one of the mined epoch.

        Raises ConfigError where triplets do not divide by the number of ranks.
        """
        if self._width % world:
            raise ConfigError(f"{self._width} triplets a batch do not divide by {world} ranks: change sample.batch")
        epoch, at = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            raise ValueError(f"step {step} is of epoch {epoch}, and triplets are those of epoch {self.epoch}")
        share = self._width // world
        places = at * self._width + rank * share + np.arange(share)
        return self.triplets[places % len(self.triplets)].T.reshape(-1)


class TripletTask(EmbeddingTask):
    """A `Task` that is `Renewed`: its examples come from a TripletSampler."""

    def __init__(
        self, net: nn.Module, objective: nn.Module, examples: Examples[TripletSampler], fed: Input, seed: int = 0
    ):
        super().__init__(net, objective, examples, fed, seed)
        self._sampler = examples.sampler

    def prepare_epoch(self, epoch: int, ranks: Ranks) -> bool:
        """Mine on the first rank, whose triplets all get."""
        if self._sampler.epoch != epoch:
            if ranks.is_first:
                self._sampler.mine_epoch(self._embed_all(ranks.device), epoch)
            mined: dict[str, Any] = {_TRIPLETS: self._sampler.triplets}
            self._sampler.set_triplets(epoch, ranks.broadcast(mined)[_TRIPLETS])
        return len(self._sampler.triplets) > 0

    def _embed_all(self, device: torch.device) -> Float32:
        chips, parts = self._examples.chips, []
        for at in range(0, len(chips.labels), _CHIPS):
            rows = range(at, min(at + _CHIPS, len(chips.labels)))
            parts.append(embed_chips(self.net, np.stack([chips.load_chip(row) for row in rows]), self._fed, device))
        return np.concatenate(parts)

    def get_epoch_state(self) -> dict[str, Tensor]:
        """The epoch and its triplets."""
        return {_EPOCH: torch.tensor(self._sampler.epoch), _TRIPLETS: torch.from_numpy(self._sampler.triplets)}

    def load_epoch_state(self, prepared: dict[str, Tensor]) -> None:
        """Of a checkpoint."""
        self._sampler.set_triplets(int(prepared[_EPOCH]), prepared[_TRIPLETS].numpy())
