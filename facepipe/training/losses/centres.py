"""Initial class centres. A class gets the same centre on whichever rank holds it."""

import numpy as np
import torch
from torch import Tensor

from facepipe.training.losses.shards import ClassShard

_BLOCK_CLASSES = 4096  # classes drawn from one generator


def draw_centres(shard: ClassShard, sub_centers: int, dim: int, seed: int) -> Tensor:
    """Draw the initial centres of a shard's classes.

    Returns:
        (count, dim) float32, or (count, sub_centers, dim): normal with deviation dim ** -0.5, so roughly unit vectors.
    """
    # Draw the whole blocks that overlap the shard, and cut the shard out.
    end = shard.start + shard.size
    blocks = range(shard.start // _BLOCK_CLASSES, -(-end // _BLOCK_CLASSES))
    drawn = torch.cat([_draw_block(seed, block, (_BLOCK_CLASSES, sub_centers, dim)) for block in blocks])
    offset = shard.start - blocks.start * _BLOCK_CLASSES
    own = drawn[offset : offset + shard.size] * dim**-0.5
    return own.squeeze(1) if sub_centers == 1 else own.clone()


def _draw_block(seed: int, block: int, shape: tuple[int, int, int]) -> Tensor:
    # The block's number seeds its generator, so that a block is the same on any rank.
    state = int(np.random.SeedSequence([seed, block]).generate_state(1, np.uint64)[0] >> 1)
    return torch.randn(shape, generator=torch.Generator().manual_seed(state))
