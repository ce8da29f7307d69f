"""ONNX graphs of detectors from elsewhere: their input size, fitting an image to it, and mapping points back."""

from typing import Any, NamedTuple

import cv2
import numpy as np

from facepipe.errors import ModelError
from facepipe.types import Float32, UInt8Image

SIDE_MULTIPLE = 32


class FittedImage(NamedTuple):
    """An image at the top left of a graph's input.

    Attributes:
        pixels: (h, w, 3) RGB of the input's size.
        scale: (2,) how much the image was shrunk, across and down.
    """

    pixels: UInt8Image
    scale: Float32

    def to_image(self, points: Float32) -> Float32:
        """Map points (..., 2) of the input to the image, about pixel centres."""
        return ((points + 0.5) / self.scale - 0.5).astype(np.float32)


class DetectorGraph:
    """A session of a graph with one image input (1, 3, h, w), whose height and width are free or fixed.

    Attributes:
        name: What error messages call the graph.
        outputs: Names of the outputs.
    """

    def __init__(self, graph: bytes, name: str, threads: int = 1):
        """Open the graph.

        Args:
            graph: The serialised ONNX model.
            name: What error messages call it.
            threads: Threads of ONNX Runtime.

        Raises:
            ModelError: The bytes are not an ONNX graph, or it takes anything else than one image.
        """
        from facepipe.models.runtime.onnx_session import open_session

        self.name = name
        try:
            self._session = open_session(graph, threads=threads)
        except Exception as error:  # ONNX Runtime's own errors have no common class to import
            raise ModelError(f"{name}: ONNX Runtime cannot load the graph: {_format_error(error)}") from error
        inputs = self._session.get_inputs()
        shape = inputs[0].shape if inputs else []
        if len(inputs) != 1 or len(shape) != 4 or shape[1] not in (3, "3") or "float" not in inputs[0].type:
            raise ModelError(f"{name}: the graph takes no single float image (1, 3, height, width)")
        self._input = inputs[0].name
        # Height and width of the input; None if they are free.
        self._fixed_sides = tuple(side if isinstance(side, int) and side > 0 else None for side in shape[2:])
        self.outputs = [output.name for output in self._session.get_outputs()]

    def fit(self, image: UInt8Image) -> FittedImage:
        """Pad an image with black on the right and below; shrink it first if the graph's fixed size is smaller."""
        height, width = image.shape[:2]
        fixed_height, fixed_width = self._fixed_sides
        shrink = 1.0
        # Shrink by the tighter of the fixed sides, both sides alike.
        if fixed_height is not None:
            shrink = min(shrink, fixed_height / height)
        if fixed_width is not None:
            shrink = min(shrink, fixed_width / width)
        if shrink < 1:
            size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
            interpolation = cv2.INTER_LINEAR if shrink >= 0.5 else cv2.INTER_AREA
            image = np.asarray(cv2.resize(image, size, interpolation=interpolation), np.uint8)
        small_height, small_width = image.shape[:2]
        # Free sides are padded to what the strides of detectors divide.
        padded_height = fixed_height or small_height + -small_height % SIDE_MULTIPLE
        padded_width = fixed_width or small_width + -small_width % SIDE_MULTIPLE
        padded = np.zeros((padded_height, padded_width, 3), np.uint8)
        padded[:small_height, :small_width] = image
        return FittedImage(padded, np.array([small_width / width, small_height / height], np.float32))

    def run(self, planes: Float32) -> dict[str, Any]:
        """Compute the outputs by name.

        Args:
            planes: (1, 3, h, w).
        """
        try:
            outputs = self._session.run(None, {self._input: planes})
        except Exception as error:
            raise ModelError(f"{self.name}: the graph fails on an image: {_format_error(error)}") from error
        return dict(zip(self.outputs, outputs, strict=True))


def _format_error(error: Exception) -> str:
    message = str(error).strip()
    return message.splitlines()[0][:200] if message else type(error).__name__


def list_cells(height: int, width: int, stride: int) -> Float32:
    """List the column and row of every cell of a level, row by row, (rows * columns, 2)."""
    rows, columns = np.mgrid[: height // stride, : width // stride]
    return np.stack([columns, rows], -1).reshape(-1, 2).astype(np.float32)
