"""Margins: what replaces the cosine to a face's own class. Elementwise, without arccos, with finite gradients.

All functions map (n,) floats to (n,) floats; theta is the angle of the cosine.
"""

import math

import torch
from torch import Tensor


def add_angle(cosine: Tensor, margin: float, easy: bool) -> Tensor:
    """Compute cos(theta + margin) of ArcFace (Deng et al., CVPR 2019, arXiv 1801.07698).

    Beyond theta + margin = pi, cos(theta + margin) would rise again. The straight line cos(theta) - margin *
    sin(margin) replaces it there and keeps falling.

    Args:
        cosine: cosines to the own class, (n,).
        margin: margin in radians.
        easy: apply the margin only below 90 degrees, and keep the plain cosine elsewhere.
    """
    # At |cosine| = 1 the sine's slope is infinite. Below this floor, 0.1 degrees in float32, it counts as constant.
    sine = ((1 - cosine) * (1 + cosine)).clamp(min=16 * torch.finfo(cosine.dtype).eps).sqrt()
    moved = cosine * math.cos(margin) - sine * math.sin(margin)
    if easy:
        return torch.where(cosine > 0, moved, cosine)
    return torch.where(cosine > -math.cos(margin), moved, cosine - margin * math.sin(margin))


def multiply_angle(cosine: Tensor, times: int) -> Tensor:
    """Compute psi(theta) = (-1)^k cos(times * theta) - 2k with k = floor(times * theta / pi).

    It falls from 1 to 1 - 2 times.

    L-Softmax (Liu et al., ICML 2016, arXiv 1612.02295) and A-Softmax (Liu et al., CVPR 2017, arXiv 1704.08063).
    cos(times * theta) is Chebyshev's polynomial of the cosine.
    """
    # Raise the polynomial degree by degree.
    previous = torch.ones_like(cosine)
    current = cosine
    for _ in range(times - 1):
        previous, current = current, 2 * cosine * current - previous
    # Count the multiples of pi that the angle has passed.
    k = torch.zeros_like(cosine)
    for j in range(1, times):
        k = k + (cosine < math.cos(j * math.pi / times))
    return (1 - 2 * (k % 2)) * current - 2 * k


def anneal_weight(iteration: Tensor, *, base: float, gamma: float, power: float, minimum: float) -> Tensor:
    """Compute the weight of the plain cosine in a step: max(minimum, base * (1 + gamma * iteration) ** -power).

    Returns:
        A float64 scalar.
    """
    return (base * (1 + gamma * iteration.double()) ** -power).clamp(min=minimum)
