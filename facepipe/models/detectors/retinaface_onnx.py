"""RetinaFace as an ONNX graph, written from the torch module: on a CPU ONNX Runtime is the faster engine."""

from collections.abc import Iterable

import numpy as np
from torch import nn

from facepipe.models.detectors.retinaface import ContextModule, RetinaFaceNet, fold_batch_norms
from facepipe.models.detectors.retinaface_trunks import Bottleneck, MobileNet025, ResNet50, Unit
from facepipe.models.onnx_graph import OnnxGraphBuilder, describe_tensor

# Output, the module's heads, values per anchor.
_HEADS = (("offsets", "box_head", 4), ("scores", "class_head", 2), ("points", "landmark_head", 10))


def build_retinaface_onnx(net: RetinaFaceNet) -> bytes:
    """Serialise a network as an ONNX model.

    Its input is `input` (n, 3, h, w) float32 from `to_bgr_planes`, with sides that are multiples of 32. Its outputs are
    `offsets` (n, a, 4), `scores` (n, a, 2) of background and face, and `points` (n, a, 10).
    """
    net = fold_batch_norms(net)
    builder = OnnxGraphBuilder()
    maps = _add_trunk(builder, net.trunk)
    pyramid = _add_pyramid(builder, net, maps)
    levels = [_add_context(builder, context, x) for context, x in zip(net.context, pyramid, strict=True)]
    # Collect each head's values from all levels, (n, a, width), by level as in the module.
    for name, heads, width in _HEADS:
        rows = []
        for head, level in zip(getattr(net, heads), levels, strict=True):
            rows.append(_add_flatten(builder, _add_conv(builder, head, level), width))
        x = builder.add_node("Concat", rows, axis=1)
        if name == "scores":
            x = builder.add_node("Softmax", [x], axis=-1)
        builder.rename_output(x, name)
    outputs = [describe_tensor(name, ["n", "anchors", width]) for name, _, width in _HEADS]
    return builder.serialise("retinaface", [describe_tensor("input", ["n", 3, "height", "width"])], outputs)


def _add_conv(builder: OnnxGraphBuilder, conv: nn.Module, x: str) -> str:
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    weight = builder.add_constant(conv.weight.detach().float().cpu().numpy())
    bias = builder.add_constant(conv.bias.detach().float().cpu().numpy())
    return builder.add_conv(
        [x, weight, bias],
        kernel=conv.kernel_size[0],
        stride=conv.stride[0],
        padding=int(conv.padding[0]),
        groups=conv.groups,
    )


def _add_unit(builder: OnnxGraphBuilder, unit: nn.Module, x: str) -> str:
    """Add a folded unit."""
    assert isinstance(unit, Unit)
    x = _add_conv(builder, unit.conv, x)
    activation = getattr(unit, "act", None)
    if isinstance(activation, nn.LeakyReLU):
        return builder.add_node("LeakyRelu", [x], alpha=activation.negative_slope)
    return x if activation is None else builder.add_node("Relu", [x])


def _add_units(builder: OnnxGraphBuilder, modules: Iterable[nn.Module], x: str) -> str:
    """Add units one after the other, however they are nested."""
    for module in modules:
        x = _add_unit(builder, module, x) if isinstance(module, Unit) else _add_units(builder, module.children(), x)
    return x


def _add_trunk(builder: OnnxGraphBuilder, trunk: MobileNet025 | ResNet50) -> list[str]:
    """Add the trunk and return its three maps."""
    maps = []
    if isinstance(trunk, MobileNet025):
        x = "input"
        for stage in (trunk.stage1, trunk.stage2, trunk.stage3):
            x = _add_units(builder, stage, x)
            maps.append(x)
        return maps
    # The map of the first layer, at stride 4, is not used.
    stem = _add_unit(builder, trunk.stem, "input")
    x = builder.add_node("MaxPool", [stem], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    for layer in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4):
        for block in layer:
            x = _add_bottleneck(builder, block, x)
        maps.append(x)
    return maps[1:]


def _add_bottleneck(builder: OnnxGraphBuilder, block: nn.Module, x: str) -> str:
    assert isinstance(block, Bottleneck)
    shortcut = x if block.shortcut is None else _add_unit(builder, block.shortcut, x)
    expanded = _add_units(builder, (block.reduce, block.spatial, block.expand), x)
    return builder.add_node("Relu", [builder.add_node("Add", [expanded, shortcut])])


def _add_pyramid(builder: OnnxGraphBuilder, net: RetinaFaceNet, maps: list[str]) -> tuple[str, str, str]:
    p1, p2, p3 = (_add_unit(builder, lateral, x) for lateral, x in zip(net.lateral, maps, strict=True))
    p2 = _add_unit(builder, net.merge[0], builder.add_node("Add", [p2, _add_upsampling(builder, p3)]))
    p1 = _add_unit(builder, net.merge[1], builder.add_node("Add", [p1, _add_upsampling(builder, p2)]))
    return p1, p2, p3


def _add_upsampling(builder: OnnxGraphBuilder, x: str) -> str:
    """Repeat every pixel twice both ways, which is exact for sides that are multiples of 32."""
    scales = builder.add_constant(np.array([1, 1, 2, 2], np.float32))
    return builder.add_node(
        "Resize",
        [x, "", scales],
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )


def _add_context(builder: OnnxGraphBuilder, context: nn.Module, x: str) -> str:
    assert isinstance(context, ContextModule)
    shared = _add_unit(builder, context.conv5_1, x)
    wide = _add_units(builder, (context.conv7_2, context.conv7_3), shared)
    narrow = _add_unit(builder, context.conv3, x)
    medium = _add_unit(builder, context.conv5_2, shared)
    return builder.add_node("Relu", [builder.add_node("Concat", [narrow, medium, wide], axis=1)])


def _add_flatten(builder: OnnxGraphBuilder, x: str, width: int) -> str:
    """Turn a map into one row of `width` values per anchor."""
    planes_last = builder.add_node("Transpose", [x], perm=[0, 2, 3, 1])
    return builder.add_node("Reshape", [planes_last, builder.add_constant(np.array([0, -1, width], np.int64))])
