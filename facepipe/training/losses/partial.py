"""Partial FC: a step compares with the classes of its batch and a random share of the others.

An et al., Killing Two Birds with One Stone: Efficient and Robust Training of Face Recognition CNNs by Partial FC, CVPR
2022, arXiv 2203.15565. Random numbers come from torch's own generator: the same seed draws the same classes.
"""

import torch
from torch import Tensor


def sample_classes(wanted: Tensor, count: int, rate: float) -> Tensor:
    """Sample classes: all wanted ones, and others up to k = round(rate * count).

    Args:
        wanted: rows of classes that must be included, (n,) int64; may repeat; -1 is ignored.
        count: number of classes.
        rate: share of the classes to sample.

    Returns:
        Ascending rows, (k,) int64. k is the number of wanted classes if that is larger.
    """
    # Random numbers below 1 rank the others; wanted classes get 2 and come first.
    order = torch.rand(count, device=wanted.device)
    present: Tensor = torch.unique(wanted)
    present = present[present >= 0]
    order[present] = 2.0
    k = max(round(rate * count), len(present), 1)
    return order.topk(k).indices.sort().values


def find_positions(rows: Tensor, wanted: Tensor) -> Tensor:
    """Find the position of each of `wanted` in the ascending `rows`, which contain them all; -1 stays -1."""
    return torch.where(wanted >= 0, torch.searchsorted(rows, wanted.clamp(min=0)), wanted)
