"""Greedy non-maximum suppression of whole batches without a word to the host, equal to `retinaface_decode.suppress`.

Greedy suppression is the one fixed point of "kept is who is valid and overlapped by nobody kept before him". Applied
again and again from "all are kept", that rule settles in as many rounds as the longest chain of suppressions has links
(up to 5 on photos), each round being one pass over an (n, k, k) matrix. The loop over k that does the same has k small
steps, one after the other: some hundred launches where this has a dozen.
"""

import torch
from torch import Tensor


def apply_nms(boxes: Tensor, valid: Tensor, max_iou: float, rounds: int | None = None) -> tuple[Tensor, Tensor]:
    """(kept (n, k), settled (n,)), both bool: what greedy suppression keeps of each image's boxes.

    boxes: (n, k, 4) float32 x1 y1 x2 y2, by falling score; valid: (n, k) bool, False for places that hold no box
    rounds: how often the rule is applied; None: k times, after which it has settled whatever the boxes are. With fewer
        an image that is not `settled` may keep others than the greedy rule would
    """
    k = boxes.shape[1]
    if k == 0:
        return valid, valid.new_ones(len(valid))
    covered = overlapping(boxes, max_iou) & valid[:, None, :]
    kept, settled = valid, valid.new_zeros(len(valid))
    for _ in range(k if rounds is None else rounds):
        after = valid & ~(covered & kept[:, None, :]).any(2)
        settled, kept = (after == kept).all(1), after
    return kept, settled | (k == 1)


def overlapping(boxes: Tensor, max_iou: float) -> Tensor:
    """(n, k, k) bool: whether box [., i] overlaps an earlier box [., j], j < i, by more than max_iou.

    The arithmetic is that of `retinaface_decode.suppress`, operation by operation, so that it rounds alike.
    """
    x1, y1, x2, y2 = boxes.unbind(2)
    area = (x2 - x1) * (y2 - y1)

    def side(low: Tensor, high: Tensor) -> Tensor:
        high = torch.minimum(high[:, :, None], high[:, None, :])
        return high.sub_(torch.maximum(low[:, :, None], low[:, None, :])).clamp_(min=0)

    shared = side(x1, x2).mul_(side(y1, y2))
    union = (area[:, :, None] + area[:, None, :]).sub_(shared)
    return ~(shared <= union.mul_(max_iou)) & _earlier(boxes.shape[1], boxes.device)


def _earlier(k: int, device: torch.device) -> Tensor:
    at = torch.arange(k, device=device)
    return at[None, :, None] > at[None, None, :]
