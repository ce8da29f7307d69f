"""SCRFD (Guo et al., ICLR 2022) with landmarks, run by ONNX Runtime.

The arithmetic is that of the public implementation (insightface, model_zoo/scrfd.py). Outputs are identified by their
shapes, because exports differ in names, order and a batch dimension.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from facepipe.errors import ModelError
from facepipe.models.detectors.nms import apply_nms
from facepipe.models.detectors.onnx_input import DetectorGraph, list_cells
from facepipe.models.protocols import DetectionLimits, Faces
from facepipe.types import Float32, UInt8Image

_STRIDES = (8, 16, 32)
_ANCHORS_PER_CELL = 2
# Side of the empty image on which a graph is tried.
_PROBE_SIDE = 64
_MAX_CANDIDATES = 5000


class _Level(NamedTuple):
    """Outputs of one stride, one row per anchor: distances are in strides from the anchor's point."""

    scores: Float32
    box_distances: Float32
    landmark_distances: Float32


class Scrfd:
    """An SCRFD graph on a CPU.

    Attributes:
        stride: Image sides must be multiples of it.
    """

    stride = 1

    def __init__(self, graph: bytes, limits: DetectionLimits, threads: int = 1):
        """Open the graph and try it on an empty image.

        Args:
            graph: A graph with nine outputs: scores, box distances and landmark distances at three strides.
            limits: Which faces are kept. The authors use a score of 0.5 and an overlap of 0.4.
            threads: Threads of ONNX Runtime.

        Raises:
            ModelError: The graph is another one, such as one without landmarks.
        """
        self._graph = DetectorGraph(graph, "SCRFD", threads)
        self._limits = limits
        # Six outputs are SCRFD's without landmarks.
        if len(self._graph.outputs) == 6:
            raise ModelError(
                "SCRFD: the graph has 6 outputs, so it gives no landmarks, which alignment needs; "
                "take one whose name ends in _kps"
            )
        if len(self._graph.outputs) != 9:
            raise ModelError(f"the graph is not SCRFD's: it has {len(self._graph.outputs)} outputs, expected 9")
        self._run(np.zeros((_PROBE_SIDE, _PROBE_SIDE, 3), np.uint8))

    def detect(self, images: Sequence[UInt8Image]) -> list[Faces]:
        """Find the faces of each image; see `Detector`."""
        return [self._detect_one(image) for image in images]

    def _detect_one(self, image: UInt8Image) -> Faces:
        fitted = self._graph.fit(image)
        height, width = fitted.pixels.shape[:2]
        # Decode the candidates of all strides, then apply NMS to all of them together.
        decoded = [
            _decode_level(level, height, width, stride=stride, min_score=self._limits.min_score)
            for level, stride in zip(self._run(fitted.pixels), _STRIDES, strict=True)
        ]
        boxes = np.concatenate([faces.boxes for faces in decoded])
        landmarks = np.concatenate([faces.landmarks for faces in decoded])
        scores = np.concatenate([faces.scores for faces in decoded])
        best = np.argsort(-scores, kind="stable")[:_MAX_CANDIDATES]
        best = best[apply_nms(boxes[best], scores[best], self._limits.max_iou)]
        boxes_in_image = fitted.to_image(boxes[best].reshape(-1, 2, 2)).reshape(-1, 4)
        return Faces(boxes_in_image, fitted.to_image(landmarks[best]), scores[best])

    def _run(self, image: UInt8Image) -> list[_Level]:
        """Compute the outputs of each stride."""
        pixels = self._graph.fit(image).pixels
        height, width = pixels.shape[:2]
        planes = (pixels[None].transpose(0, 3, 1, 2).astype(np.float32) - np.float32(127.5)) * np.float32(1 / 128)
        outputs = [np.asarray(output, np.float32) for output in self._graph.run(np.ascontiguousarray(planes)).values()]
        # The number of anchors says which stride an output is of, its columns say what it is.
        by_shape = {(out.size // out.shape[-1], out.shape[-1]): out for out in outputs if out.ndim >= 2}
        anchors = [(height // stride) * (width // stride) * _ANCHORS_PER_CELL for stride in _STRIDES]
        missing = [(n, columns) for n in anchors for columns in (1, 4, 10) if (n, columns) not in by_shape]
        if missing:
            raise ModelError(
                f"the graph is not SCRFD's: outputs of the shapes {missing} are missing at {width}x{height}"
            )
        return [
            _Level(by_shape[n, 1].reshape(-1), by_shape[n, 4].reshape(-1, 4), by_shape[n, 10].reshape(-1, 10))
            for n in anchors
        ]


def _decode_level(level: _Level, height: int, width: int, *, stride: int, min_score: float) -> Faces:
    """Decode the candidates of one stride whose score is at least `min_score`, in pixels of the input."""
    selected = np.flatnonzero((level.scores >= min_score) & (level.scores > 0))
    # An anchor's point is the corner of its cell; boxes are distances from it to the four sides.
    points = np.repeat(list_cells(height, width, stride), _ANCHORS_PER_CELL, 0)[selected] * stride
    distances = level.box_distances[selected]
    boxes = np.concatenate([points - distances[:, :2] * stride, points + distances[:, 2:] * stride], 1)
    landmarks = points[:, None] + level.landmark_distances[selected].reshape(-1, 5, 2) * stride
    return Faces(boxes, landmarks, level.scores[selected])
