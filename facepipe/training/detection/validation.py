"""The score of a detector under training: its average precision on held images."""

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
    """`score` (average precision at IoU .5), recall, and counts of a network in evaluation mode."""
    scores, right, truths, images = [np.empty(0, np.float32)], [np.empty(0, bool)], 0, 0
    for image, truth in _iterate_images(held, config):
        faces = _detect_shrunk(net, image, config, channels)
        scores.append(faces.scores)
        right.append(mark_correct(faces.boxes, truth.boxes))
        truths, images = truths + len(truth.boxes), images + 1
    hits = np.concatenate(right)
    asked = len(held.annotations.paths[: config.held_count or None])
    return {
        "score": compute_average_precision(np.concatenate(scores), hits, truths),
        "recall": float(hits.sum() / max(truths, 1)),
        "images": float(images),
        "faces": float(truths),
        "images_unreadable": float(asked - images),
    }


def _iterate_images(held: AnnotatedFolder, config: DetectionConfig) -> Iterator[tuple[UInt8Image, AnnotatedFaces]]:
    for row in held.rows[held.rows < (config.held_count or len(held.annotations.paths))]:
        image = held.load_pixels(int(row))
        if image is not None:
            yield image, held.annotations.get_faces(int(row))


def _detect_shrunk(net: nn.Module, image: UInt8Image, config: DetectionConfig, channels: Channels) -> Faces:
    """Faces in the image's own pixels, found in one whose longest side is at most `held_size`."""
    scale = min(1.0, config.held_size / max(image.shape[:2]))
    h, w = (max(1, round(side * scale)) for side in image.shape[:2])
    shrunk = np.asarray(cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA), np.uint8) if scale < 1 else image
    faces = detect(net, shrunk, channels, DetectionLimits(config.held_score, config.held_overlap))
    back = np.array([image.shape[1] / w, image.shape[0] / h], np.float32)
    return Faces((faces.boxes.reshape(-1, 2, 2) * back).reshape(-1, 4), faces.landmarks * back, faces.scores)
