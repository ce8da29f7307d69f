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
        shared = self.conv5_1(x)
        return F.relu(torch.cat([self.conv3(x), self.conv5_2(shared), self.conv7_3(self.conv7_2(shared))], 1))


class RetinaFaceNet(nn.Module):
    """(n, 3, h, w) float from `normalise_pixels`
    -> offsets (n, a, 4), face probability (n, a), landmark offsets (n, a, 10).

    While training, the logits (n, a, 2) of background and face stand in the probability's place. Anchors a: level,
    row, column, size.

    norms: True keeps the batch norms, for training and for checkpoints that have them; False is the folded form
    """

    # From the image to the outputs, for rates that fall layer by layer; what stands together is at one depth.
    depths = (
        *(("trunk.stem", "trunk.layer1"), ("trunk.stage1", "trunk.layer2"), ("trunk.stage2", "trunk.layer3")),
        *(("trunk.stage3", "trunk.layer4"), ("lateral",), ("merge",), ("context",)),
        ("class_head", "box_head", "landmark_head"),
    )

    def __init__(self, trunk: Trunk = "mobilenet025", norms: bool = False):
        super().__init__()
        kind, width = _TRUNKS[trunk]
        leak = 0.1 if width <= 64 else 0.0
        self.trunk = kind(norms)
        self.lateral = nn.ModuleList(Unit(i, width, Shape(1), leak, norms) for i in kind.channels)
        self.merge = nn.ModuleList(Unit(width, width, Shape(3), leak, norms) for _ in range(2))
        self.context = nn.ModuleList(ContextModule(width, leak, norms) for _ in STRIDES)
        self.class_head, self.box_head, self.landmark_head = (
            nn.ModuleList(nn.Conv2d(width, 2 * n, 1) for _ in STRIDES) for n in (2, 4, 10)
        )

    def forward(self, x: Tensor) -> Predictions:
        levels = [context(p) for context, p in zip(self.context, self._pyramid(x), strict=True)]
        boxes, classes, points = (
            torch.cat([self._flat(head(f), n) for head, f in zip(heads, levels, strict=True)], 1)
            for heads, n in ((self.box_head, 4), (self.class_head, 2), (self.landmark_head, 10))
        )
        return boxes, classes if self.training else classes.softmax(-1)[..., 1], points

    def _pyramid(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p1, p2, p3 = (lateral(c) for lateral, c in zip(self.lateral, self.trunk(x), strict=True))
        p2 = self.merge[0](p2 + F.interpolate(p3, size=p2.shape[2:], mode="nearest"))
        p1 = self.merge[1](p1 + F.interpolate(p2, size=p1.shape[2:], mode="nearest"))
        return p1, p2, p3

    @staticmethod
    def _flat(x: Tensor, n: int) -> Tensor:
        return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, n)


def normalise_pixels(pixels: Tensor, channels: Channels) -> Tensor:
    """(n, h, w, 3) uint8 RGB -> (n, 3, h, w) float32 in the network's channel order, in channels_last.

    104, 117 and 123 are taken off in the order in which the channels enter the network: off blue, green and red for
    "bgr", off red, green and blue for "rgb". Networks trained on one order are not to be fed the other.
    """
    planes = pixels.permute(0, 3, 1, 2)
    ordered = planes.flip(1) if channels == "bgr" else planes
    mean = torch.tensor(MEAN_BGR, device=pixels.device).view(1, 3, 1, 1)
    return (ordered.float() - mean).contiguous(memory_format=torch.channels_last)


def fold_batch_norms(net: RetinaFaceNet) -> RetinaFaceNet:
    """A copy in inference mode whose batch norms are folded into the convolutions; `net` stays as it was."""
    folded = copy.deepcopy(net).eval()
    for module in folded.modules():
        if isinstance(module, Unit):
            module.fold()
    return folded


def convert_onnx_constants(initialisers: "OrderedDict[str, Float32]", net: RetinaFaceNet) -> dict[str, Tensor]:
    """The folded network's state dict from the constants of the exported ONNX graph.

    The graph names the heads and numbers the folded convolutions in the order they ran, which is this module's order
    of definition; shapes are checked one by one.
    """
    heads = {
        "class_head": "class_head.class_head",
        "box_head": "bbox_head.bbox_head",
        "landmark_head": "landmark_head.landmark_head",
    }
    rest = [array for name, array in initialisers.items() if not name.split(".")[0].endswith("_head")]
    state: dict[str, Tensor] = {}
    for name, wanted in net.state_dict().items():
        module, _, leaf = name.partition(".")
        array = initialisers[f"{heads[module]}.{leaf}"] if module in heads else rest.pop(0)
        if array.shape != tuple(wanted.shape):
            raise ValueError(f"{name}: the graph has shape {array.shape}, the network wants {tuple(wanted.shape)}")
        state[name] = torch.from_numpy(array.copy())
    if rest:
        raise ValueError(f"{len(rest)} constants of the graph are left over")
    return state
