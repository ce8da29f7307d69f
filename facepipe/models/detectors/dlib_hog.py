"""dlib's frontal face detector (HOG, after Felzenszwalb et al., PAMI 2010), as the package face_recognition runs it."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from facepipe.extras import require_module
from facepipe.imaging.dlib_chip import PredictPoints
from facepipe.models.detectors.five_points import predict_landmarks
from facepipe.models.detectors.nms import apply_nms
from facepipe.models.protocols import DetectionLimits, Faces
from facepipe.types import UInt8Image

# Doublings of the image before the search, as face_recognition does it by default.
_UPSAMPLINGS = 1
_SCORE_AT_DLIB_THRESHOLD = 0.7


class DlibHog:
    """dlib's detector in the image enlarged to twice its size.

    Boxes may reach past the edge of the image. `face_encodings(image)` uses them so, though `face_locations` trims what
    it returns. A score is the logistic function of dlib's score plus ln(7 / 3): dlib's own threshold has the score 0.7,
    so that `min_score = 0.7` finds what dlib does, and a lower one finds more.

    Attributes:
        stride: Image sides must be multiples of it.
    """

    stride = 1

    def __init__(self, predict_points: PredictPoints, limits: DetectionLimits):
        """Load dlib.

        Args:
            predict_points: dlib's landmark predictor; the detector itself only gives boxes.
            limits: Which faces are kept.

        Raises:
            ModelError: dlib is not installed.
        """
        self._detector = _load_dlib_detector()
        self._predict_points = predict_points
        self._limits = limits

    def detect(self, images: Sequence[UInt8Image]) -> list[Faces]:
        """Find the faces of each image; see `Detector`."""
        return [self._detect_one(image) for image in images]

    def _detect_one(self, image: UInt8Image) -> Faces:
        adjustment = to_dlib_threshold(self._limits.min_score)
        dlib_boxes, dlib_scores, _ = self._detector.run(np.ascontiguousarray(image), _UPSAMPLINGS, adjustment)
        # Corners are inclusive pixels; NMS takes them as they are.
        corners = [(box.left(), box.top(), box.right(), box.bottom()) for box in dlib_boxes]
        rectangles = np.array(corners, np.int64).reshape(-1, 4)
        scores = _to_score(np.array(dlib_scores, np.float64))
        selected = apply_nms(rectangles.astype(np.float32), scores, self._limits.max_iou)
        rectangles = rectangles[selected]
        rects = [(x1, y1, x2, y2) for x1, y1, x2, y2 in rectangles.tolist()]
        landmarks = predict_landmarks(self._predict_points, image, rects)
        return Faces(rectangles.astype(np.float32), landmarks, scores[selected].astype(np.float32))


def to_dlib_threshold(min_score: float) -> float:
    """Convert the lowest score to what dlib's detector adds to its threshold."""
    clipped = min(max(min_score, 1e-3), 1 - 1e-6)
    return _compute_logit(clipped) - _compute_logit(_SCORE_AT_DLIB_THRESHOLD)


def _compute_logit(p: float) -> float:
    return math.log(p / (1 - p))


def _to_score(dlib_score: Any) -> Any:
    return 1 / (1 + np.exp(-dlib_score - _compute_logit(_SCORE_AT_DLIB_THRESHOLD)))


def _load_dlib_detector() -> Any:
    require_module("dlib", "the detector dlib-hog")
    import dlib

    return dlib.get_frontal_face_detector()
