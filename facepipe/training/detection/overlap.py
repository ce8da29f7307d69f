"""Overlaps of boxes x1 y1 x2 y2 in torch. Widths and heights are differences, without an extra pixel."""

import torch
from torch import Tensor


def compute_iou(a: Tensor, b: Tensor) -> Tensor:
    """Compute the intersection over union of boxes (n, 4) and (m, 4) as (n, m); 0 if both boxes are empty."""
    # Corners of the intersection of each pair, (n, m, 2).
    low = torch.maximum(a[:, None, :2], b[:, :2])
    high = torch.minimum(a[:, None, 2:], b[:, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    union = compute_area(a)[:, None] + compute_area(b) - shared
    return shared / union.clamp(min=torch.finfo(shared.dtype).tiny)


def compute_area(boxes: Tensor) -> Tensor:
    """Compute the area of boxes (n, 4) as (n,); 0 for boxes that end before they begin."""
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(-1)


def to_corners(priors: Tensor) -> Tensor:
    """Convert centre and size, (n, 4), to x1 y1 x2 y2."""
    return torch.cat([priors[:, :2] - priors[:, 2:] / 2, priors[:, :2] + priors[:, 2:] / 2], 1)
