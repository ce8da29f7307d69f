"""Margins: what stands in the place of the cosine to one's own class. Elementwise, free of arccos, finite gradients.

All take and give (n,) floats; theta is the angle whose cosine is given.
"""

import math

import torch
from torch import Tensor


def add_angle(cosine: Tensor, margin: float, easy: bool) -> Tensor:
    """cos(theta + margin) of ArcFace (Deng et al., CVPR 2019, arXiv 1801.07698), made safe beyond theta + margin = pi.

    There cos(theta + margin) would rise again: a straight line, cos(theta) - margin * sin(margin), goes on falling.
    easy: the margin below 90 degrees only, the plain cosine elsewhere.
    """
    # At |cosine| = 1 the sine's slope is infinite; below this floor, 0.1 degrees in float32, it counts as constant.
    sine = ((1 - cosine) * (1 + cosine)).clamp(min=16 * torch.finfo(cosine.dtype).eps).sqrt()
    moved = cosine * math.cos(margin) - sine * math.sin(margin)
    if easy:
        return torch.where(cosine > 0, moved, cosine)
    return torch.where(cosine > -math.cos(margin), moved, cosine - margin * math.sin(margin))


def multiply_angle(cosine: Tensor, times: int) -> Tensor:
    """psi(theta) = (-1)^k cos(times * theta) - 2k, k = floor(times * theta / pi): it falls from 1 to 1 - 2 times.

    L-Softmax (Liu et al., ICML 2016, arXiv 1612.02295) and A-Softmax (Liu et al., CVPR 2017, arXiv 1704.08063).
    cos(times * theta) is Chebyshev's polynomial of the cosine.
    """
    before, now = torch.ones_like(cosine), cosine
    for _ in range(times - 1):
        before, now = now, 2 * cosine * now - before
    k = torch.zeros_like(cosine)
    for j in range(1, times):
        k = k + (cosine < math.cos(j * math.pi / times))
    return (1 - 2 * (k % 2)) * now - 2 * k


def anneal_weight(iteration: Tensor, base: float, gamma: float, power: float, least: float) -> Tensor:
    """lambda = max(least, base * (1 + gamma * iteration) ** -power), float64: what the plain cosine still counts."""
    return (base * (1 + gamma * iteration.double()) ** -power).clamp(min=least)
