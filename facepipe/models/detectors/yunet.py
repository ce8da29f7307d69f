"""YuNet (Wu et al., Machine Intelligence Research 2023), run by ONNX Runtime.

The arithmetic is that of OpenCV's FaceDetectorYN (modules/objdetect/src/face_detect.cpp).
"""

from collections.abc import Sequence

import numpy as np

from facepipe.errors import ModelError
from facepipe.models.detectors.nms import apply_nms
from facepipe.models.detectors.onnx_input import DetectorGraph, list_cells
from facepipe.models.protocols import DetectionLimits, Faces
from facepipe.types import Float32, UInt8Image

_STRIDES = (8, 16, 32)
# Outputs of each stride, and their number of columns.
_COLUMNS = {"cls": 1, "obj": 1, "bbox": 4, "kps": 10}
_MAX_CANDIDATES = 5000


class YuNet:
    """A YuNet graph (face_detection_yunet_*.onnx) on a CPU.

    Attributes:
        stride: Image sides must be multiples of it.
    """

    stride = 1

    def __init__(self, graph: bytes, limits: DetectionLimits, threads: int = 1):
        """Open the graph.

        Args:
            graph: A graph with the outputs cls_8 to kps_32.
            limits: Which faces are kept. OpenCV uses a score of 0.6 and an overlap of 0.3.
            threads: Threads of ONNX Runtime.

        Raises:
            ModelError: The graph has other outputs.
        """
        self._graph = DetectorGraph(graph, "YuNet", threads)
        self._limits = limits
        names = [f"{kind}_{stride}" for kind in _COLUMNS for stride in _STRIDES]
        missing = [name for name in names if name not in self._graph.outputs]
        if missing:
            raise ModelError(f"the graph is not YuNet's: its outputs {', '.join(missing)} are missing")

    def detect(self, images: Sequence[UInt8Image]) -> list[Faces]:
        """Find the faces of each image; see `Detector`."""
        return [self._detect_one(image) for image in images]

    def _detect_one(self, image: UInt8Image) -> Faces:
        fitted = self._graph.fit(image)
        height, width = fitted.pixels.shape[:2]
        # Levels from 0 to 255 in BGR, without mean and scale.
        bgr = np.ascontiguousarray(fitted.pixels[None, ..., ::-1].transpose(0, 3, 1, 2), np.float32)
        outputs = self._graph.run(bgr)
        decoded = [self._decode_level(outputs, height, width, stride) for stride in _STRIDES]
        boxes = np.concatenate([faces.boxes for faces in decoded])
        landmarks = np.concatenate([faces.landmarks for faces in decoded])
        scores = np.concatenate([faces.scores for faces in decoded])
        best = np.argsort(-scores, kind="stable")[:_MAX_CANDIDATES]
        best = best[apply_nms(boxes[best], scores[best], self._limits.max_iou)]
        boxes_in_image = fitted.to_image(boxes[best].reshape(-1, 2, 2)).reshape(-1, 4)
        return Faces(boxes_in_image, fitted.to_image(landmarks[best]), scores[best])

    def _decode_level(self, outputs: dict[str, Float32], height: int, width: int, stride: int) -> Faces:
        """Decode the candidates of one stride whose score is high enough, in pixels of the input."""
        cells = list_cells(height, width, stride)
        level = {}
        for kind, columns in _COLUMNS.items():
            values = np.asarray(outputs[f"{kind}_{stride}"], np.float32)
            if values.size != len(cells) * columns:
                raise ModelError(f"YuNet: {kind}_{stride} has shape {values.shape}, not {(len(cells), columns)}")
            level[kind] = values.reshape(-1, columns)
        # A score is the geometric mean of class and objectness.
        scores = np.sqrt(np.clip(level["cls"], 0, 1) * np.clip(level["obj"], 0, 1))[:, 0]
        selected = np.flatnonzero((scores >= self._limits.min_score) & (scores > 0))
        cells = cells[selected]
        box = level["bbox"][selected]
        # Offsets are in cells from the cell's corner, sides are logarithms of their length in cells.
        centre = (cells + box[:, :2]) * stride
        half_sides = np.exp(np.clip(box[:, 2:], -10, 10)) * stride / 2
        landmarks = (cells[:, None] + level["kps"][selected].reshape(-1, 5, 2)) * stride
        return Faces(np.concatenate([centre - half_sides, centre + half_sides], 1), landmarks, scores[selected])
