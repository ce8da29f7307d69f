"""dlib's frontal face detector (HOG, after Felzenszwalb et al., PAMI 2010), as the package face_recognition runs it."""

import math
from typing import Any

import numpy as np

from facepipe.errors import ModelError
from facepipe.models.detectors.five_points import Predict, predict_landmarks
from facepipe.models.detectors.nms import apply_nms
from facepipe.models.protocols import Faces
from facepipe.types import UInt8Image

_UPSAMPLED = 1
_AT_THRESHOLD = 0.7


class DlibHog:
    """dlib's detector in the image doubled once. `limits`: lowest score, highest overlap (IoU) kept.

    predict: (image, rectangle) -> dlib's five points; the detector gives boxes only. They may reach over
    the image's edge: `face_encodings(image)` takes them so, though `face_locations` trims what it returns.
    dlib's threshold has a score of 0.7 here: a score is the logistic function of dlib's plus ln(7 / 3), so that
    `min_score = 0.7` finds what dlib does, and less finds more. Raises ModelError where dlib is not installed.
    """

    stride = 1

    def __init__(self, predict: Predict, limits: tuple[float, float]):
        self._detector, self._predict, self._limits = _detector(), predict, limits

    def detect(self, images: UInt8Image) -> list[Faces]:
        return [self._one(image) for image in images]

    def _one(self, image: UInt8Image) -> Faces:
        min_score, max_iou = self._limits
        found, margins, _ = self._detector.run(np.ascontiguousarray(image), _UPSAMPLED, to_dlib_threshold(min_score))
        rectangles = np.array([(r.left(), r.top(), r.right(), r.bottom()) for r in found], np.int64).reshape(-1, 4)
        scores = _score(np.array(margins, np.float64))
        kept = apply_nms(rectangles.astype(np.float32), scores, max_iou)
        rectangles = rectangles[kept]
        points = predict_landmarks(self._predict, image, [(x1, y1, x2, y2) for x1, y1, x2, y2 in rectangles.tolist()])
        return Faces(rectangles.astype(np.float32), points, scores[kept].astype(np.float32))


def to_dlib_threshold(min_score: float) -> float:
    """What dlib's detector adds to its threshold, from the lowest score wanted."""
    inside = min(max(min_score, 1e-3), 1 - 1e-6)
    return _logit(inside) - _logit(_AT_THRESHOLD)


def _logit(p: float) -> float:
    return math.log(p / (1 - p))


def _score(margin: Any) -> Any:
    return 1 / (1 + np.exp(-margin - _logit(_AT_THRESHOLD)))


def _detector() -> Any:
    try:
        import dlib
    except ImportError as error:
        raise ModelError("dlib-hog needs the package dlib: pip install dlib-bin") from error
    return dlib.get_frontal_face_detector()
