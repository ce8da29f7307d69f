"""Inception-ResNet-v1 (Szegedy et al., AAAI 2017) as FaceNet implementations build it, for 160x160 chips.

Layers, names and residual scales are those of D. Sandberg's TensorFlow network and of its port facenet-pytorch, whose
state dicts load as they are; against the paper, blocks C are followed by a last one without activation.
"""

import torch
from torch import Tensor, nn

from facepipe.models.embedders.layers import ConvBN

EPS = 1e-3
SAME, VALID = True, False


def _conv(i: int, o: int, kernel: int | tuple[int, int] = 1, stride: int = 1, same: bool = SAME) -> ConvBN:
    """Convolution, batch norm, ReLU; padded by half its kernel unless it is VALID."""
    h, w = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (h // 2, w // 2) if same else (0, 0)
    return ConvBN(nn.Conv2d(i, o, (h, w), stride, padding, bias=False), nn.ReLU(), EPS)


class Branches(nn.Module):
    """Branches side by side, named branch0, branch1 and so on; their channels are put one after the other."""

    def __init__(self, *branches: nn.Module):
        super().__init__()
        self._names = [f"branch{n}" for n in range(len(branches))]
        for name, branch in zip(self._names, branches, strict=True):
            self.add_module(name, branch)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.get_submodule(name)(x) for name in self._names], 1)


class Residual(Branches):
    """relu(x + scale * conv1x1(branches)); `active=False` leaves the ReLU out."""

    def __init__(self, width: int, scale: float, *branches: nn.Module, active: bool = True):
        super().__init__(*branches)
        self.conv2d = nn.Conv2d(sum(_width(b) for b in branches), width, 1)
        self.scale, self.active = scale, active

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale * self.conv2d(super().forward(x))
        return x.relu() if self.active else x


def _width(branch: nn.Module) -> int:
    return [m for m in branch.modules() if isinstance(m, nn.Conv2d)][-1].out_channels


def _block_a() -> Residual:
    three = nn.Sequential(_conv(256, 32), _conv(32, 32, 3), _conv(32, 32, 3))
    return Residual(256, 0.17, _conv(256, 32), nn.Sequential(_conv(256, 32), _conv(32, 32, 3)), three)


def _block_b() -> Residual:
    cross = nn.Sequential(_conv(896, 128), _conv(128, 128, (1, 7)), _conv(128, 128, (7, 1)))
    return Residual(896, 0.1, _conv(896, 128), cross)


def _block_c(scale: float = 0.2, active: bool = True) -> Residual:
    cross = nn.Sequential(_conv(1792, 192), _conv(192, 192, (1, 3)), _conv(192, 192, (3, 1)))
    return Residual(1792, scale, _conv(1792, 192), cross, active=active)


def _reduction_a() -> Branches:
    three = nn.Sequential(_conv(256, 192), _conv(192, 192, 3), _conv(192, 256, 3, 2, VALID))
    return Branches(_conv(256, 384, 3, 2, VALID), three, nn.MaxPool2d(3, 2))


def _reduction_b() -> Branches:
    return Branches(
        nn.Sequential(_conv(896, 256), _conv(256, 384, 3, 2, VALID)),
        nn.Sequential(_conv(896, 256), _conv(256, 256, 3, 2, VALID)),
        nn.Sequential(_conv(896, 256), _conv(256, 256, 3), _conv(256, 256, 3, 2, VALID)),
        nn.MaxPool2d(3, 2),
    )


class InceptionResNetV1(nn.Module):
    """(n, 3, 160, 160) float -> (n, dim) raw vectors; other sizes from 75 pixels on work too.

    dropout: probability before the last linear layer. facenet-pytorch's 512-D network has 23 482 624 parameters.
    """

    def __init__(self, dim: int = 128, dropout: float = 0.6):
        super().__init__()
        self.conv2d_1a = _conv(3, 32, 3, 2, VALID)
        self.conv2d_2a = _conv(32, 32, 3, 1, VALID)
        self.conv2d_2b = _conv(32, 64, 3)
        self.maxpool_3a = nn.MaxPool2d(3, 2)
        self.conv2d_3b = _conv(64, 80)
        self.conv2d_4a = _conv(80, 192, 3, 1, VALID)
        self.conv2d_4b = _conv(192, 256, 3, 2, VALID)
        self.repeat_1 = nn.Sequential(*(_block_a() for _ in range(5)))
        self.mixed_6a = _reduction_a()
        self.repeat_2 = nn.Sequential(*(_block_b() for _ in range(10)))
        self.mixed_7a = _reduction_b()
        self.repeat_3 = nn.Sequential(*(_block_c() for _ in range(5)))
        self.block8 = _block_c(1.0, active=False)
        self.dropout = nn.Dropout(dropout)
        self.last_linear = nn.Linear(1792, dim, bias=False)
        self.last_bn = nn.BatchNorm1d(dim, EPS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2d_2b(self.conv2d_2a(self.conv2d_1a(x)))
        x = self.conv2d_4b(self.conv2d_4a(self.conv2d_3b(self.maxpool_3a(x))))
        x = self.mixed_7a(self.repeat_2(self.mixed_6a(self.repeat_1(x))))
        x = self.block8(self.repeat_3(x)).mean((2, 3))
        out: Tensor = self.last_bn(self.last_linear(self.dropout(x)))
        return out
