"""RetinaFace (Deng et al., CVPR 2020) as a torch module, with a MobileNet-0.25 or a ResNet-50 trunk.

Shapes and constants are those of the public PyTorch implementation by biubug6 (models/net.py, retinaface.py).
"""

import copy
from collections import OrderedDict
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facepipe.models.detectors.retinaface_decode import MEAN_BGR, STRIDES
from facepipe.models.detectors.retinaface_trunks import MobileNet025, ResNet50, Shape, Unit
from facepipe.types import Float32

Trunk = Literal["mobilenet025", "resnet50"]
Channels = Literal["bgr", "rgb"]
Predictions = tuple[Tensor, Tensor, Tensor]

# The class of each trunk, and the width of the pyramid on top of it.
_TRUNKS: dict[str, tuple[type[MobileNet025] | type[ResNet50], int]] = {
    "mobilenet025": (MobileNet025, 64),
    "resnet50": (ResNet50, 256),
}


class ContextModule(nn.Module):
    """SSH context: 3x3, 5x5 and 7x7 receptive fields side by side (Najibi et al., ICCV 2017)."""

    def __init__(self, width: int, leak: float, norms: bool):
        super().__init__()
        quarter = width // 4
        self.conv3 = Unit(width, width // 2, Shape(3), None, norms)
        self.conv5_1 = Unit(width, quarter, Shape(3), leak, norms)
        self.conv5_2 = Unit(quarter, quarter, Shape(3), None, norms)
        self.conv7_2 = Unit(quarter, quarter, Shape(3), leak, norms)
        self.conv7_3 = Unit(quarter, quarter, Shape(3), None, norms)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the map of all three fields, (n, width, h, w)."""
        shared = self.conv5_1(x)
        return F.relu(torch.cat([self.conv3(x), self.conv5_2(shared), self.conv7_3(self.conv7_2(shared))], 1))


class RetinaFaceNet(nn.Module):
    """RetinaFace without decoding.

    Attributes:
        depths: Names of the parts from the image to the outputs, for learning rates that fall layer by layer; parts in
            one tuple are at the same depth.
    """

    depths = (
        ("trunk.stem", "trunk.layer1"),
        ("trunk.stage1", "trunk.layer2"),
        ("trunk.stage2", "trunk.layer3"),
        ("trunk.stage3", "trunk.layer4"),
        ("lateral",),
        ("merge",),
        ("context",),
        ("class_head", "box_head", "landmark_head"),
    )

    def __init__(self, trunk: Trunk = "mobilenet025", norms: bool = False):
        """Build the network with random weights.

        Args:
            trunk: Which trunk.
            norms: True keeps the batch norms, for training and for checkpoints that have them. False is the folded
                form.
        """
        super().__init__()
        trunk_class, width = _TRUNKS[trunk]
        # As in the public implementation, narrow pyramids have leaky ReLUs and wide ones plain ones.
        leak = 0.1 if width <= 64 else 0.0
        self.trunk = trunk_class(norms)
        self.lateral = nn.ModuleList(Unit(i, width, Shape(1), leak, norms) for i in trunk_class.channels)
        self.merge = nn.ModuleList(Unit(width, width, Shape(3), leak, norms) for _ in range(2))
        self.context = nn.ModuleList(ContextModule(width, leak, norms) for _ in STRIDES)
        # Two anchors per cell, each with 2 classes, 4 offsets of the box and 10 of the landmarks.
        self.class_head = nn.ModuleList(nn.Conv2d(width, 2 * 2, 1) for _ in STRIDES)
        self.box_head = nn.ModuleList(nn.Conv2d(width, 2 * 4, 1) for _ in STRIDES)
        self.landmark_head = nn.ModuleList(nn.Conv2d(width, 2 * 10, 1) for _ in STRIDES)

    def forward(self, x: Tensor) -> Predictions:
        """Compute the predictions of all anchors.

        Args:
            x: (n, 3, h, w) from `normalise_pixels`.

        Returns:
            Box offsets (n, a, 4), face probabilities (n, a) and landmark offsets (n, a, 10); anchors by level, row,
            column and size. In training the logits (n, a, 2) of background and face replace the probabilities.
        """
        levels = [context(p) for context, p in zip(self.context, self._build_pyramid(x), strict=True)]
        boxes = self._apply_heads(self.box_head, levels, 4)
        classes = self._apply_heads(self.class_head, levels, 2)
        points = self._apply_heads(self.landmark_head, levels, 10)
        return boxes, classes if self.training else classes.softmax(-1)[..., 1], points

    def _build_pyramid(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p1, p2, p3 = (lateral(c) for lateral, c in zip(self.lateral, self.trunk(x), strict=True))
        # Add each level to the finer one, top down.
        p2 = self.merge[0](p2 + F.interpolate(p3, size=p2.shape[2:], mode="nearest"))
        p1 = self.merge[1](p1 + F.interpolate(p2, size=p1.shape[2:], mode="nearest"))
        return p1, p2, p3

    @staticmethod
    def _apply_heads(heads: nn.ModuleList, levels: list[Tensor], values: int) -> Tensor:
        """Compute (n, a, values) from the maps of all levels."""
        maps = [head(level) for head, level in zip(heads, levels, strict=True)]
        return torch.cat([m.permute(0, 2, 3, 1).reshape(m.shape[0], -1, values) for m in maps], 1)


def normalise_pixels(pixels: Tensor, channels: Channels) -> Tensor:
    """Convert images to what the network takes.

    104, 117 and 123 are subtracted in the order in which the channels enter the network: from blue, green and red for
    "bgr", from red, green and blue for "rgb". A network trained on one order must not get the other.

    Args:
        pixels: (n, h, w, 3) uint8 RGB.
        channels: The channel order in which the network was trained.

    Returns:
        (n, 3, h, w) float32 in channels_last.
    """
    planes = pixels.permute(0, 3, 1, 2)
    ordered = planes.flip(1) if channels == "bgr" else planes
    mean = torch.tensor(MEAN_BGR, device=pixels.device).view(1, 3, 1, 1)
    return (ordered.float() - mean).contiguous(memory_format=torch.channels_last)


def fold_batch_norms(net: RetinaFaceNet) -> RetinaFaceNet:
    """Copy a network in inference mode, with its batch norms folded into the convolutions."""
    folded = copy.deepcopy(net).eval()
    for module in folded.modules():
        if isinstance(module, Unit):
            module.fold()
    return folded


def convert_onnx_constants(constants: "OrderedDict[str, Float32]", net: RetinaFaceNet) -> dict[str, Tensor]:
    """Convert the constants of the exported ONNX graph to the state dict of the folded network.

    The graph names the heads. It numbers the folded convolutions in the order they ran, which is this module's order of
    definition; shapes are checked one by one.

    Raises:
        ValueError: A shape differs, or constants are left over.
    """
    heads = {
        "class_head": "class_head.class_head",
        "box_head": "bbox_head.bbox_head",
        "landmark_head": "landmark_head.landmark_head",
    }
    rest = [array for name, array in constants.items() if not name.split(".")[0].endswith("_head")]
    state: dict[str, Tensor] = {}
    for name, expected in net.state_dict().items():
        module, _, leaf = name.partition(".")
        # Tensors of heads are found by name, the others in order.
        array = constants[f"{heads[module]}.{leaf}"] if module in heads else rest.pop(0)
        if array.shape != tuple(expected.shape):
            raise ValueError(f"{name}: the graph has shape {array.shape}, the network {tuple(expected.shape)}")
        state[name] = torch.from_numpy(array.copy())
    if rest:
        raise ValueError(f"{len(rest)} constants of the graph are left over")
    return state
