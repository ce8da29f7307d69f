"""dlib's network as an ONNX graph for ONNX Runtime on CPUs. It takes uint8 chips, so that nothing is copied before it.

It can also be written in eight bits: the weights of each output channel are scaled to +-127, activations to 0..255 over
given ranges.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from facepipe.models.dlib.layout import BLOCKS, MEAN_RGB, SCALE, SIDE, Convolution
from facepipe.models.onnx_graph import OnnxGraphBuilder, describe_tensor
from facepipe.types import Float32

# Side of the map after the stem's pooling. The padding of a shortcut must be known when the graph is built.
_SIDE_AFTER_POOL = 35

Range = tuple[float, float]


def build_dlib_onnx(convolutions: list[Convolution], fc: Float32, ranges: Sequence[Range] | None = None) -> bytes:
    """Serialise the network as an ONNX model from `chips` (n, 150, 150, 3) uint8 RGB to `vectors` (n, 128) float32.

    Args:
        convolutions: From `fold_layers`.
        fc: (256, 128) from `fold_layers`.
        ranges: Lowest and highest value of each activation, in the order of `build_dlib_onnx_with_activations`. If
            given, the graph is in eight bits.
    """
    builder = _FloatBuilder() if ranges is None else _EightBitBuilder(ranges)
    _add_network(builder, convolutions, fc)
    return builder.finish()


def build_dlib_onnx_with_activations(convolutions: list[Convolution], fc: Float32) -> tuple[bytes, list[str]]:
    """Serialise the network in floating point with its activations as further outputs, to measure ranges.

    Returns:
        The model, and the names of the activations.
    """
    builder = _FloatBuilder()
    _add_network(builder, convolutions, fc)
    return builder.finish(builder.activations), builder.activations


def _add_network(builder: "_FloatBuilder", convolutions: list[Convolution], fc: Float32) -> None:
    # The stem.
    x = builder.add_layer(builder.add_pixels(), _fold_input_scaling(convolutions[0]))
    x = builder.round_activation(builder.add_node("Relu", [x]))
    x = builder.add_same_range_node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2])
    side = _SIDE_AFTER_POOL
    # The blocks.
    for n, (i, o, stride) in enumerate(BLOCKS):
        # The stem's convolution comes first in the list, then two of each block.
        first, second = convolutions[1 + 2 * n : 3 + 2 * n]
        y = builder.round_activation(builder.add_node("Relu", [builder.add_layer(x, first)]))
        y = builder.round_activation(builder.add_layer(y, second))
        if stride == 2:
            # The pooled shortcut and the convolution without padding may differ in size; the smaller map is padded.
            pooled_side = side // 2
            strided_side = (side - 3) // 2 + 1
            side = max(pooled_side, strided_side)
            x = builder.add_same_range_node("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2])
            x = builder.add_padding(x, o - i, side - pooled_side)
            y = builder.add_padding(y, 0, side - strided_side)
        x = builder.round_activation(builder.add_node("Relu", [builder.add_node("Add", [x, y])]))
    # The vector.
    x = builder.add_node("Flatten", [builder.add_node("GlobalAveragePool", [x])])
    builder.add_node("MatMul", [x, builder.add_constant(fc)])


def _fold_input_scaling(stem: Convolution) -> Convolution:
    """Change the stem to take levels from 0 to 255. This is exact, because the stem does not pad."""
    mean = np.array(MEAN_RGB, np.float32)[None, :, None, None]
    # (x - mean) / scale is linear, so it moves into the weights and the bias.
    weight = stem.weight / SCALE
    bias = stem.bias - (weight * mean).sum((1, 2, 3))
    return stem._replace(weight=weight.astype(np.float32), bias=bias.astype(np.float32))


class _FloatBuilder(OnnxGraphBuilder):
    """Adds the network's parts in floating point.

    Attributes:
        activations: Names of the activations so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.activations: list[str] = []

    def add_pixels(self) -> str:
        """Add the conversion of the chips to planes of numbers."""
        planes = self.add_node("Transpose", ["chips"], perm=[0, 3, 1, 2])
        return self.add_node("Cast", [planes], to=TensorProto.FLOAT)

    def round_activation(self, x: str) -> str:
        """Mark an activation that other layers read. In eight bits it is rounded here."""
        self.activations.append(x)
        return x

    def add_same_range_node(self, kind: str, x: str, *more: str, **attributes: object) -> str:
        """Add a node whose output has the range of its input."""
        return self.add_node(kind, [x, *more], **attributes)

    def add_layer(self, x: str, conv: Convolution) -> str:
        """Add a convolution of the network."""
        weight = self.add_constant(conv.weight)
        bias = self.add_constant(conv.bias)
        return self._add_convolution(x, weight, bias, conv)

    def add_padding(self, x: str, channels: int, pixels: int) -> str:
        """Add zeros behind the channels, and below and right of the pixels."""
        if not channels and not pixels:
            return x
        padding = self.add_constant(np.array([0, 0, 0, 0, 0, channels, pixels, pixels]))
        return self.add_same_range_node("Pad", x, padding)

    def finish(self, extra_outputs: Sequence[str] = ()) -> bytes:
        """Serialise the model, whose outputs are the last node's and the extra ones."""
        self.rename_output(self.nodes[-1].output[0], "vectors")
        outputs = [describe_tensor("vectors", ["n", 128])]
        outputs += [describe_tensor(name, None) for name in extra_outputs]
        chips = describe_tensor("chips", ["n", SIDE, SIDE, 3], is_uint8=True)
        return self.serialise("dlib_resnet", [chips], outputs)

    def _add_convolution(self, x: str, weight: str, bias: str, conv: Convolution) -> str:
        kernel = conv.weight.shape[2]
        return self.add_conv([x, weight, bias], kernel=kernel, stride=conv.stride, padding=conv.padding)


class _Step(NamedTuple):
    """How an activation is rounded: the constants of the graph, and the width of a step."""

    step_name: str
    zero_name: str
    width: float


class _EightBitBuilder(_FloatBuilder):
    """Adds the network's parts with integers in between, as ONNX writes them: quantised and read back.

    ONNX Runtime computes in integers what is between reading and rounding.
    """

    def __init__(self, ranges: Sequence[Range]) -> None:
        super().__init__()
        self._ranges = iter(ranges)
        self._steps: dict[str, _Step] = {}

    def add_pixels(self) -> str:
        planes = self.add_node("Transpose", ["chips"], perm=[0, 3, 1, 2])
        return self._add_dequantisation(planes, self._add_step(0.0, 255.0))

    def round_activation(self, x: str) -> str:
        return self._add_rounding(x, self._add_step(*next(self._ranges)))

    def add_same_range_node(self, kind: str, x: str, *more: str, **attributes: object) -> str:
        return self._add_rounding(self.add_node(kind, [x, *more], **attributes), self._steps[x])

    def add_layer(self, x: str, conv: Convolution) -> str:
        """Add a convolution: weights of eight bits with a scale per output channel, the bias in their products."""
        # One step per output channel; a product has the step of its weight times that of its input.
        steps = np.maximum(np.abs(conv.weight).max((1, 2, 3)), 1e-12) / 127
        rounded_weight = np.round(conv.weight / steps[:, None, None, None]).astype(np.int8)
        bias_steps = (steps * self._steps[x].width).astype(np.float32)
        rounded_bias = np.round(conv.bias / bias_steps).astype(np.int32)
        weight = self._add_quantised_constant(rounded_weight, steps.astype(np.float32))
        bias = self._add_quantised_constant(rounded_bias, bias_steps)
        return self._add_convolution(x, weight, bias, conv)

    def _add_quantised_constant(self, values: npt.NDArray[np.integer], steps: Float32) -> str:
        names = [self.add_constant(array) for array in (values, steps, np.zeros(len(steps), values.dtype))]
        return self.add_node("DequantizeLinear", names, axis=0)

    def _add_step(self, low: float, high: float) -> _Step:
        """Add the constants that divide a range into 255 steps; 0 is always one of the values."""
        # Paddings and activations below zero give 0, so it must be exact.
        low = min(low, 0.0)
        high = max(high, 1e-6)
        width = np.float32((high - low) / 255)
        zero = np.uint8(np.clip(round(-low / float(width)), 0, 255))
        step_name = self.add_constant(np.array(width))
        zero_name = self.add_constant(np.array(zero))
        return _Step(step_name, zero_name, float(width))

    def _add_rounding(self, x: str, step: _Step) -> str:
        quantised = self.add_node("QuantizeLinear", [x, step.step_name, step.zero_name])
        return self._add_dequantisation(quantised, step)

    def _add_dequantisation(self, x: str, step: _Step) -> str:
        name = self.add_node("DequantizeLinear", [x, step.step_name, step.zero_name])
        self._steps[name] = step
        return name
