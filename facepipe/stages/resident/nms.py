"""Batched NMS without host synchronisation, equal to `retinaface_decode.apply_sorted_nms`.

Greedy NMS has one fixed point: a box is kept if it is valid and no kept box with a higher score overlaps it. Applied
repeatedly from "all boxes are kept", this rule settles in as many rounds as the longest chain of suppressions has links
(up to 5 on photos). Each round is one pass over an (n, k, k) matrix. The equivalent loop over k has k small steps one
after the other: some hundred kernel launches where this has a dozen.
"""

import torch
from torch import Tensor


def apply_nms(boxes: Tensor, valid: Tensor, max_iou: float, rounds: int | None = None) -> tuple[Tensor, Tensor]:
    """Apply greedy NMS to the boxes of each image.

    Args:
        boxes: x1 y1 x2 y2 by descending score, (n, k, 4) float32.
        valid: whether each place holds a box, (n, k) bool.
        max_iou: maximum overlap of two kept boxes.
        rounds: how often the rule is applied; None: k times, after which it has settled for all boxes.

    Returns:
        Whether each box is kept, (n, k) bool; and whether each image has settled, (n,) bool. With few rounds, an image
        that has not settled may keep other boxes than greedy NMS would.
    """
    k = boxes.shape[1]
    if k == 0:
        return valid, valid.new_ones(len(valid))
    # Pairs (n, i, j): an earlier valid box j that overlaps box i.
    overlaps = find_overlaps(boxes, max_iou) & valid[:, None, :]
    kept = valid
    settled = valid.new_zeros(len(valid))
    for _ in range(k if rounds is None else rounds):
        # A box stays if none of the boxes kept so far suppresses it; a round without change is the fixed point.
        next_kept = valid & ~(overlaps & kept[:, None, :]).any(2)
        settled = (next_kept == kept).all(1)
        kept = next_kept
    # The only box of an image cannot change.
    return kept, settled | (k == 1)


def find_overlaps(boxes: Tensor, max_iou: float) -> Tensor:
    """Find the boxes that overlap a box before them.

    The arithmetic is that of `retinaface_decode.apply_sorted_nms`, operation by operation, so that it rounds alike.

    Args:
        boxes: x1 y1 x2 y2, (n, k, 4) float32.
        max_iou: maximum overlap.

    Returns:
        Whether box i overlaps an earlier box j < i by more than `max_iou`, (n, i, j) bool.
    """
    x1, y1, x2, y2 = boxes.unbind(2)
    area = (x2 - x1) * (y2 - y1)

    def intersect(low: Tensor, high: Tensor) -> Tensor:
        # Pairs (n, k, k); in place to hold few matrices at once.
        end = torch.minimum(high[:, :, None], high[:, None, :])
        return end.sub_(torch.maximum(low[:, :, None], low[:, None, :])).clamp_(min=0)

    shared = intersect(x1, x2).mul_(intersect(y1, y2))
    union = (area[:, :, None] + area[:, None, :]).sub_(shared)
    number = torch.arange(boxes.shape[1], device=boxes.device)
    # Boxes are sorted by score, so a lower number has a higher score.
    is_earlier = number[None, :, None] > number[None, None, :]
    return ~(shared <= union.mul_(max_iou)) & is_earlier
