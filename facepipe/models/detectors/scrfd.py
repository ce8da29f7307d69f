"""SCRFD (Guo et al., ICLR 2022) with landmarks through ONNX Runtime, with its decoding.

The arithmetic is that of the public implementation (insightface, model_zoo/scrfd.py). Outputs are told apart by their
shapes: exports differ in names, order and a batch dimension.
"""

import numpy as np

from facepipe.errors import ModelError
from facepipe.models.detectors.nms import apply_nms
from facepipe.models.detectors.onnx_input import DetectorGraph, list_cells
from facepipe.models.protocols import Faces
from facepipe.types import Float32, UInt8Image

_STRIDES = (8, 16, 32)
_ANCHORS = 2
_PROBE = 64
_MAX_CANDIDATES = 5000

Level = tuple[Float32, Float32, Float32]


class Scrfd:
    """An SCRFD graph on a CPU. `limits`: lowest score, highest overlap (IoU) kept.

    graph: with nine outputs, scores, box distances and landmark distances at three strides; raises ModelError for
    another, such as one without landmarks. The authors' own limits are (0.5, 0.4).
    """

    stride = 1

    def __init__(self, graph: bytes, limits: tuple[float, float], threads: int = 1):
        self._graph, self._limits = DetectorGraph(graph, "SCRFD", threads), limits
        if len(self._graph.outputs) == 6:
            raise ModelError(
                "SCRFD: the graph has 6 outputs, so it gives no landmarks, which alignment needs; "
                "take one whose name ends in _kps"
            )
        if len(self._graph.outputs) != 9:
            raise ModelError(f"the graph is not SCRFD's: it has {len(self._graph.outputs)} outputs where 9 are wanted")
        self._levels(np.zeros((_PROBE, _PROBE, 3), np.uint8))

    def detect(self, images: UInt8Image) -> list[Faces]:
        return [self._one(image) for image in images]

    def _one(self, image: UInt8Image) -> Faces:
        min_score, max_iou = self._limits
        fitted = self._graph.fit(image)
        h, w = fitted.pixels.shape[:2]
        decoded = [
            _decoded(level, h, w, stride, min_score)
            for level, stride in zip(self._levels(fitted.pixels), _STRIDES, strict=True)
        ]
        boxes, landmarks, scores = (np.concatenate(part) for part in zip(*decoded, strict=True))
        best = np.argsort(-scores, kind="stable")[:_MAX_CANDIDATES]
        best = best[apply_nms(boxes[best], scores[best], max_iou)]
        return Faces(
            fitted.to_image(boxes[best].reshape(-1, 2, 2)).reshape(-1, 4),
            fitted.to_image(landmarks[best]),
            scores[best],
        )

    def _levels(self, pixels: UInt8Image) -> list[Level]:
        """Scores (n,), box (n, 4) and landmark distances (n, 10) of each stride for RGB pixels that fit the graph."""
        pixels = self._graph.fit(pixels).pixels
        h, w = pixels.shape[:2]
        planes = (pixels[None].transpose(0, 3, 1, 2).astype(np.float32) - np.float32(127.5)) * np.float32(1 / 128)
        found = [np.asarray(out, np.float32) for out in self._graph.run(np.ascontiguousarray(planes)).values()]
        by_shape = {(out.size // out.shape[-1], out.shape[-1]): out for out in found if out.ndim >= 2}
        anchors = [(h // stride) * (w // stride) * _ANCHORS for stride in _STRIDES]
        missing = [(n, columns) for n in anchors for columns in (1, 4, 10) if (n, columns) not in by_shape]
        if missing:
            raise ModelError(f"the graph is not SCRFD's: outputs of the shapes {missing} are missing at {w}x{h}")
        return [
            (by_shape[n, 1].reshape(-1), by_shape[n, 4].reshape(-1, 4), by_shape[n, 10].reshape(-1, 10))
            for n in anchors
        ]


def _decoded(level: Level, height: int, width: int, stride: int, min_score: float) -> Level:
    """Boxes, landmarks and scores of at least `min_score`, from distances in strides to the anchors' points."""
    scores, box, points = level
    kept = np.flatnonzero((scores >= min_score) & (scores > 0))
    anchor = np.repeat(list_cells(height, width, stride), _ANCHORS, 0)[kept] * stride
    boxes = np.concatenate([anchor - box[kept, :2] * stride, anchor + box[kept, 2:] * stride], 1)
    return boxes, anchor[:, None] + points[kept].reshape(-1, 5, 2) * stride, scores[kept]
