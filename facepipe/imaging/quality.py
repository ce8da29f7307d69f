"""How much of a face can be seen, and how far its vector can be trusted."""

from dataclasses import dataclass

import numpy as np

from facepipe.types import Bool, Float32, Float64

# A mirrored border completes faces that the edge of a picture cuts. What shows less than this is mostly mirror.
MIN_VISIBLE = 0.6
# A large part of a face stays recognisable: its shorter side is this share of the picture's or more.
_LARGE_PART = 0.6
# Landmarks beside the picture, of five, from which on a face is mostly mirror.
MAX_MIRRORED_LANDMARKS = 2

# Values at which a term of the quality has lost a third (1 - 1/e): pixels of the box, variance of the Laplacian.
_SIZE_SCALE = 30.0
_SHARPNESS_SCALE = 5.0
# Powers of ten by which a score must be near 1 for a full term: 0.7 gives 0.15, 0.9 gives 0.29, and 0.999 gives 0.86.
_SCORE_POWERS = 3.5
# Heads may be turned so far without losing anything.
_FREE_YAW = 45.0


def measure_visible(boxes: Float32, sizes: Float64) -> Float64:
    """Measure which share of each box lies inside its picture.

    Args:
        boxes: (n, 4) in pixels of the full-size pictures.
        sizes: Width and height of the picture of each box, (n, 2), or of the one picture, (2,).

    Returns:
        (n,) from 0 to 1.
    """
    # Pixel centres are at whole coordinates, so a picture reaches half a pixel past them.
    low = boxes[:, :2].astype(np.float64)
    high = boxes[:, 2:].astype(np.float64)
    inside = np.clip(np.minimum(high, sizes - 0.5) - np.maximum(low, -0.5), 0, None).prod(1)
    return inside / np.maximum((high - low).prod(1), 1e-9)


def find_shown_faces(boxes: Float32, landmarks: Float32, sizes: Float64) -> Bool:
    """Find the faces that are not mostly mirror, or of which a large part is shown.

    Args:
        boxes: (n, 4) in pixels of the full-size pictures.
        landmarks: (n, 5, 2).
        sizes: Width and height of the picture of each box, (n, 2), or of the one picture, (2,).

    Returns:
        (n,).
    """
    limits = sizes[:, None] if sizes.ndim == 2 else sizes
    is_beside = ((landmarks < -0.5) | (landmarks > limits - 0.5)).any(2)
    is_shown = measure_visible(boxes, sizes) >= MIN_VISIBLE
    # A close-up that fills the picture may be cut on several sides.
    inside = np.minimum(boxes[:, 2:], sizes - 0.5) - np.maximum(boxes[:, :2], -0.5)
    is_large = inside.min(1, initial=np.inf) >= _LARGE_PART * sizes.min(-1)
    return np.asarray((is_shown & (is_beside.sum(1) < MAX_MIRRORED_LANDMARKS)) | is_large, bool)


@dataclass(frozen=True)
class QualityFigures:
    """What the quality of faces follows from; all are (n,).

    Attributes:
        scores: Confidence of the detector.
        visible: Share inside the picture.
        face_px: Shorter side of the box.
        sharpness: Variance of the Laplacian on the chip.
        yaw: Degrees.
        plausibility: How plausible the landmarks are, 0 to 1.
    """

    scores: Float64
    visible: Float64
    face_px: Float64
    sharpness: Float64
    yaw: Float64
    plausibility: Float64


def estimate_quality(figures: QualityFigures) -> Float64:
    """Estimate the quality of faces, (n,) from 0 to 1: the product of six terms, each of which is 1 for a good face.

    The terms are simple curves, not fitted ones. docs/format.md says how well they order errors on LFW.
    """
    score = np.clip(-np.log10(np.maximum(1 - figures.scores, 1e-9)) / _SCORE_POWERS, 0, 1)
    visible = np.clip((figures.visible - 0.5) / 0.45, 0, 1)
    size = 1 - np.exp(-figures.face_px / _SIZE_SCALE)
    sharpness = 1 - np.exp(-figures.sharpness / _SHARPNESS_SCALE)
    pose = np.clip(np.cos(np.radians(figures.yaw)) / np.cos(np.radians(_FREE_YAW)), 0, 1)
    plausibility = np.clip(figures.plausibility, 0.05, 1) ** 0.5
    return np.asarray(score * visible * size * sharpness * pose * plausibility, np.float64)
