"""Partial FC: a step compares with the classes of its batch and a random share of the others.

An et al., Killing Two Birds with One Stone: Efficient and Robust Training of Face Recognition CNNs by Partial FC, CVPR
2022, arXiv 2203.15565. Drawn from torch's own generator: who seeds it the same way draws the same classes.
"""

import torch
from torch import Tensor


def sample_classes(wanted: Tensor, count: int, rate: float) -> Tensor:
    """Ascending rows (k,) int64 of `count` classes: all `wanted` ones, and others up to k = round(rate * count).

    Where more than that are wanted, k is their number. `wanted` (n,) int64 may repeat itself; -1 is nobody.
    """
    order = torch.rand(count, device=wanted.device)
    present: Tensor = torch.unique(wanted)
    present = present[present >= 0]
    order[present] = 2.0
    k = max(round(rate * count), len(present), 1)
    return order.topk(k).indices.sort().values


def find_positions(rows: Tensor, wanted: Tensor) -> Tensor:
    """Where each of `wanted` stands in the ascending `rows`, which hold them all; -1 stays -1."""
    return torch.where(wanted >= 0, torch.searchsorted(rows, wanted.clamp(min=0)), wanted)
