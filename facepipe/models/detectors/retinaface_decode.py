"""RetinaFace around its network, in NumPy: input scaling, anchors, decoding, suppression.

Constants are those of the public PyTorch implementation by biubug6 (data/config.py, prior_box.py, box_utils.py).
"""

from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

from facepipe.models.protocols import Faces
from facepipe.types import Bool, Float32, Int64, UInt8Image

STRIDES = (8, 16, 32)
ANCHOR_SIDES = ((16, 32), (64, 128), (256, 512))
MEAN_BGR = (104.0, 117.0, 123.0)
CENTRE_VARIANCE, SIZE_VARIANCE = 0.1, 0.2
_MAX_CANDIDATES = 5000


@lru_cache(maxsize=64)
def build_anchors(height: int, width: int) -> Float32:
    """(a, 4) centre x, centre y, width, height in pixels."""
    levels = []
    for stride, sides in zip(STRIDES, ANCHOR_SIDES, strict=True):
        rows, columns = -(-height // stride), -(-width // stride)
        y, x, side = np.meshgrid(np.arange(rows), np.arange(columns), np.array(sides), indexing="ij")
        levels.append(np.stack([(x + 0.5) * stride, (y + 0.5) * stride, side, side], -1).reshape(-1, 4))
    return np.concatenate(levels).astype(np.float32)


def to_bgr_planes(images: UInt8Image) -> Float32:
    """(n, h, w, 3) uint8 RGB -> (n, 3, h, w) float32 BGR minus the mean."""
    planes = np.empty((len(images), 3, *images.shape[1:3]), np.float32)
    for image, bgr in zip(images, planes, strict=True):
        # A tenth of the time of OpenCV's blobFromImages, for the same numbers.
        for n, channel in enumerate(cv2.split(image)):
            np.subtract(channel, np.float32(MEAN_BGR[2 - n]), out=bgr[2 - n], dtype=np.float32)
    return planes


class RetinaFaceOutputs(NamedTuple):
    """What the network says of one image's anchors: offsets (a, 4), face probability (a,), landmark offsets (a, 10)."""

    offsets: Float32
    scores: Float32
    points: Float32


def decode_faces(
    offsets: Float32, scores: Float32, points: Float32, shape: tuple[int, int], limits: tuple[float, float]
) -> Faces:
    """Faces of one image of `shape` (h, w) from the `RetinaFaceOutputs`; `limits`: lowest score and highest overlap
    (IoU) kept.
    """
    outputs = RetinaFaceOutputs(offsets, scores, points)
    keep = _best(scores, limits[0])
    boxes = _boxes(outputs, keep, shape)
    best = apply_sorted_nms(boxes, limits[1])
    kept = keep[best]
    prior = build_anchors(*shape)[kept]
    shifts = points[kept].reshape(-1, 5, 2)
    landmarks = prior[:, None, :2] + shifts * CENTRE_VARIANCE * prior[:, None, 2:]
    return Faces(boxes[best], landmarks, scores[kept])


def decode_confident_faces(
    outputs: RetinaFaceOutputs, shape: tuple[int, int], limits: tuple[float, float, float]
) -> Faces | None:
    """Faces of one image where all are surely some, else None; `limits`: doubtful score, sure score, highest overlap.

    Of suppression down to the doubtful score something between the two would be left exactly where a candidate of
    such a score overlaps no sure face: the best of these cannot be suppressed by anything else.
    """
    doubtful, sure, max_iou = limits
    found = decode_faces(*outputs, shape, (sure, max_iou))
    if not len(found.scores):
        return None
    rest = np.flatnonzero((outputs.scores >= doubtful) & (outputs.scores < sure))
    boxes = _boxes(outputs, rest, shape)
    covered = np.zeros(len(rest), bool)
    for box in found.boxes:
        covered |= _overlapping(box, boxes, max_iou)
    return found if covered.all() else None


def _best(scores: Float32, min_score: float) -> Int64:
    """Anchors from that score on, by falling score."""
    keep = np.flatnonzero(scores >= min_score)
    return keep[np.argsort(-scores[keep], kind="stable")[:_MAX_CANDIDATES]]


def _boxes(outputs: RetinaFaceOutputs, keep: Int64, shape: tuple[int, int]) -> Float32:
    prior, offsets = build_anchors(*shape)[keep], outputs.offsets[keep]
    centre = prior[:, :2] + offsets[:, :2] * CENTRE_VARIANCE * prior[:, 2:]
    side = prior[:, 2:] * np.exp(np.clip(offsets[:, 2:] * SIZE_VARIANCE, -10, 10))
    return np.asarray(np.concatenate([centre - side / 2, centre + side / 2], 1), np.float32)


def apply_sorted_nms(boxes: Float32, max_iou: float) -> Int64:
    """Greedy non-maximum suppression of boxes (n, 4) sorted by falling score; the indices kept."""
    alive, kept = np.arange(len(boxes)), []
    while len(alive):
        first, alive = alive[0], alive[1:]
        kept.append(first)
        alive = alive[~_overlapping(boxes[first], boxes[alive], max_iou)]
    return np.array(kept, np.int64)


def _overlapping(box: Float32, boxes: Float32, max_iou: float) -> Bool:
    """(n,) whether boxes (n, 4) overlap one (4,) by more than `max_iou`."""
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    overlap = np.prod(np.clip(high - low, 0, None), 1)
    area = np.prod(boxes[:, 2:] - boxes[:, :2], 1)
    return np.asarray(overlap > max_iou * (area + np.prod(box[2:] - box[:2]) - overlap))
