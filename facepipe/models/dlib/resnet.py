"""dlib's face recognition ResNet (Davis King, dlib-models 2017, public domain) as a torch module: 150x150 RGB -> 128-D.

It is a ResNet-34 without three of its blocks and with half the filters. Affine layers are folded into the convolutions.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facepipe.models.dlib.layout import BLOCKS, Convolution
from facepipe.types import Float32


class DlibBlock(nn.Module):
    """relu(shortcut + conv(relu(conv(x)))).

    The shortcut of a strided block is average pooling, zero-padded to fit.
    """

    def __init__(self, i: int, o: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, stride, 0 if stride == 2 else 1)
        self.conv2 = nn.Conv2d(o, o, 3, 1, 1)
        self.stride = stride
        self.added_channels = o - i

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block's map."""
        y = self.conv2(F.relu(self.conv1(x)))
        # Both maps are padded to the larger of their sizes, the shortcut also to the new channels.
        if self.stride == 2:
            x = F.pad(F.avg_pool2d(x, 2, 2), (0, 0, 0, 0, 0, self.added_channels))
            height = max(x.shape[2], y.shape[2])
            width = max(x.shape[3], y.shape[3])
            x = _pad_to(x, height, width)
            y = _pad_to(y, height, width)
        return F.relu(x + y)


def _pad_to(x: Tensor, height: int, width: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))


class DlibResNet(nn.Module):
    """The network; dlib's own has 128 dimensions."""

    def __init__(self, dim: int = 128) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 7, 2)
        self.blocks = nn.ModuleList(DlibBlock(*shape) for shape in BLOCKS)
        self.fc = nn.Linear(256, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Embed chips.

        Args:
            x: (n, 3, 150, 150) RGB, (level - MEAN_RGB) / SCALE.

        Returns:
            Raw vectors (n, dim).
        """
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))

    def load_weights(self, convolutions: list[Convolution], fc: Float32) -> "DlibResNet":
        """Load the weights from `fold_layers` and return the network, ready for inference."""
        modules = [m for m in self.modules() if isinstance(m, nn.Conv2d)]
        with torch.no_grad():
            for module, conv in zip(modules, convolutions, strict=True):
                module.load_state_dict({"weight": torch.from_numpy(conv.weight), "bias": torch.from_numpy(conv.bias)})
            self.fc.weight.copy_(torch.from_numpy(np.ascontiguousarray(fc.T)))
        return self.eval().requires_grad_(False)
