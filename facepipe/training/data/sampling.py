"""The choice of the faces of a batch: a pure function of (seed, step), so that an exact resume needs no state.

Every batch is full. All ranks draw the same batch: a rank's rows are a slice of what a single rank would train on.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from facepipe.errors import ConfigError
from facepipe.types import Int32, Int64

# What a stream of random numbers is for.
_ORDER = 0
_IMAGES = 1
_SECOND_VISIT = 2


@dataclass(frozen=True)
class SampleConfig:
    """Configure how batches are drawn. All sizes are those of the whole batch, over all ranks.

    Attributes:
        identities: identities per batch (P of P x K), as triplet-like losses need them; 0: images in random order,
            whoever they show.
        images: images per identity and batch (K of P x K).
        batch: images per batch if `identities` is 0.
        singles: what to do with identities that have one image under P x K: repeat (the image is K times in the batch,
            and differs by its augmentation only), drop, or refuse.
    """

    identities: Annotated[int, Field(ge=0)] = 0
    images: Annotated[int, Field(ge=1)] = 4
    batch: Annotated[int, Field(ge=1)] = 128
    singles: Literal["repeat", "drop", "refuse"] = "repeat"

    @property
    def size(self) -> int:
        """Images of a whole batch."""
        return self.identities * self.images if self.identities else self.batch


class BatchSampler:
    """The rows of each batch.

    An epoch visits every identity (or image, without P x K) once. Its last batch is filled up from the epoch's
    beginning. Under P x K an identity's images are shuffled again after all were used, so that none is used twice
    before; an identity with fewer than K images repeats them evenly. Memory is 8 bytes per image and 16 per identity.

    Args:
        labels: label of each row, (n,) int64, from 0.
        config: how to draw batches.
        seed: random seed.

    Raises:
        ConfigError: There are too few identities or images for a batch.
    """

    def __init__(self, labels: Int64, config: SampleConfig | None = None, seed: int = 0):
        self.config = config or SampleConfig()
        self.seed = seed
        self.singles = 0  # identities with one image, counted if that matters: in P x K with K > 1
        # Identities or images per batch are the width; both are drawn from an order per epoch.
        self._is_balanced = self.config.identities > 0
        self._width = self.config.identities or self.config.batch
        self._count = len(labels)
        # Of two epochs, because batches are drawn ahead.
        self._get_epoch_order = lru_cache(maxsize=2)(self._shuffle_epoch)
        if self._is_balanced:
            self._group_by_identity(np.asarray(labels))
        elif self._width > self._count:
            raise ConfigError(
                f"sample.batch={self._width}, but there are only {self._count} images: lower sample.batch"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the cache, which cannot be pickled: other processes make their own."""
        return {name: value for name, value in self.__dict__.items() if name != "_get_epoch_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._get_epoch_order = lru_cache(maxsize=2)(self._shuffle_epoch)

    def _group_by_identity(self, labels: Int64) -> None:
        """Index the images of each identity, and choose the identities to visit."""
        # Sort rows by label, unless they are sorted; each identity is then a slice of the order.
        order = np.argsort(labels, kind="stable")
        self._by_identity = None if np.array_equal(order, np.arange(len(order))) else order
        counts = np.bincount(labels)
        self._counts = counts
        self._starts = np.cumsum(counts) - counts
        if self.config.images > 1:
            self.singles = int((counts == 1).sum())
        if self.config.singles == "refuse" and self.singles:
            raise ConfigError(
                f"{self.singles} identities have one image, which makes no pair: set data.min_images=2, or "
                "sample.singles to repeat or drop"
            )
        # Identities with a single image stay out if they make no pair.
        min_images = 2 if self.config.singles == "drop" and self.config.images > 1 else 1
        self._usable = np.flatnonzero(counts >= min_images)
        self._count = len(self._usable)
        if self._width > self._count:
            raise ConfigError(
                f"sample.identities={self._width}, but only {self._count} identities can be used: lower "
                "sample.identities"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch."""
        # Round up: the last batch is filled from the beginning of the epoch.
        return -(-self._count // self._width)

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on the batches, with counts."""
        if not self.singles:
            return ()
        treatment = "is left out" if self.config.singles == "drop" else "is repeated within its batch"
        return (f"{self.singles} of {len(self._counts)} identities have one image, which {treatment}",)

    def draw_rows(self, step: int, rank: int = 0, world: int = 1) -> Int64:
        """Draw the rank's rows of a step's batch, (size / world,) int64.

        Under P x K these are whole identities, the images of each together.

        Raises:
            ConfigError: The identities (P x K) or images of a batch do not divide by the number of ranks.
        """
        if self._width % world:
            key = "sample.identities" if self._is_balanced else "sample.batch"
            raise ConfigError(f"{key}={self._width} does not divide by {world} ranks: set a multiple")
        # Places of this rank's identities or images in the epoch; the last batch may go past its end.
        epoch, batch = divmod(step, self.steps_per_epoch)
        share = self._width // world
        places = batch * self._width + rank * share + np.arange(share)
        units = self._get_epoch_order(epoch)[places % self._count].astype(np.int64)
        if not self._is_balanced:
            return units
        # Places behind the end visit an identity again in this epoch. Those visits use up no turns of its images.
        is_second_visit = places >= self._count
        visits = zip(self._usable[units].tolist(), is_second_visit.tolist(), strict=True)
        rows = np.concatenate([self._draw_images(identity, epoch, is_second=second) for identity, second in visits])
        return rows if self._by_identity is None else self._by_identity[rows]

    def _shuffle_epoch(self, epoch: int) -> Int32:
        """Shuffle the identities or images of an epoch."""
        order = np.arange(self._count, dtype=np.int32)
        self._make_rng(_ORDER, epoch).shuffle(order)
        return order

    def _draw_images(self, identity: int, epoch: int, *, is_second: bool) -> Int64:
        """Draw K images of an identity, different ones if it has as many, as positions in the order by identity."""
        count = int(self._counts[identity])
        k = self.config.images
        # An identity's images are cut into parts of K; each visit uses the next part of a shuffled turn.
        if is_second:
            stream = _SECOND_VISIT
            turn = epoch
            part = 0
        else:
            stream = _IMAGES
            turn, part = divmod(epoch, -(-count // k))  # a turn of the parts shows each image
        order = self._make_rng(stream, turn, identity).permutation(count)
        chosen = order[(part * k + np.arange(k)) % count]
        return np.asarray(self._starts[identity] + chosen, np.int64)

    def _make_rng(self, *stream: int) -> np.random.Generator:
        # The seed and the purpose of the numbers make a stream that no other draw shares.
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, *stream))))
