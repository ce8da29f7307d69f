"""Inception-ResNet-v1 (Szegedy et al., AAAI 2017) as FaceNet implementations build it, for 160x160 chips.

Layers, names and residual scales are those of D. Sandberg's TensorFlow network and of its port facenet-pytorch, whose
state dicts load unchanged. Unlike in the paper, blocks C are followed by a last one without activation.
"""

import torch
from torch import Tensor, nn

from facepipe.models.embedders.layers import ConvBN

EPS = 1e-3


def _make_conv(i: int, o: int, kernel: int | tuple[int, int] = 1) -> ConvBN:
    """Make a convolution of stride 1, padded by half its kernel, with batch norm and ReLU."""
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    conv = nn.Conv2d(i, o, (height, width), 1, (height // 2, width // 2), bias=False)
    return ConvBN(conv, nn.ReLU(), EPS)


def _make_valid_conv(i: int, o: int, stride: int) -> ConvBN:
    """Make a 3x3 convolution without padding, with batch norm and ReLU."""
    return ConvBN(nn.Conv2d(i, o, (3, 3), stride, (0, 0), bias=False), nn.ReLU(), EPS)


class Branches(nn.Module):
    """Branches side by side, named branch0, branch1 and so on; their channels are concatenated."""

    def __init__(self, *branches: nn.Module):
        super().__init__()
        self._names = [f"branch{n}" for n in range(len(branches))]
        for name, branch in zip(self._names, branches, strict=True):
            self.add_module(name, branch)

    def forward(self, x: Tensor) -> Tensor:
        """Apply all branches."""
        return torch.cat([self.get_submodule(name)(x) for name in self._names], 1)


class Residual(Branches):
    """relu(x + scale * conv1x1(branches))."""

    def __init__(self, width: int, scale: float, *branches: nn.Module, active: bool = True):
        """Build the block.

        Args:
            width: Channels in and out.
            scale: Factor of the branches.
            branches: The branches.
            active: False leaves the ReLU out.
        """
        super().__init__(*branches)
        self.conv2d = nn.Conv2d(sum(_count_channels(branch) for branch in branches), width, 1)
        self.scale = scale
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block's map."""
        x = x + self.scale * self.conv2d(super().forward(x))
        return x.relu() if self.active else x


def _count_channels(branch: nn.Module) -> int:
    # The last convolution of a branch gives its channels.
    return [m for m in branch.modules() if isinstance(m, nn.Conv2d)][-1].out_channels


def _make_block_a() -> Residual:
    wide = nn.Sequential(_make_conv(256, 32), _make_conv(32, 32, 3), _make_conv(32, 32, 3))
    narrow = _make_conv(256, 32)
    medium = nn.Sequential(_make_conv(256, 32), _make_conv(32, 32, 3))
    return Residual(256, 0.17, narrow, medium, wide)


def _make_block_b() -> Residual:
    cross = nn.Sequential(_make_conv(896, 128), _make_conv(128, 128, (1, 7)), _make_conv(128, 128, (7, 1)))
    return Residual(896, 0.1, _make_conv(896, 128), cross)


def _make_block_c(scale: float = 0.2, *, active: bool = True) -> Residual:
    cross = nn.Sequential(_make_conv(1792, 192), _make_conv(192, 192, (1, 3)), _make_conv(192, 192, (3, 1)))
    return Residual(1792, scale, _make_conv(1792, 192), cross, active=active)


def _make_reduction_a() -> Branches:
    wide = nn.Sequential(_make_conv(256, 192), _make_conv(192, 192, 3), _make_valid_conv(192, 256, stride=2))
    return Branches(_make_valid_conv(256, 384, stride=2), wide, nn.MaxPool2d(3, 2))


def _make_reduction_b() -> Branches:
    return Branches(
        nn.Sequential(_make_conv(896, 256), _make_valid_conv(256, 384, stride=2)),
        nn.Sequential(_make_conv(896, 256), _make_valid_conv(256, 256, stride=2)),
        nn.Sequential(_make_conv(896, 256), _make_conv(256, 256, 3), _make_valid_conv(256, 256, stride=2)),
        nn.MaxPool2d(3, 2),
    )


class InceptionResNetV1(nn.Module):
    """The network; chips of other sizes work from 75 pixels on.

    facenet-pytorch's network of 512-D has 23 482 624 parameters.
    """

    def __init__(self, dim: int = 128, dropout: float = 0.6):
        """Build the network with random weights.

        Args:
            dim: Length of the vectors.
            dropout: Probability before the last linear layer.
        """
        super().__init__()
        self.conv2d_1a = _make_valid_conv(3, 32, stride=2)
        self.conv2d_2a = _make_valid_conv(32, 32, stride=1)
        self.conv2d_2b = _make_conv(32, 64, 3)
        self.maxpool_3a = nn.MaxPool2d(3, 2)
        self.conv2d_3b = _make_conv(64, 80)
        self.conv2d_4a = _make_valid_conv(80, 192, stride=1)
        self.conv2d_4b = _make_valid_conv(192, 256, stride=2)
        self.repeat_1 = nn.Sequential(*[_make_block_a() for _ in range(5)])
        self.mixed_6a = _make_reduction_a()
        self.repeat_2 = nn.Sequential(*[_make_block_b() for _ in range(10)])
        self.mixed_7a = _make_reduction_b()
        self.repeat_3 = nn.Sequential(*[_make_block_c() for _ in range(5)])
        self.block8 = _make_block_c(1.0, active=False)
        self.dropout = nn.Dropout(dropout)
        self.last_linear = nn.Linear(1792, dim, bias=False)
        self.last_bn = nn.BatchNorm1d(dim, EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Embed chips (n, 3, h, w) as raw vectors (n, dim)."""
        x = self.conv2d_2b(self.conv2d_2a(self.conv2d_1a(x)))
        x = self.conv2d_4b(self.conv2d_4a(self.conv2d_3b(self.maxpool_3a(x))))
        x = self.mixed_7a(self.repeat_2(self.mixed_6a(self.repeat_1(x))))
        x = self.block8(self.repeat_3(x)).mean((2, 3))
        out: Tensor = self.last_bn(self.last_linear(self.dropout(x)))
        return out
