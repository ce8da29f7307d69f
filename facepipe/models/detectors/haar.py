"""OpenCV's Haar cascade for frontal faces (Viola and Jones, CVPR 2001; Lienhart and Maydt, ICIP 2002)."""

import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from facepipe.errors import ModelError
from facepipe.imaging.dlib_chip import find_dlib_square
from facepipe.models.detectors.five_points import Predict, predict_landmarks
from facepipe.models.detectors.nms import apply_nms
from facepipe.models.protocols import Faces
from facepipe.models.weights import verify_sha256
from facepipe.types import UInt8Image

SHA256 = "0f7d4527844eb514d4a4948e822da90fbb16a34a0bbbbc6adc6498747a5aafb0"
# Where dlib's box lies about a cascade's: median of 347 faces of LFW.
SQUARE = (-0.017, 0.085, 0.956)
_FILE = "haarcascade_frontalface_default.xml"
_STEP, _SMALLEST = 1.1, 20
# A group of 6 windows, the smallest that the usual minNeighbors=5 keeps, has a score of 0.7.
_HALF = 6 * 0.3 / 0.7


class Haar:
    """The cascade that OpenCV 4 carries. `limits`: lowest score, highest overlap (IoU) kept.

    predict: (image, rectangle) -> dlib's five points; the cascade gives boxes only.
    A score is n / (n + 2.57) for a group of n windows. Raises ModelError under OpenCV 5, which has no cascades.
    """

    stride = 1

    def __init__(self, predict: Predict, limits: tuple[float, float]):
        self._cascade, self._predict, self._limits = _cascade(), predict, limits

    def detect(self, images: UInt8Image) -> list[Faces]:
        return [self._one(image) for image in images]

    def _one(self, image: UInt8Image) -> Faces:
        min_score, max_iou = self._limits
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        found, windows = self._cascade.detectMultiScale2(
            grey, scaleFactor=_STEP, minNeighbors=smallest_group(min_score) - 1, minSize=(_SMALLEST, _SMALLEST)
        )
        corner = np.array(found, np.float32).reshape(-1, 4)
        boxes = np.concatenate([corner[:, :2], corner[:, :2] + corner[:, 2:] - 1], 1)
        count = np.array(windows, np.float32).reshape(-1)
        scores = count / (count + np.float32(_HALF))
        kept = apply_nms(boxes, scores, max_iou)
        points = predict_landmarks(self._predict, image, [find_dlib_square(box, SQUARE) for box in boxes[kept]])
        return Faces(boxes[kept], points, scores[kept])


def smallest_group(min_score: float) -> int:
    """How many windows a group needs at least for a score; 2, since OpenCV does not group single windows."""
    below_one = min(max(min_score, 0.0), 0.999)
    return max(2, math.ceil(below_one * _HALF / (1 - below_one) - 1e-9))


def _cascade() -> Any:
    folder = getattr(getattr(cv2, "data", None), "haarcascades", "")
    file = Path(folder) / _FILE
    if not hasattr(cv2, "CascadeClassifier") or not file.is_file():
        raise ModelError(
            f"haar needs OpenCV 4: OpenCV {cv2.__version__} has no Haar cascades. "
            "pip install 'opencv-python<5', or take another detector"
        )
    verify_sha256(file.read_bytes(), SHA256, str(file))
    return cv2.CascadeClassifier(str(file))
