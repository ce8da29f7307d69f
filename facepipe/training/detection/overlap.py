"""Overlaps of boxes x1 y1 x2 y2, in torch; widths and heights are differences, without a pixel added."""

import torch
from torch import Tensor


def compute_iou(a: Tensor, b: Tensor) -> Tensor:
    """(n, 4) and (m, 4) -> (n, m) intersection over union; 0 where both boxes are empty."""
    low = torch.maximum(a[:, None, :2], b[:, :2])
    high = torch.minimum(a[:, None, 2:], b[:, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    union = compute_area(a)[:, None] + compute_area(b) - shared
    return shared / union.clamp(min=torch.finfo(shared.dtype).tiny)


def compute_area(boxes: Tensor) -> Tensor:
    """(n, 4) -> (n,); 0 for boxes that end before they begin."""
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(-1)


def to_corners(priors: Tensor) -> Tensor:
    """(n, 4) centre and size -> x1 y1 x2 y2."""
    return torch.cat([priors[:, :2] - priors[:, 2:] / 2, priors[:, :2] + priors[:, 2:] / 2], 1)
