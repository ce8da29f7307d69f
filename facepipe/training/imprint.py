"""Class centres that start at the mean directions of their faces: weight imprinting (Qi et al., CVPR 2018).

Weights that are good already would otherwise be pulled about by random centres until these are learnt.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from facepipe.training.losses import ClassHead
from facepipe.types import Float32, Int64, UInt8Image

Embed = Callable[[UInt8Image], Float32]
_BATCH = 64
_SPREAD = 0.1  # of several centres of a class, about their mean


class ChipStacks(Protocol):
    """Labels (n,) int64 from 0 without gaps, and the chips of rows (m, h, w, 3)."""

    @property
    def labels(self) -> Int64: ...

    def load_chips(self, rows: Int64) -> UInt8Image: ...


def imprint_centres(objective: nn.Module, embed: Embed, chips: ChipStacks, images: int) -> None:
    """Turn the objective's class centres to the mean of up to `images` unit embeddings of each class, in place.

    Their lengths stay what they were. Losses without class centres are left alone; of a sharded head only this rank's
    classes are embedded.
    """
    head = next((module for module in objective.modules() if isinstance(module, ClassHead)), None)
    if head is None:
        return
    first, size = head.shard.start, head.shard.size
    rows = _select_first_rows(np.asarray(chips.labels), images, first, first + size)
    sums = torch.zeros(size, head.weight.shape[-1])
    for at in range(0, len(rows), _BATCH):
        part = rows[at : at + _BATCH]
        units = F.normalize(torch.from_numpy(embed(chips.load_chips(part))))
        sums.index_add_(0, torch.from_numpy(chips.labels[part] - first), units)
    with torch.no_grad():
        old = head.weight
        means = F.normalize(sums) if old.dim() == 2 else F.normalize(sums)[:, None] + _SPREAD * F.normalize(old, dim=-1)
        head.weight.copy_(F.normalize(means, dim=-1) * old.norm(dim=-1, keepdim=True))


def _select_first_rows(labels: Int64, images: int, first: int, end: int) -> Int64:
    """Rows of the first few faces of each class in [first, end), by class."""
    order = np.argsort(labels, kind="stable")
    low, high = np.searchsorted(labels[order], (first, end))
    order = order[low:high]
    begins = np.searchsorted(labels[order], labels[order])
    return order[np.arange(len(order)) - begins < images]
