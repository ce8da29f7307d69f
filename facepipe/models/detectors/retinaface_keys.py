"""Tensor names of biubug6's RetinaFace checkpoints (models/net.py, retinaface.py), renamed pattern by pattern."""

import re
from collections.abc import Callable

from facepipe.models.checkpoint import State

_UNIT = {"0": "conv", "1": "norm"}
_SEPARABLE = {
    "0": "depthwise.conv",
    "1": "depthwise.norm",
    "3": "pointwise.conv",
    "4": "pointwise.norm",
}
_BOTTLENECK = {
    "conv1": "reduce.conv",
    "bn1": "reduce.norm",
    "conv2": "spatial.conv",
    "bn2": "spatial.norm",
    "conv3": "expand.conv",
    "bn3": "expand.norm",
    "downsample.0": "shortcut.conv",
    "downsample.1": "shortcut.norm",
}
_CONTEXT = {
    "conv3X3": "conv3",
    "conv5X5_1": "conv5_1",
    "conv5X5_2": "conv5_2",
    "conv7X7_2": "conv7_2",
    "conv7x7_3": "conv7_3",  # the lower-case x is the checkpoints' own
}
_HEADS = {"ClassHead": "class_head", "BboxHead": "box_head", "LandmarkHead": "landmark_head"}
_MERGES = {"2": "0", "1": "1"}  # ours are in the order they run: the coarser level first

_PATTERNS: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (r"body\.stage1\.0\.([01])\.(\w+)", lambda m: f"trunk.stage1.0.{_UNIT[m[1]]}.{m[2]}"),
    (r"body\.(stage[123]\.\d+)\.([0134])\.(\w+)", lambda m: f"trunk.{m[1]}.{_SEPARABLE[m[2]]}.{m[3]}"),
    (r"body\.conv1\.(\w+)", lambda m: f"trunk.stem.conv.{m[1]}"),
    (r"body\.bn1\.(\w+)", lambda m: f"trunk.stem.norm.{m[1]}"),
    (
        r"body\.(layer[1-4]\.\d+)\.(conv[123]|bn[123]|downsample\.[01])\.(\w+)",
        lambda m: f"trunk.{m[1]}.{_BOTTLENECK[m[2]]}.{m[3]}",
    ),
    (r"fpn\.output([123])\.([01])\.(\w+)", lambda m: f"lateral.{int(m[1]) - 1}.{_UNIT[m[2]]}.{m[3]}"),
    (r"fpn\.merge([12])\.([01])\.(\w+)", lambda m: f"merge.{_MERGES[m[1]]}.{_UNIT[m[2]]}.{m[3]}"),
    (
        r"ssh([123])\.(conv\d[Xx]\d(?:_\d)?)\.([01])\.(\w+)",
        lambda m: f"context.{int(m[1]) - 1}.{_CONTEXT[m[2]]}.{_UNIT[m[3]]}.{m[4]}",
    ),
    (r"(ClassHead|BboxHead|LandmarkHead)\.([012])\.conv1x1\.(\w+)", lambda m: f"{_HEADS[m[1]]}.{m[2]}.{m[3]}"),
)


def rename_biubug6_keys(state: State) -> State:
    """Rename the tensors of a checkpoint of either trunk, whose DataParallel prefix `module.` is already removed.

    A name that no pattern matches stays, so that `load_state` lists it as left over.
    """
    return {_rename_key(name): tensor for name, tensor in state.items()}


def _rename_key(name: str) -> str:
    for pattern, rename in _PATTERNS:
        match = re.fullmatch(pattern, name)
        if match:
            return rename(match)
    return name
