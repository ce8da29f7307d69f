"""Average precision of a detector as in PASCAL VOC since 2010: the area below the precision-recall curve's envelope.

WIDER FACE's own protocol differs. It has easy, medium and hard subsets, and ignores the faces of the others. It
stretches scores over the whole set, and samples the curve at 1000 thresholds. Here every annotated face counts.
"""

import numpy as np
import torch

from facepipe.training.detection.overlap import compute_iou
from facepipe.types import Bool, Float32


def mark_correct(detected: Float32, annotated: Float32, min_iou: float = 0.5) -> Bool:
    """Mark the detected boxes that are correct, (n,).

    A box is correct if it overlaps its best annotated box enough, and no box with a higher score did so before.

    Args:
        detected: boxes x1 y1 x2 y2 by falling score, (n, 4).
        annotated: annotated boxes, (m, 4).
        min_iou: minimum overlap.
    """
    is_correct = np.zeros(len(detected), bool)
    if not len(annotated):
        return is_correct
    # The best annotated box of each detected one, and its overlap, both (n,).
    overlaps, faces = compute_iou(torch.from_numpy(detected), torch.from_numpy(annotated)).max(1)
    matched: set[int] = set()
    for n, (overlap, face) in enumerate(zip(overlaps.tolist(), faces.tolist(), strict=True)):
        if overlap >= min_iou and face not in matched:
            matched.add(face)
            is_correct[n] = True
    return is_correct


def compute_average_precision(scores: Float32, is_correct: Bool, annotated: int) -> float:
    """Compute the average precision; 0 if there are no boxes.

    Args:
        scores: score of each detected box, (n,), in any order.
        is_correct: whether each box is correct, (n,).
        annotated: number of annotated boxes.
    """
    if not annotated or not len(scores):
        return 0.0
    # Precision after each box by falling score; the envelope makes it fall from left to right.
    hits = np.cumsum(is_correct[np.argsort(-scores, kind="stable")])
    precision = hits / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    # Recall rises by one face at each hit, so the area is the sum of the envelope at hits.
    return float(np.diff(hits, prepend=0) @ envelope / annotated)
