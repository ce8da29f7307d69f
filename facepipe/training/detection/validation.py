"""The score of a detector in training: its average precision on held-out images."""

from collections.abc import Iterator

import cv2
import numpy as np
from torch import nn

from facepipe.models.detectors.retinaface import Channels
from facepipe.models.protocols import DetectionLimits, Faces
from facepipe.training.detection.annotations import AnnotatedFaces
from facepipe.training.detection.average_precision import compute_average_precision, mark_correct
from facepipe.training.detection.config import DetectionConfig
from facepipe.training.detection.detector import detect
from facepipe.training.detection.folder import AnnotatedFolder
from facepipe.types import UInt8Image


def measure_average_precision(
    net: nn.Module, held: AnnotatedFolder, config: DetectionConfig, channels: Channels
) -> dict[str, float]:
    """Measure the average precision of a network in evaluation mode.

    Args:
        net: RetinaFaceNet.
        held: held-out images.
        config: how to validate.
        channels: colour order of the network.

    Returns:
        score (average precision at an IoU of 0.5), recall, and counts.
    """
    # Collect scores and correctness over all images; they are ranked together at the end.
    scores = [np.empty(0, np.float32)]
    correct = [np.empty(0, bool)]
    annotated = 0
    images = 0
    for image, truth in _iterate_images(held, config):
        faces = _detect_shrunk(net, image, config, channels)
        scores.append(faces.scores)
        correct.append(mark_correct(faces.boxes, truth.boxes))
        annotated += len(truth.boxes)
        images += 1
    is_correct = np.concatenate(correct)
    requested = len(held.annotations.paths[: config.held_count or None])
    return {
        "score": compute_average_precision(np.concatenate(scores), is_correct, annotated),
        "recall": float(is_correct.sum() / max(annotated, 1)),
        "images": float(images),
        "faces": float(annotated),
        "images_unreadable": float(requested - images),
    }


def _iterate_images(held: AnnotatedFolder, config: DetectionConfig) -> Iterator[tuple[UInt8Image, AnnotatedFaces]]:
    count = config.held_count or len(held.annotations.paths)
    for row in held.rows[held.rows < count]:
        image = held.load_pixels(int(row))
        if image is not None:
            yield image, held.annotations.get_faces(int(row))


def _detect_shrunk(net: nn.Module, image: UInt8Image, config: DetectionConfig, channels: Channels) -> Faces:
    """Shrink an image to `held_size`, and return its faces in the original image's pixels."""
    # Shrink only, since enlarging adds nothing to detect.
    scale = min(1.0, config.held_size / max(image.shape[:2]))
    h, w = (max(1, round(side * scale)) for side in image.shape[:2])
    shrunk = np.asarray(cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA), np.uint8) if scale < 1 else image
    faces = detect(net, shrunk, channels, DetectionLimits(config.held_score, config.held_overlap))
    # Width and height are rounded separately, so each axis has its own factor.
    factors = np.array([image.shape[1] / w, image.shape[0] / h], np.float32)
    boxes = (faces.boxes.reshape(-1, 2, 2) * factors).reshape(-1, 4)
    return Faces(boxes, faces.landmarks * factors, faces.scores)
