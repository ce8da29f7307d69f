"""A quality model as an ONNX graph: one image in, one number out."""

from facepipe.errors import ModelError
from facepipe.models.embedders.engines import OnnxEmbedder
from facepipe.models.runtime.preprocess import Input
from facepipe.types import Float32, UInt8Image


class OnnxQuality:
    """The ONNX graph of a quality model.

    Attributes:
        size: (width, height) of a chip.
    """

    def __init__(
        self, graph: bytes, model_input: Input, size: tuple[int, int], *, device: str = "cpu", threads: int = 1
    ):
        """Open the graph and try it on empty chips.

        Args:
            graph: The serialised ONNX model.
            model_input: What the network inside the graph takes.
            size: (width, height) of a chip.
            device: "cpu", "cuda" or "cuda:N".
            threads: Threads of ONNX Runtime.

        Raises:
            ModelError: The graph does not give one number per chip, or does not take chips of this size.
        """
        self._graph = OnnxEmbedder(graph, model_input, size, device=device, threads=threads)
        self.size = size
        if self._graph.dim != 1:
            raise ModelError(f"a quality model gives one number per chip, and this graph gives {self._graph.dim}")

    def score(self, chips: UInt8Image) -> Float32:
        """Score chips; see `QualityModel`."""
        return self._graph.embed(chips)[:, 0]
