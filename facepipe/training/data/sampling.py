"""Which faces make up a batch: a pure function of (seed, step), so that an exact resume needs no state.

Every batch is full, and all ranks draw the same one: a rank's rows are a slice of what a single rank would train on.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from facepipe.errors import ConfigError
from facepipe.types import Int32, Int64

_ORDER, _IMAGES, _AGAIN = range(3)  # what a stream of random numbers is for


@dataclass(frozen=True)
class SampleConfig:
    """How batches are drawn; all sizes are those of the whole batch, over all ranks.

    identities, images: P x K: so many identities a batch and images of each, as triplet-like losses need them;
        identities 0: images shuffled, without regard to who they are of
    batch: images a batch where `identities` is 0
    singles: identities with one image under P x K: repeat (the image stands K times in the batch, and differs by its
        augmentation alone), drop, or refuse
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
    """Draws rows of labels (n,) int64, codes from 0.

    An epoch passes every identity (or image, where they are shuffled) once; its last batch is filled up from the
    epoch's beginning. In P x K an identity's images are shuffled anew when all have had their turn, so that none comes
    a second time before; one with fewer than K images repeats them evenly. Memory is 8 bytes an image, 16 an identity.

    Raises ConfigError where the labels hold too few identities or images for a batch.
    """

    def __init__(self, labels: Int64, config: SampleConfig | None = None, seed: int = 0):
        self.config, self.seed = config or SampleConfig(), seed
        self._balanced = self.config.identities > 0
        self._width = self.config.identities or self.config.batch
        self._count = len(labels)
        self._order_of_epoch = lru_cache(maxsize=2)(self._shuffle_epoch)  # of two: batches are drawn ahead
        if self._balanced:
            self._group_by_identity(np.asarray(labels))
        elif self._width > self._count:
            raise ConfigError(f"a batch of {self._width} images cannot be drawn from {self._count}: lower sample.batch")

    def _group_by_identity(self, labels: Int64) -> None:
        order = np.argsort(labels, kind="stable")
        self._by_identity = None if np.array_equal(order, np.arange(len(order))) else order
        counts = np.bincount(labels)
        self._starts, self._counts = np.cumsum(counts) - counts, counts
        self.singles = int((counts == 1).sum()) if self.config.images > 1 else 0
        if self.config.singles == "refuse" and self.singles:
            raise ConfigError(
                f"{self.singles} identities have one image, of which no pair can be made: set data.min_images to 2, "
                "or sample.singles to repeat or drop"
            )
        fewest = 2 if self.config.singles == "drop" and self.config.images > 1 else 1
        self._usable = np.flatnonzero(counts >= fewest)
        self._count = len(self._usable)
        if self._width > self._count:
            raise ConfigError(
                f"a batch of {self._width} identities cannot be drawn from {self._count}: lower sample.identities"
            )

    singles = 0  # identities with one image, where that matters: in P x K with K > 1

    @property
    def steps_per_epoch(self) -> int:
        """Batches after which everything has been seen."""
        return -(-self._count // self._width)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of these batches, with counts."""
        if not self.singles:
            return ()
        done = "is left out" if self.config.singles == "drop" else "is repeated within its batch"
        return (f"{self.singles} of {len(self._counts)} identities have one image, which {done}",)

    def draw_rows(self, step: int, rank: int = 0, world: int = 1) -> Int64:
        """Rows (size / world,) int64 of a step's batch that are the rank's; whole identities, image by image, in P x K.

        Raises ConfigError where identities (P x K) or images do not divide by the number of ranks.
        """
        if self._width % world:
            what = "sample.identities" if self._balanced else "sample.batch"
            raise ConfigError(f"{what} = {self._width} does not divide by {world} ranks: choose a multiple")
        epoch, at = divmod(step, self.steps_per_epoch)
        share = self._width // world
        places = at * self._width + rank * share + np.arange(share)
        units = self._order_of_epoch(epoch)[places % self._count].astype(np.int64)
        if not self._balanced:
            return units
        again = places >= self._count  # a second visit in this epoch, which takes no turns from the others
        visits = zip(self._usable[units].tolist(), again.tolist(), strict=True)
        rows = np.concatenate([self._draw_images(identity, epoch, more) for identity, more in visits])
        return rows if self._by_identity is None else self._by_identity[rows]

    def _shuffle_epoch(self, epoch: int) -> Int32:
        """The order of identities or images in an epoch."""
        order = np.arange(self._count, dtype=np.int32)
        self._make_rng(_ORDER, epoch).shuffle(order)
        return order

    def _draw_images(self, identity: int, epoch: int, again: bool) -> Int64:
        """K images of an identity, as places in the order by identity: distinct ones where it has as many."""
        count, k = int(self._counts[identity]), self.config.images
        turn, within = (epoch, 0) if again else divmod(epoch, -(-count // k))  # a round shows each image
        order = self._make_rng(_AGAIN if again else _IMAGES, turn, identity).permutation(count)
        chosen = order[(within * k + np.arange(k)) % count]
        return np.asarray(self._starts[identity] + chosen, np.int64)

    def _make_rng(self, *stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, *stream))))
