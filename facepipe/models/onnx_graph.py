"""Writing ONNX graphs by hand: nodes and constants under running names."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto, helper, numpy_helper

_OPSET = 17
_IR_VERSION = 10


class OnnxGraphBuilder:
    """A graph in the making; what makes a node returns the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def add_node(self, kind: str, inputs: Sequence[str], **attributes: object) -> str:
        """A node of one output."""
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def add_constant(self, array: npt.NDArray[np.generic]) -> str:
        """A constant tensor."""
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def add_conv(self, inputs: Sequence[str], kernel: int, stride: int, padding: int, groups: int = 1) -> str:
        """A square convolution of [x, weight (o, i / groups, k, k), bias (o,)]."""
        shape = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [padding] * 4, "group": groups}
        return self.add_node("Conv", inputs, **shape)

    def rename_output(self, output: str, name: str) -> None:
        """Give the output of a node, which no other node reads, a name of its own."""
        node = next(node for node in self.nodes if output in node.output)
        node.output[0] = name

    def serialise(self, title: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> bytes:
        """The model; inputs and outputs as `tensor` makes them."""
        body = helper.make_graph(self.nodes, title, list(inputs), list(outputs), self.constants)
        model = helper.make_model(body, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
        return bytes(model.SerializeToString())


def describe_tensor(name: str, shape: Sequence[int | str] | None, raw: bool = False) -> Any:
    """An input or output of float32, or of uint8; a dimension's name stands for any length."""
    return helper.make_tensor_value_info(name, TensorProto.UINT8 if raw else TensorProto.FLOAT, shape)
