"""YuNet (Wu et al., Machine Intelligence Research 2023) through ONNX Runtime, with its decoding.

The arithmetic is that of OpenCV's FaceDetectorYN (modules/objdetect/src/face_detect.cpp).
"""

import numpy as np

from facepipe.errors import ModelError
from facepipe.models.detectors.nms import apply_nms
from facepipe.models.detectors.onnx_input import DetectorGraph, list_cells
from facepipe.models.protocols import Faces
from facepipe.types import Float32, UInt8Image

_STRIDES = (8, 16, 32)
_COLUMNS = {"cls": 1, "obj": 1, "bbox": 4, "kps": 10}
_MAX_CANDIDATES = 5000


class YuNet:
    """A YuNet graph (face_detection_yunet_*.onnx) on a CPU. `limits`: lowest score, highest overlap (IoU) kept.

    graph: with outputs cls_8 ... kps_32; raises ModelError for another. OpenCV's own limits are (0.6, 0.3).
    """

    stride = 1

    def __init__(self, graph: bytes, limits: tuple[float, float], threads: int = 1):
        self._graph, self._limits = DetectorGraph(graph, "YuNet", threads), limits
        missing = [f"{kind}_{s}" for kind in _COLUMNS for s in _STRIDES if f"{kind}_{s}" not in self._graph.outputs]
        if missing:
            raise ModelError(f"the graph is not YuNet's: its outputs {', '.join(missing)} are missing")

    def detect(self, images: UInt8Image) -> list[Faces]:
        return [self._one(image) for image in images]

    def _one(self, image: UInt8Image) -> Faces:
        min_score, max_iou = self._limits
        fitted = self._graph.fit(image)
        bgr = np.ascontiguousarray(fitted.pixels[None, ..., ::-1].transpose(0, 3, 1, 2), np.float32)
        out = self._graph.run(bgr)
        levels = [self._level(out, stride, bgr.shape[2:], min_score) for stride in _STRIDES]
        boxes, landmarks, scores = (np.concatenate(part) for part in zip(*levels, strict=True))
        best = np.argsort(-scores, kind="stable")[:_MAX_CANDIDATES]
        best = best[apply_nms(boxes[best], scores[best], max_iou)]
        return Faces(
            fitted.to_image(boxes[best].reshape(-1, 2, 2)).reshape(-1, 4),
            fitted.to_image(landmarks[best]),
            scores[best],
        )

    def _level(
        self, out: dict[str, Float32], stride: int, shape: tuple[int, ...], min_score: float
    ) -> tuple[Float32, Float32, Float32]:
        """Boxes, landmarks and scores of one level, of at least `min_score`."""
        grid = list_cells(shape[0], shape[1], stride)
        found = {}
        for kind, columns in _COLUMNS.items():
            values = np.asarray(out[f"{kind}_{stride}"], np.float32)
            if values.size != len(grid) * columns:
                raise ModelError(f"YuNet: {kind}_{stride} has shape {values.shape}, not {(len(grid), columns)}")
            found[kind] = values.reshape(-1, columns)
        scores = np.sqrt(np.clip(found["cls"], 0, 1) * np.clip(found["obj"], 0, 1))[:, 0]
        kept = np.flatnonzero((scores >= min_score) & (scores > 0))
        grid, box = grid[kept], found["bbox"][kept]
        centre = (grid + box[:, :2]) * stride
        half = np.exp(np.clip(box[:, 2:], -10, 10)) * stride / 2
        landmarks = (grid[:, None] + found["kps"][kept].reshape(-1, 5, 2)) * stride
        return np.concatenate([centre - half, centre + half], 1), landmarks, scores[kept]
