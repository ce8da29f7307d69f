"""RetinaFace (Deng et al., CVPR 2020) with the MobileNet-0.25 backbone, as a torch module.

Shapes and constants are those of the public PyTorch implementation by biubug6 (models/net.py, retinaface.py).
"""

from collections import OrderedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facepipe.models.detectors.retinaface_decode import STRIDES


def _conv(i: int, o: int, k: int = 3, stride: int = 1, groups: int = 1, leak: float | None = 0.1) -> nn.Sequential:
    """Convolution with its batch norm folded in, then LeakyReLU (none where leak is None)."""
    layers: list[nn.Module] = [nn.Conv2d(i, o, k, stride, k // 2, groups=groups)]
    if leak is not None:
        layers.append(nn.LeakyReLU(leak))
    return nn.Sequential(*layers)


def _separable(i: int, o: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(_conv(i, i, 3, stride, groups=i), _conv(i, o, 1))


class ContextModule(nn.Module):
    """SSH context: 3x3, 5x5 and 7x7 receptive fields side by side (Najibi et al., ICCV 2017)."""

    def __init__(self, width: int, leak: float = 0.1):
        super().__init__()
        self.conv3 = _conv(width, width // 2, leak=None)
        self.conv5_1 = _conv(width, width // 4, leak=leak)
        self.conv5_2 = _conv(width // 4, width // 4, leak=None)
        self.conv7_2 = _conv(width // 4, width // 4, leak=leak)
        self.conv7_3 = _conv(width // 4, width // 4, leak=None)

    def forward(self, x: Tensor) -> Tensor:
        shared = self.conv5_1(x)
        return F.relu(torch.cat([self.conv3(x), self.conv5_2(shared), self.conv7_3(self.conv7_2(shared))], 1))


class RetinaFaceNet(nn.Module):
    """(n, 3, h, w) float BGR minus MEAN_BGR -> offsets (n, a, 4), face probability (n, a), landmark offsets (n, a, 10).

    Anchors a: level, row, column, size. Batch norms are folded into the convolutions.
    """

    def __init__(self, width: int = 64):
        super().__init__()
        body = [(8, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
        self.stage1 = nn.Sequential(_conv(3, 8, 3, 2), *(_separable(*s) for s in body))
        self.stage2 = nn.Sequential(_separable(64, 128, 2), *(_separable(128, 128) for _ in range(5)))
        self.stage3 = nn.Sequential(_separable(128, 256, 2), _separable(256, 256))
        self.lateral = nn.ModuleList(_conv(i, width, 1) for i in (64, 128, 256))
        self.merge = nn.ModuleList(_conv(width, width) for _ in range(2))
        self.context = nn.ModuleList(ContextModule(width) for _ in STRIDES)
        self.class_head, self.box_head, self.landmark_head = (
            nn.ModuleList(nn.Conv2d(width, 2 * n, 1) for _ in STRIDES) for n in (2, 4, 10)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c1 = self.stage1(x)
        c2 = self.stage2(c1)
        c3 = self.stage3(c2)
        p1, p2, p3 = (lateral(c) for lateral, c in zip(self.lateral, (c1, c2, c3), strict=True))
        p2 = self.merge[0](p2 + F.interpolate(p3, size=p2.shape[2:], mode="nearest"))
        p1 = self.merge[1](p1 + F.interpolate(p2, size=p1.shape[2:], mode="nearest"))
        levels = [context(p) for context, p in zip(self.context, (p1, p2, p3), strict=True)]
        boxes, classes, points = (
            torch.cat([self._flat(head(f), n) for head, f in zip(heads, levels, strict=True)], 1)
            for heads, n in ((self.box_head, 4), (self.class_head, 2), (self.landmark_head, 10))
        )
        return boxes, classes.softmax(-1)[..., 1], points

    @staticmethod
    def _flat(x: Tensor, n: int) -> Tensor:
        return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, n)


def state_from_graph(
    initialisers: "OrderedDict[str, npt.NDArray[np.float32]]", net: RetinaFaceNet
) -> dict[str, Tensor]:
    """The network's state dict from the constants of the exported ONNX graph.

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
