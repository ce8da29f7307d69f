"""Average precision of a detector, as in PASCAL VOC since 2010: the area below the precision-recall curve's envelope.

WIDER FACE's own protocol differs: it has easy, medium and hard subsets, whose other faces are neither right nor wrong,
stretches scores over the whole set, and samples the curve at 1000 thresholds. Here every annotated face counts.
"""

import numpy as np
import torch

from facepipe.training.detection.overlap import compute_iou
from facepipe.types import Bool, Float32


def mark_correct(found: Float32, truth: Float32, min_iou: float = 0.5) -> Bool:
    """Which of the boxes found (n, 4), by falling score, are right, given the true ones (m, 4).

    One is right where it overlaps its best true box by `min_iou` or more, and no earlier one was right with that.
    """
    right = np.zeros(len(found), bool)
    if not len(truth):
        return right
    best, which = compute_iou(torch.from_numpy(found), torch.from_numpy(truth)).max(1)
    taken: set[int] = set()
    for n, (overlap, face) in enumerate(zip(best.tolist(), which.tolist(), strict=True)):
        if overlap >= min_iou and face not in taken:
            taken.add(face)
            right[n] = True
    return right


def compute_average_precision(scores: Float32, right: Bool, truths: int) -> float:
    """Of all boxes found (n,) in any order, and the number of true boxes; 0 where there are none."""
    if not truths or not len(scores):
        return 0.0
    hits = np.cumsum(right[np.argsort(-scores, kind="stable")])
    precision = hits / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.diff(hits, prepend=0) @ envelope / truths)
