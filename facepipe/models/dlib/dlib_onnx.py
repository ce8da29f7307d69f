"""dlib's network as an ONNX graph, for ONNX Runtime on CPUs; takes uint8 chips, so that nothing is copied before it.

In eight bits as well: weights of each output channel scaled to +-127, activations to 0..255 over given ranges.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from facepipe.models.dlib.layout import BLOCKS, MEAN_RGB, SCALE, SIDE, Convolution
from facepipe.models.onnx_graph import OnnxGraphBuilder, describe_tensor
from facepipe.types import Float32

# Side of the feature map after each strided block: what padding the shortcut needs is known when the graph is built.
_SIDE_AFTER_POOL = 35


Range = tuple[float, float]


def build_dlib_onnx(convolutions: list[Convolution], fc: Float32, ranges: Sequence[Range] | None = None) -> bytes:
    """A serialised model: `chips` (n, 150, 150, 3) uint8 RGB -> `vectors` (n, 128) float32.

    ranges: lowest and highest value of each activation in the order of `build_dlib_onnx_with_activations`;
        the graph is in eight bits then
    """
    g = _Floats() if ranges is None else _EightBits(ranges)
    _build(g, convolutions, fc)
    return g.finished()


def build_dlib_onnx_with_activations(convolutions: list[Convolution], fc: Float32) -> tuple[bytes, list[str]]:
    """(the graph in floating point with its activations as further outputs, their names), to measure ranges with."""
    g = _Floats()
    _build(g, convolutions, fc)
    return g.finished(g.settled), g.settled


def _build(g: "_Floats", convolutions: list[Convolution], fc: Float32) -> None:
    x = g.add_node("Relu", [g.layer(g.pixels(), _with_input_scaling(convolutions[0]))])
    x = g.same("MaxPool", g.settle(x), kernel_shape=[3, 3], strides=[2, 2])
    side = _SIDE_AFTER_POOL
    for n, (i, o, stride) in enumerate(BLOCKS):
        first, second = convolutions[1 + 2 * n : 3 + 2 * n]
        y = g.settle(g.layer(g.settle(g.add_node("Relu", [g.layer(x, first)])), second))
        if stride == 2:
            pooled, strided = side // 2, (side - 3) // 2 + 1
            side = max(pooled, strided)
            x = g.same("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2])
            x, y = g.pad(x, o - i, side - pooled), g.pad(y, 0, side - strided)
        x = g.settle(g.add_node("Relu", [g.add_node("Add", [x, y])]))
    x = g.add_node("Flatten", [g.add_node("GlobalAveragePool", [x])])
    g.add_node("MatMul", [x, g.add_constant(fc)])


def _with_input_scaling(conv: Convolution) -> Convolution:
    """The stem on raw 0-255 input: exact, since it pads nothing."""
    mean = np.array(MEAN_RGB, np.float32)[None, :, None, None]
    weight = conv.weight / SCALE
    return conv._replace(
        weight=weight.astype(np.float32), bias=(conv.bias - (weight * mean).sum((1, 2, 3))).astype(np.float32)
    )


class _Floats(OnnxGraphBuilder):
    """The network's parts in floating point."""

    def __init__(self) -> None:
        super().__init__()
        self.settled: list[str] = []

    def pixels(self) -> str:
        """The chips' levels in planes, as numbers."""
        return self.add_node("Cast", [self.add_node("Transpose", ["chips"], perm=[0, 3, 1, 2])], to=TensorProto.FLOAT)

    def settle(self, x: str) -> str:
        """An activation that other layers read: the place where it would be rounded."""
        self.settled.append(x)
        return x

    def same(self, kind: str, x: str, *more: str, **attributes: object) -> str:
        """A node whose output has the range of its input."""
        return self.add_node(kind, [x, *more], **attributes)

    def layer(self, x: str, conv: Convolution) -> str:
        """A convolution of the network."""
        weight, bias = self.add_constant(conv.weight), self.add_constant(conv.bias)
        return self.add_conv([x, weight, bias], conv.weight.shape[2], conv.stride, conv.padding)

    def pad(self, x: str, channels: int, pixels: int) -> str:
        """Zeros behind the channels, and below and right of the pixels."""
        if not channels and not pixels:
            return x
        return self.same("Pad", x, self.add_constant(np.array([0, 0, 0, 0, 0, channels, pixels, pixels])))

    def finished(self, more: Sequence[str] = ()) -> bytes:
        """The model whose output is the last node's, and the named tensors."""
        self.rename_output(self.nodes[-1].output[0], "vectors")
        outputs = [describe_tensor("vectors", ["n", 128]), *(describe_tensor(name, None) for name in more)]
        return self.serialise("dlib_resnet", [describe_tensor("chips", ["n", SIDE, SIDE, 3], raw=True)], outputs)


class _EightBits(_Floats):
    """The same with integers in between, as ONNX writes them: each activation quantised and read back.

    ONNX Runtime computes what stands between reading and rounding in integers.
    """

    def __init__(self, ranges: Sequence[Range]) -> None:
        super().__init__()
        self._ranges = iter(ranges)
        self._steps: dict[str, tuple[str, str, float]] = {}

    def pixels(self) -> str:
        return self._read(self.add_node("Transpose", ["chips"], perm=[0, 3, 1, 2]), self._step(0.0, 255.0))

    def settle(self, x: str) -> str:
        return self._rounded(x, self._step(*next(self._ranges)))

    def same(self, kind: str, x: str, *more: str, **attributes: object) -> str:
        return self._rounded(self.add_node(kind, [x, *more], **attributes), self._steps[x])

    def layer(self, x: str, conv: Convolution) -> str:
        """Weights of eight bits with a scale for each output channel; the bias in units of their product."""
        steps = np.maximum(np.abs(conv.weight).max((1, 2, 3)), 1e-12) / 127
        rounded = np.round(conv.weight / steps[:, None, None, None]).astype(np.int8)
        units = (steps * self._steps[x][2]).astype(np.float32)
        weight = self._constant_in_steps(rounded, steps.astype(np.float32))
        bias = self._constant_in_steps(np.round(conv.bias / units).astype(np.int32), units)
        return self.add_conv([x, weight, bias], conv.weight.shape[2], conv.stride, conv.padding)

    def _constant_in_steps(self, values: npt.NDArray[np.integer], steps: Float32) -> str:
        names = [self.add_constant(a) for a in (values, steps, np.zeros(len(steps), values.dtype))]
        return self.add_node("DequantizeLinear", names, axis=0)

    def _step(self, low: float, high: float) -> tuple[str, str, float]:
        low, high = min(low, 0.0), max(high, 1e-6)
        step = np.float32((high - low) / 255)
        zero = np.uint8(np.clip(round(-low / float(step)), 0, 255))
        return self.add_constant(np.array(step)), self.add_constant(np.array(zero)), float(step)

    def _rounded(self, x: str, step: tuple[str, str, float]) -> str:
        return self._read(self.add_node("QuantizeLinear", [x, *step[:2]]), step)

    def _read(self, x: str, step: tuple[str, str, float]) -> str:
        name = self.add_node("DequantizeLinear", [x, *step[:2]])
        self._steps[name] = step
        return name
