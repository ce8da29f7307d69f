"""What a detector's ONNX graph from outside takes: its input's size, an image made to fit, and the way back."""

from typing import Any, NamedTuple

import cv2
import numpy as np

from facepipe.errors import ModelError
from facepipe.types import Float32, UInt8Image

MULTIPLE = 32


class FittedImage(NamedTuple):
    """An image at the top left of a graph's input, and the scales it was shrunk by."""

    pixels: UInt8Image
    scale: Float32

    def to_image(self, points: Float32) -> Float32:
        """Points (..., 2) of the input in the image, about pixel centres."""
        return ((points + 0.5) / self.scale - 0.5).astype(np.float32)


class DetectorGraph:
    """A session of a graph with one image input (1, 3, h, w) whose height and width are free or fixed.

    Raises ModelError for what is no ONNX graph, or takes anything else.
    """

    def __init__(self, graph: bytes, name: str, threads: int = 1):
        from facepipe.models.engines import open_session

        self.name = name
        try:
            self._session = open_session(graph, threads)
        except Exception as error:  # ONNX Runtime's own errors have no common class to import
            raise ModelError(f"{name}: ONNX Runtime cannot load the graph: {_short(error)}") from error
        inputs = self._session.get_inputs()
        shape = inputs[0].shape if inputs else []
        if len(inputs) != 1 or len(shape) != 4 or shape[1] not in (3, "3") or "float" not in inputs[0].type:
            raise ModelError(f"{name}: the graph takes no single float image (1, 3, height, width)")
        self._input = inputs[0].name
        self._fixed = tuple(side if isinstance(side, int) and side > 0 else None for side in shape[2:])
        self.outputs = [out.name for out in self._session.get_outputs()]

    def fit(self, image: UInt8Image) -> FittedImage:
        """Padded with black on the right and below; shrunk first where the graph's fixed size is smaller."""
        h, w = image.shape[:2]
        limits = [side / have for side, have in zip(self._fixed, (h, w), strict=True) if side is not None]
        shrink = min([1.0, *limits])
        if shrink < 1:
            size = (max(1, round(w * shrink)), max(1, round(h * shrink)))
            kernel = cv2.INTER_LINEAR if shrink >= 0.5 else cv2.INTER_AREA
            image = np.asarray(cv2.resize(image, size, interpolation=kernel), np.uint8)
        small_h, small_w = image.shape[:2]
        wanted = [fixed or side + -side % MULTIPLE for fixed, side in zip(self._fixed, (small_h, small_w), strict=True)]
        padded = np.zeros((*wanted, 3), np.uint8)
        padded[:small_h, :small_w] = image
        return FittedImage(padded, np.array([small_w / w, small_h / h], np.float32))

    def run(self, planes: Float32) -> dict[str, Any]:
        """Outputs by name, without the batch dimension, of (1, 3, h, w) float32."""
        try:
            found = self._session.run(None, {self._input: planes})
        except Exception as error:
            raise ModelError(f"{self.name}: the graph fails on an image: {_short(error)}") from error
        return dict(zip(self.outputs, found, strict=True))


def _short(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def list_cells(height: int, width: int, stride: int) -> Float32:
    """(rows * columns, 2) column and row of every cell of a level, row by row."""
    rows, columns = np.mgrid[: height // stride, : width // stride]
    return np.stack([columns, rows], -1).reshape(-1, 2).astype(np.float32)
