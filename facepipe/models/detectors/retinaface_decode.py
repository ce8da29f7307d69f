"""RetinaFace around its network, in NumPy: input scaling, anchors, decoding and NMS.

Constants are those of the public PyTorch implementation by biubug6 (data/config.py, prior_box.py, box_utils.py).
"""

from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

from facepipe.models.protocols import DetectionLimits, Faces
from facepipe.types import Bool, Float32, Int64, UInt8Image

STRIDES = (8, 16, 32)
ANCHOR_SIDES = ((16, 32), (64, 128), (256, 512))
MEAN_BGR = (104.0, 117.0, 123.0)
CENTRE_VARIANCE = 0.1
SIZE_VARIANCE = 0.2
# Candidates per image that NMS looks at, by falling score.
_MAX_CANDIDATES = 5000


@lru_cache(maxsize=64)
def build_anchors(height: int, width: int) -> Float32:
    """Build the anchors of an input.

    Returns:
        (a, 4) centre x, centre y, width and height in pixels, by level, row, column and size.
    """
    levels = []
    for stride, sides in zip(STRIDES, ANCHOR_SIDES, strict=True):
        rows = -(-height // stride)
        columns = -(-width // stride)
        y, x, side = np.meshgrid(np.arange(rows), np.arange(columns), np.array(sides), indexing="ij")
        levels.append(np.stack([(x + 0.5) * stride, (y + 0.5) * stride, side, side], -1).reshape(-1, 4))
    return np.concatenate(levels).astype(np.float32)


def to_bgr_planes(images: UInt8Image) -> Float32:
    """Convert images to BGR planes minus the mean.

    Args:
        images: (n, h, w, 3) RGB.

    Returns:
        (n, 3, h, w).
    """
    planes = np.empty((len(images), 3, *images.shape[1:3]), np.float32)
    for image, bgr in zip(images, planes, strict=True):
        # A tenth of the time of OpenCV's blobFromImages, for the same numbers.
        for n, channel in enumerate(cv2.split(image)):
            np.subtract(channel, np.float32(MEAN_BGR[2 - n]), out=bgr[2 - n], dtype=np.float32)
    return planes


class RetinaFaceOutputs(NamedTuple):
    """What the network computes for the anchors of one image.

    Attributes:
        offsets: (a, 4) of the boxes.
        scores: (a,) probability of a face.
        points: (a, 10) offsets of the landmarks.
    """

    offsets: Float32
    scores: Float32
    points: Float32


def decode_faces(outputs: RetinaFaceOutputs, shape: tuple[int, int], limits: DetectionLimits) -> Faces:
    """Decode the faces of one image.

    Args:
        outputs: What the network computed.
        shape: (height, width) of its input.
        limits: Which faces are kept.
    """
    candidates = _select_best(outputs.scores, limits.min_score)
    boxes = _decode_boxes(outputs, candidates, shape)
    selected = apply_sorted_nms(boxes, limits.max_iou)
    anchors_used = candidates[selected]
    anchors = build_anchors(*shape)[anchors_used]
    # Landmarks are decoded for the kept faces only, (n, 5, 2).
    offsets = outputs.points[anchors_used].reshape(-1, 5, 2)
    landmarks = anchors[:, None, :2] + offsets * CENTRE_VARIANCE * anchors[:, None, 2:]
    return Faces(boxes[selected], landmarks, outputs.scores[anchors_used])


def decode_confident_faces(
    outputs: RetinaFaceOutputs,
    shape: tuple[int, int],
    *,
    reject_below: float,
    accept_above: float,
    max_iou: float,
) -> Faces | None:
    """Decode the faces of one image if the result is beyond doubt.

    NMS down to `reject_below` would keep a doubtful box exactly if a candidate of such a score overlaps no accepted
    face: the best of these cannot be suppressed by anything else.

    Args:
        outputs: What the network computed.
        shape: (height, width) of its input.
        reject_below: What scores less is not a face.
        accept_above: What scores this or more is a face.
        max_iou: Highest overlap of two faces.

    Returns:
        The accepted faces; None if there is none, or if a candidate between the two scores overlaps none of them.
    """
    faces = decode_faces(outputs, shape, DetectionLimits(accept_above, max_iou))
    if not len(faces.scores):
        return None
    doubtful = np.flatnonzero((outputs.scores >= reject_below) & (outputs.scores < accept_above))
    boxes = _decode_boxes(outputs, doubtful, shape)
    is_covered = np.zeros(len(doubtful), bool)
    for box in faces.boxes:
        is_covered |= _overlap_more_than(max_iou, box, boxes)
    return faces if is_covered.all() else None


def _select_best(scores: Float32, min_score: float) -> Int64:
    """Select the anchors of at least that score, by falling score."""
    candidates = np.flatnonzero(scores >= min_score)
    return candidates[np.argsort(-scores[candidates], kind="stable")[:_MAX_CANDIDATES]]


def _decode_boxes(outputs: RetinaFaceOutputs, candidates: Int64, shape: tuple[int, int]) -> Float32:
    anchors = build_anchors(*shape)[candidates]
    offsets = outputs.offsets[candidates]
    centre = anchors[:, :2] + offsets[:, :2] * CENTRE_VARIANCE * anchors[:, 2:]
    sides = anchors[:, 2:] * np.exp(np.clip(offsets[:, 2:] * SIZE_VARIANCE, -10, 10))
    return np.asarray(np.concatenate([centre - sides / 2, centre + sides / 2], 1), np.float32)


def apply_sorted_nms(boxes: Float32, max_iou: float) -> Int64:
    """Select the boxes that overlap no box before them too much.

    Args:
        boxes: (n, 4) by falling score.
        max_iou: Highest overlap, as intersection over union.

    Returns:
        Indices of the selected boxes.
    """
    candidates = np.arange(len(boxes))
    selected = []
    while len(candidates):
        best = candidates[0]
        rest = candidates[1:]
        selected.append(best)
        candidates = rest[~_overlap_more_than(max_iou, boxes[best], boxes[rest])]
    return np.array(selected, np.int64)


def _overlap_more_than(max_iou: float, box: Float32, boxes: Float32) -> Bool:
    """Return whether boxes (n, 4) overlap one box (4,) by more than `max_iou`."""
    low = np.maximum(box[:2], boxes[:, :2])
    high = np.minimum(box[2:], boxes[:, 2:])
    overlap = np.prod(np.clip(high - low, 0, None), 1)
    area = np.prod(boxes[:, 2:] - boxes[:, :2], 1)
    return np.asarray(overlap > max_iou * (area + np.prod(box[2:] - box[:2]) - overlap))
