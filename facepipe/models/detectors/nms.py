"""Greedy non-maximum suppression of boxes, by IoU or by the share of the smaller box."""

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from facepipe.types import Int64

Boxes = npt.NDArray[np.floating]
Scores = npt.NDArray[np.floating]


def apply_nms(boxes: Boxes, scores: Scores, max_iou: float) -> Int64:
    """Select the boxes that overlap no box of a higher score too much.

    Args:
        boxes: (n, 4) x1 y1 x2 y2.
        scores: (n,), above 0.
        max_iou: Highest overlap, as intersection over union.

    Returns:
        Indices of the selected boxes, by falling score; equal scores keep their order.
    """
    if not len(boxes):
        return np.empty(0, np.int64)
    corners_and_sides = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).astype(np.float64)
    nms: Any = cv2.dnn.NMSBoxes  # takes arrays, whatever its stubs say
    return np.asarray(nms(corners_and_sides, scores.astype(np.float32), 0.0, max_iou), np.int64).reshape(-1)


def apply_nms_by_smaller(boxes: Boxes, scores: Scores, max_share: float) -> Int64:
    """Select boxes as `apply_nms` does, with the overlap as a share of the smaller box.

    A box inside another one is then dropped. Areas are those of inclusive corners, as in the original MTCNN.

    Args:
        boxes: (n, 4) x1 y1 x2 y2, corners inclusive.
        scores: (n,).
        max_share: Highest overlap.

    Returns:
        Indices of the selected boxes, by falling score; equal scores keep their order.
    """
    # Take the best of the rest, and drop what overlaps it, until nothing is left.
    candidates = np.argsort(-scores, kind="stable")
    areas = np.prod(boxes[:, 2:] - boxes[:, :2] + 1, 1)
    selected = []
    while len(candidates):
        best = candidates[0]
        rest = candidates[1:]
        selected.append(best)
        low = np.maximum(boxes[best, :2], boxes[rest, :2])
        high = np.minimum(boxes[best, 2:], boxes[rest, 2:])
        overlap = np.prod(np.clip(high - low + 1, 0, None), 1)
        candidates = rest[overlap <= max_share * np.minimum(areas[best], areas[rest])]
    return np.array(selected, np.int64)
