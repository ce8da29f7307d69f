"""Weight imprinting (Qi et al., CVPR 2018): class centres start at the mean directions of their faces.

Random class centres would change weights that are good already, until the centres are learnt.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from facepipe.training.embedding_task import EmbedChips, LabelledChips
from facepipe.training.losses import ClassHead
from facepipe.types import Int64

# Chips per call of the network.
_BATCH = 64
_SPREAD = 0.1  # of the sub-centres of a class, about their mean


def imprint_centres(objective: nn.Module, embed: EmbedChips, chips: LabelledChips, images: int) -> None:
    """Turn the objective's class centres to the mean embedding of each class, in place. Their lengths do not change.

    A loss without class centres is not changed. A rank with a sharded head embeds its own classes only.

    Args:
        objective: the loss.
        embed: embedding function.
        chips: training set, with labels from 0 without gaps.
        images: images per class to embed, at most.
    """
    head = next((module for module in objective.modules() if isinstance(module, ClassHead)), None)
    if head is None:
        return
    # The classes of this rank.
    start = head.shard.start
    size = head.shard.size
    rows = _select_first_rows(np.asarray(chips.labels), images, start, start + size)
    # Sum the unit embeddings of each class.
    sums = torch.zeros(size, head.weight.shape[-1])
    for at in range(0, len(rows), _BATCH):
        part = rows[at : at + _BATCH]
        units = F.normalize(torch.from_numpy(embed(chips.load_chips(part))))
        sums.index_add_(0, torch.from_numpy(chips.labels[part] - start), units)
    # Give each centre its class's direction and its own old length. Sub-centres stay a little apart.
    with torch.no_grad():
        old = head.weight
        means = F.normalize(sums)
        if old.dim() == 3:
            means = means[:, None] + _SPREAD * F.normalize(old, dim=-1)
        head.weight.copy_(F.normalize(means, dim=-1) * old.norm(dim=-1, keepdim=True))


def _select_first_rows(labels: Int64, count: int, start: int, end: int) -> Int64:
    """Select the first rows of each class in [start, end), up to `count` per class, ordered by class."""
    # Rows of own classes only, as a slice of the rows sorted by class.
    order = np.argsort(labels, kind="stable")
    low, high = np.searchsorted(labels[order], (start, end))
    order = order[low:high]
    # Position of each row in its class: its place less that of the class's first row.
    class_starts = np.searchsorted(labels[order], labels[order])
    return order[np.arange(len(order)) - class_starts < count]
