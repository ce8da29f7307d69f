"""The trunks of RetinaFace: MobileNet-0.25 and ResNet-50, each giving its maps at strides 8, 16 and 32.

A trunk consists of units (convolution, batch norm, activation), which `Unit.fold` turns into ones without batch norm.
"""

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Maps = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Shape:
    """Shape of a unit's convolution, which pads by half its kernel.

    Attributes:
        kernel: Side of the kernel.
        stride: Step both ways.
        groups: Groups of channels.
    """

    kernel: int = 3
    stride: int = 1
    groups: int = 1


class Unit(nn.Sequential):
    """Convolution `conv`, batch norm `norm` and activation `act`: (n, i, h, w) -> (n, o, h / stride, w / stride)."""

    def __init__(self, i: int, o: int, shape: Shape, leak: float | None, norms: bool):
        """Build the unit with random weights.

        Args:
            i: Channels in.
            o: Channels out.
            shape: Shape of the convolution.
            leak: Slope of the activation below zero; None leaves the activation out.
            norms: False builds the folded form, whose convolution has a bias instead of a batch norm.
        """
        kernel = shape.kernel
        conv = nn.Conv2d(i, o, kernel, shape.stride, kernel // 2, groups=shape.groups, bias=not norms)
        parts: OrderedDict[str, nn.Module] = OrderedDict(conv=conv)
        if norms:
            parts["norm"] = nn.BatchNorm2d(o)
        if leak is not None:
            parts["act"] = nn.LeakyReLU(leak) if leak else nn.ReLU()
        super().__init__(parts)

    def fold(self) -> None:
        """Fold the batch norm, as it computes in inference, into the convolution."""
        norm = getattr(self, "norm", None)
        if isinstance(norm, nn.BatchNorm2d):
            conv = self._modules["conv"]
            assert isinstance(conv, nn.Conv2d)
            self.conv = fuse_conv_bn_eval(conv.eval(), norm.eval())
            del self.norm


class Separable(nn.Sequential):
    """A depthwise 3x3 and a pointwise convolution (Howard et al., 2017), each followed by a LeakyReLU of 0.1."""

    def __init__(self, i: int, o: int, stride: int, norms: bool):
        depthwise = Unit(i, i, Shape(3, stride, i), 0.1, norms)
        super().__init__(OrderedDict(depthwise=depthwise, pointwise=Unit(i, o, Shape(1), 0.1, norms)))


class MobileNet025(nn.Module):
    """MobileNet (Howard et al., 2017) at a quarter of its width, without its last block of layers.

    Attributes:
        channels: Channels of the three maps.
    """

    channels = (64, 128, 256)

    def __init__(self, norms: bool = True):
        super().__init__()
        self.stage1 = nn.Sequential(
            Unit(3, 8, Shape(3, 2), 0.1, norms),
            Separable(8, 16, 1, norms),
            Separable(16, 32, 2, norms),
            Separable(32, 32, 1, norms),
            Separable(32, 64, 2, norms),
            Separable(64, 64, 1, norms),
        )
        self.stage2 = nn.Sequential(
            Separable(64, 128, 2, norms),
            Separable(128, 128, 1, norms),
            Separable(128, 128, 1, norms),
            Separable(128, 128, 1, norms),
            Separable(128, 128, 1, norms),
            Separable(128, 128, 1, norms),
        )
        self.stage3 = nn.Sequential(Separable(128, 256, 2, norms), Separable(256, 256, 1, norms))

    def forward(self, x: Tensor) -> Maps:
        """Compute the three maps of images (n, 3, h, w)."""
        c1 = self.stage1(x)
        c2 = self.stage2(c1)
        return c1, c2, self.stage3(c2)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut (He et al., CVPR 2016); the 3x3 one has the stride.

    Attributes:
        expansion: Channels out per channel of the 3x3 convolution.
    """

    expansion = 4

    def __init__(self, i: int, width: int, stride: int, norms: bool):
        super().__init__()
        o = width * self.expansion
        self.reduce = Unit(i, width, Shape(1), 0.0, norms)
        self.spatial = Unit(width, width, Shape(3, stride), 0.0, norms)
        self.expand = Unit(width, o, Shape(1), None, norms)
        self.shortcut = Unit(i, o, Shape(1, stride), None, norms) if stride > 1 or i != o else None

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block's map."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        out: Tensor = self.expand(self.spatial(self.reduce(x))) + shortcut
        return out.relu()


class ResNet50(nn.Module):
    """ResNet-50 (He et al., CVPR 2016) without its classifier.

    Attributes:
        channels: Channels of the three maps.
    """

    channels = (512, 1024, 2048)

    def __init__(self, norms: bool = True):
        super().__init__()
        self.stem = Unit(3, 64, Shape(7, 2), 0.0, norms)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = _make_layer(64, 64, blocks=3, stride=1, norms=norms)
        self.layer2 = _make_layer(256, 128, blocks=4, stride=2, norms=norms)
        self.layer3 = _make_layer(512, 256, blocks=6, stride=2, norms=norms)
        self.layer4 = _make_layer(1024, 512, blocks=3, stride=2, norms=norms)

    def forward(self, x: Tensor) -> Maps:
        """Compute the three maps of images (n, 3, h, w)."""
        # The maps start at stride 8, after the second layer.
        c1 = self.layer2(self.layer1(self.pool(self.stem(x))))
        c2 = self.layer3(c1)
        return c1, c2, self.layer4(c2)


def _make_layer(i: int, width: int, *, blocks: int, stride: int, norms: bool) -> nn.Sequential:
    first = Bottleneck(i, width, stride, norms)
    rest = [Bottleneck(width * Bottleneck.expansion, width, 1, norms) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)
