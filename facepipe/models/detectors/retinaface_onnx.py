"""RetinaFace as an ONNX graph, written from the torch module: on a CPU ONNX Runtime is the faster engine."""

from collections.abc import Iterable

import numpy as np
from torch import nn

from facepipe.models.detectors.retinaface import ContextModule, RetinaFaceNet, fold_batch_norms
from facepipe.models.detectors.retinaface_trunks import Bottleneck, MobileNet025, ResNet50, Unit
from facepipe.models.onnx_graph import OnnxGraphBuilder, describe_tensor

_HEADS = (("offsets", "box_head", 4), ("scores", "class_head", 2), ("points", "landmark_head", 10))


def build_retinaface_onnx(net: RetinaFaceNet) -> bytes:
    """A serialised model: `input` (n, 3, h, w) float32 as `retinaface_decode.preprocess` gives it, sides multiples of
    32 -> `offsets` (n, a, 4), `scores` (n, a, 2) of background and face, `points` (n, a, 10).
    """
    net = fold_batch_norms(net)
    g = OnnxGraphBuilder()
    maps = _trunk(g, net.trunk)
    levels = [_context(g, context, x) for context, x in zip(net.context, _pyramid(g, net, maps), strict=True)]
    for name, heads, width in _HEADS:
        flat = [_flat(g, _conv(g, head, x), width) for head, x in zip(getattr(net, heads), levels, strict=True)]
        x = g.add_node("Concat", flat, axis=1)
        g.rename_output(g.add_node("Softmax", [x], axis=-1) if name == "scores" else x, name)
    outputs = [describe_tensor(name, ["n", "anchors", width]) for name, _, width in _HEADS]
    return g.serialise("retinaface", [describe_tensor("input", ["n", 3, "height", "width"])], outputs)


def _conv(g: OnnxGraphBuilder, conv: nn.Module, x: str) -> str:
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    weight, bias = (g.add_constant(p.detach().float().cpu().numpy()) for p in (conv.weight, conv.bias))
    return g.add_conv([x, weight, bias], conv.kernel_size[0], conv.stride[0], int(conv.padding[0]), conv.groups)


def _unit(g: OnnxGraphBuilder, unit: nn.Module, x: str) -> str:
    """A folded unit."""
    assert isinstance(unit, Unit)
    x = _conv(g, unit.conv, x)
    act = getattr(unit, "act", None)
    if isinstance(act, nn.LeakyReLU):
        return g.add_node("LeakyRelu", [x], alpha=act.negative_slope)
    return x if act is None else g.add_node("Relu", [x])


def _units(g: OnnxGraphBuilder, within: Iterable[nn.Module], x: str) -> str:
    """Units one after the other, however they are nested."""
    for module in within:
        x = _unit(g, module, x) if isinstance(module, Unit) else _units(g, module.children(), x)
    return x


def _trunk(g: OnnxGraphBuilder, trunk: MobileNet025 | ResNet50) -> list[str]:
    if isinstance(trunk, MobileNet025):
        x, maps = "input", []
        for stage in (trunk.stage1, trunk.stage2, trunk.stage3):
            x = _units(g, stage, x)
            maps.append(x)
        return maps
    x = g.add_node("MaxPool", [_unit(g, trunk.stem, "input")], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    maps = []
    for layer in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4):
        for block in layer:
            x = _bottleneck(g, block, x)
        maps.append(x)
    return maps[1:]


def _bottleneck(g: OnnxGraphBuilder, block: nn.Module, x: str) -> str:
    assert isinstance(block, Bottleneck)
    beside = x if block.shortcut is None else _unit(g, block.shortcut, x)
    return g.add_node("Relu", [g.add_node("Add", [_units(g, (block.reduce, block.spatial, block.expand), x), beside])])


def _pyramid(g: OnnxGraphBuilder, net: RetinaFaceNet, maps: list[str]) -> tuple[str, str, str]:
    p1, p2, p3 = (_unit(g, lateral, x) for lateral, x in zip(net.lateral, maps, strict=True))
    p2 = _unit(g, net.merge[0], g.add_node("Add", [p2, _doubled(g, p3)]))
    p1 = _unit(g, net.merge[1], g.add_node("Add", [p1, _doubled(g, p2)]))
    return p1, p2, p3


def _doubled(g: OnnxGraphBuilder, x: str) -> str:
    """Every pixel four times, as sides that are multiples of 32 allow."""
    scales = g.add_constant(np.array([1, 1, 2, 2], np.float32))
    how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return g.add_node("Resize", [x, "", scales], **how)


def _context(g: OnnxGraphBuilder, context: nn.Module, x: str) -> str:
    assert isinstance(context, ContextModule)
    shared = _unit(g, context.conv5_1, x)
    wide = _units(g, (context.conv7_2, context.conv7_3), shared)
    return g.add_node(
        "Relu", [g.add_node("Concat", [_unit(g, context.conv3, x), _unit(g, context.conv5_2, shared), wide], axis=1)]
    )


def _flat(g: OnnxGraphBuilder, x: str, width: int) -> str:
    planes_last = g.add_node("Transpose", [x], perm=[0, 2, 3, 1])
    return g.add_node("Reshape", [planes_last, g.add_constant(np.array([0, -1, width], np.int64))])
