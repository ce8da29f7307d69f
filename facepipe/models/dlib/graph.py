"""dlib's network as an ONNX graph, for ONNX Runtime on CPUs; takes uint8 chips, so that nothing is copied before it."""

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto, helper, numpy_helper

from facepipe.models.dlib.layout import BLOCKS, MEAN_RGB, SCALE, SIDE, Convolution

_OPSET = 17
_IR_VERSION = 10
# Side of the feature map after each strided block: what padding the shortcut needs is known when the graph is built.
_SIDE_AFTER_POOL = 35


def graph(convolutions: list[Convolution], fc: npt.NDArray[np.float32]) -> bytes:
    """A serialised model: `chips` (n, 150, 150, 3) uint8 RGB -> `vectors` (n, 128) float32."""
    g = _Graph()
    x = g.node("Cast", [g.node("Transpose", ["chips"], perm=[0, 3, 1, 2])], to=TensorProto.FLOAT)
    x = g.node("Relu", [g.conv(x, _with_input_scaling(convolutions[0]))])
    x = g.node("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2])
    side = _SIDE_AFTER_POOL
    for n, (i, o, stride) in enumerate(BLOCKS):
        first, second = convolutions[1 + 2 * n : 3 + 2 * n]
        y = g.conv(g.node("Relu", [g.conv(x, first)]), second)
        if stride == 2:
            pooled, strided = side // 2, (side - 3) // 2 + 1
            side = max(pooled, strided)
            x = g.node("AveragePool", [x], kernel_shape=[2, 2], strides=[2, 2])
            x, y = g.pad(x, o - i, side - pooled), g.pad(y, 0, side - strided)
        x = g.node("Relu", [g.node("Add", [x, y])])
    x = g.node("Flatten", [g.node("GlobalAveragePool", [x])])
    g.node("MatMul", [x, g.constant(fc)])
    return g.serialise()


def _with_input_scaling(conv: Convolution) -> Convolution:
    """The stem on raw 0-255 input: exact, since it pads nothing."""
    mean = np.array(MEAN_RGB, np.float32)[None, :, None, None]
    weight = conv.weight / SCALE
    return conv._replace(
        weight=weight.astype(np.float32), bias=(conv.bias - (weight * mean).sum((1, 2, 3))).astype(np.float32)
    )


class _Graph:
    """Nodes and constants under running names."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def node(self, kind: str, inputs: list[str], **attributes: object) -> str:
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def constant(self, array: npt.NDArray[np.generic]) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def conv(self, x: str, conv: Convolution) -> str:
        k, p = conv.weight.shape[2], conv.padding
        names = [x, self.constant(conv.weight), self.constant(conv.bias)]
        return self.node("Conv", names, kernel_shape=[k, k], strides=[conv.stride] * 2, pads=[p] * 4)

    def pad(self, x: str, channels: int, pixels: int) -> str:
        if not channels and not pixels:
            return x
        return self.node("Pad", [x, self.constant(np.array([0, 0, 0, 0, 0, channels, pixels, pixels]))])

    def serialise(self) -> bytes:
        """The model whose output is the last node's."""
        self.nodes[-1].output[0] = "vectors"
        chips = helper.make_tensor_value_info("chips", TensorProto.UINT8, ["n", SIDE, SIDE, 3])
        vectors = helper.make_tensor_value_info("vectors", TensorProto.FLOAT, ["n", 128])
        body = helper.make_graph(self.nodes, "dlib_resnet", [chips], [vectors], self.constants)
        model = helper.make_model(body, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
        return bytes(model.SerializeToString())
