"""Write ONNX graphs by hand: nodes and constants under running names."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto, helper, numpy_helper

_OPSET = 17
_IR_VERSION = 10


class OnnxGraphBuilder:
    """A graph under construction. Methods that add a node return the name of its output.

    Attributes:
        nodes: The nodes so far, in the order they run.
        constants: The constant tensors so far.
    """

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def add_node(self, kind: str, inputs: Sequence[str], **attributes: object) -> str:
        """Add a node with one output."""
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def add_constant(self, array: npt.NDArray[np.generic]) -> str:
        """Add a constant tensor and return its name."""
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def add_conv(self, inputs: Sequence[str], *, kernel: int, stride: int, padding: int, groups: int = 1) -> str:
        """Add a square convolution.

        Args:
            inputs: x, weight (o, i / groups, kernel, kernel) and bias (o,).
            kernel: Side of the kernel.
            stride: Step both ways.
            padding: Zeros on each side.
            groups: Groups of channels.
        """
        return self.add_node(
            "Conv",
            inputs,
            kernel_shape=[kernel] * 2,
            strides=[stride] * 2,
            pads=[padding] * 4,
            group=groups,
        )

    def rename_output(self, output: str, name: str) -> None:
        """Rename the output of a node that no other node reads."""
        node = next(node for node in self.nodes if output in node.output)
        node.output[0] = name

    def serialise(self, title: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> bytes:
        """Serialise the model.

        Args:
            title: Name of the graph.
            inputs: Descriptions from `describe_tensor`.
            outputs: Descriptions from `describe_tensor`.
        """
        body = helper.make_graph(self.nodes, title, list(inputs), list(outputs), self.constants)
        model = helper.make_model(body, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
        return bytes(model.SerializeToString())


def describe_tensor(name: str, shape: Sequence[int | str] | None, *, is_uint8: bool = False) -> Any:
    """Describe an input or output, float32 unless it is uint8.

    Args:
        name: Name of the tensor.
        shape: Its dimensions; a name stands for any length.
        is_uint8: Whether it holds uint8.
    """
    return helper.make_tensor_value_info(name, TensorProto.UINT8 if is_uint8 else TensorProto.FLOAT, shape)
