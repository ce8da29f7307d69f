"""The five landmarks of detectors that give boxes only, from dlib's 5-point predictor.

The predictor finds the corners of the eyes and the base of the nose. The field's five points are linear in the position
of that base between the eyes, with constants measured on LFW.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from facepipe.imaging.dlib_chip import PredictPoints, Rect
from facepipe.types import Float32, UInt8Image

# Least squares on 353 faces of LFW (one image in nine) against RetinaFace's points, forced to be mirror images of each
# other. The origin is midway between the two eyes' means of corners; x runs along the line from the left to the right
# one, and the unit is their distance. A landmark is _REST + x * _ACROSS + y * _DOWN, with the base of the nose at
# (x, y), on average at (0, 0.760). On held-out halves the median error is 0.04 of the distance at the eyes, 0.06 at the
# nose and 0.09 at the mouth; MTCNN's own points are 0.05 to 0.07 off RetinaFace's.
_REST = np.array([(-0.447, -0.068), (0.447, -0.068), (0.0, -0.201), (-0.392, 0.655), (0.392, 0.655)])
_ACROSS = np.array([(0.167, 0.013), (0.167, -0.013), (1.241, 0.0), (0.169, -0.011), (0.169, 0.011)])
_DOWN = np.array([(-0.113, 0.053), (0.113, 0.053), (0.0, 0.988), (-0.071, 0.538), (0.071, 0.538)])


def to_five_points(dlib_points: npt.NDArray[np.generic]) -> Float32:
    """Convert dlib's points to the five landmarks.

    Args:
        dlib_points: (n, 5, 2) outer and inner corner of the eye on the image's right, the same on its left, base of the
            nose.

    Returns:
        (n, 5, 2) left eye, right eye, tip of the nose, corners of the mouth.
    """
    points = np.asarray(dlib_points, np.float64).reshape(-1, 5, 2)
    right_eye = points[:, :2].mean(1)
    left_eye = points[:, 2:4].mean(1)
    # The coordinate system of each face.
    origin = (left_eye + right_eye) / 2
    x_axis = right_eye - left_eye
    # The x axis turned by a quarter, so that y points down the face.
    y_axis = np.stack([-x_axis[:, 1], x_axis[:, 0]], 1)
    squared_length = np.maximum((x_axis**2).sum(1), 1e-9)
    # The base of the nose in it, the landmarks in it, and these in the image.
    nose_base = points[:, 4] - origin
    x = (nose_base * x_axis).sum(1) / squared_length
    y = (nose_base * y_axis).sum(1) / squared_length
    landmarks = _REST + x[:, None, None] * _ACROSS + y[:, None, None] * _DOWN
    in_image = origin[:, None] + landmarks[..., :1] * x_axis[:, None] + landmarks[..., 1:] * y_axis[:, None]
    return in_image.astype(np.float32)


def predict_landmarks(predict_points: PredictPoints, image: UInt8Image, rectangles: Iterable[Rect]) -> Float32:
    """Predict the landmarks of the faces in dlib's rectangles.

    Args:
        predict_points: dlib's landmark predictor.
        image: (h, w, 3) RGB.
        rectangles: One per face.

    Returns:
        (n, 5, 2).
    """
    dlib_points = [predict_points(image, rectangle) for rectangle in rectangles]
    return to_five_points(np.array(dlib_points, np.float64).reshape(-1, 5, 2))
