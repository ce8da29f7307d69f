"""dlib's face recognition ResNet (Davis King, dlib-models 2017, public domain) as a torch module: 150x150 RGB -> 128-D.

A ResNet-34 with three of its blocks left out and half the filters; affine layers are folded into the convolutions.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facepipe.models.dlib.layout import BLOCKS, Convolution
from facepipe.types import Float32


class Block(nn.Module):
    """relu(shortcut + conv(relu(conv(x)))); the shortcut of a strided block is average pooling, zero-padded to fit."""

    def __init__(self, i: int, o: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, stride, 0 if stride == 2 else 1)
        self.conv2 = nn.Conv2d(o, o, 3, 1, 1)
        self.stride, self.grow = stride, o - i

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x)))
        if self.stride == 2:
            x = F.pad(F.avg_pool2d(x, 2, 2), (0, 0, 0, 0, 0, self.grow))
            height, width = max(x.shape[2], y.shape[2]), max(x.shape[3], y.shape[3])
            x, y = (F.pad(t, (0, width - t.shape[3], 0, height - t.shape[2])) for t in (x, y))
        return F.relu(x + y)


class DlibResNet(nn.Module):
    """(n, 3, 150, 150) RGB, (x - MEAN_RGB) / SCALE -> (n, dim), not normalised; dlib's own has 128."""

    def __init__(self, dim: int = 128) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 7, 2)
        self.blocks = nn.ModuleList(Block(*step) for step in BLOCKS)
        self.fc = nn.Linear(256, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))

    def load_weights(self, convolutions: list[Convolution], fc: Float32) -> "DlibResNet":
        """Take the weights of `folded`."""
        modules = [m for m in self.modules() if isinstance(m, nn.Conv2d)]
        with torch.no_grad():
            for module, conv in zip(modules, convolutions, strict=True):
                module.load_state_dict({"weight": torch.from_numpy(conv.weight), "bias": torch.from_numpy(conv.bias)})
            self.fc.weight.copy_(torch.from_numpy(np.ascontiguousarray(fc.T)))
        return self.eval().requires_grad_(False)
