"""Greedy non-maximum suppression of boxes, by IoU or by the share of the smaller box."""

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from facepipe.types import Int64


def apply_nms(boxes: npt.NDArray[np.floating], scores: npt.NDArray[np.floating], max_iou: float) -> Int64:
    """Indices of the boxes (n, 4) kept, by falling score; equal scores in their order. Scores are above 0."""
    if not len(boxes):
        return np.empty(0, np.int64)
    sides = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).astype(np.float64)
    suppress: Any = cv2.dnn.NMSBoxes  # takes arrays, whatever its stubs say
    kept = suppress(sides, scores.astype(np.float32), 0.0, max_iou)
    return np.asarray(kept, np.int64).reshape(-1)


def apply_nms_by_smaller(boxes: npt.NDArray[np.floating], scores: npt.NDArray[np.floating], max_share: float) -> Int64:
    """As apply_nms, but overlap counts as a share of the smaller box, so that a box inside another goes.

    Areas are those of inclusive corners, as in MTCNN's original.
    """
    left = np.argsort(-scores, kind="stable")
    area = np.prod(boxes[:, 2:] - boxes[:, :2] + 1, 1)
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        low, high = np.maximum(boxes[best, :2], boxes[left, :2]), np.minimum(boxes[best, 2:], boxes[left, 2:])
        overlap = np.prod(np.clip(high - low + 1, 0, None), 1)
        left = left[overlap <= max_share * np.minimum(area[best], area[left])]
    return np.array(kept, np.int64)
