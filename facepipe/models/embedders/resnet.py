"""ResNet-18 and ResNet-50 (He et al., CVPR 2016) with an embedding layer instead of the classifier.

Names are torchvision's, which timm shares; as in both, a bottleneck's stride is in its 3x3 convolution (in the paper in
the first 1x1).
"""

from torch import Tensor, nn

from facepipe.models.embedders.layers import initialise, make_conv

WIDTHS = (64, 128, 256, 512)


class Basic(nn.Module):
    """Two 3x3 convolutions; ReLU after the sum."""

    expansion = 1

    def __init__(self, i: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = make_conv(i, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = make_conv(width, width, 3), nn.BatchNorm2d(width)
        self.downsample = _downsample(i, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.downsample(x)).relu()


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last four times as wide; ReLU after the sum."""

    expansion = 4

    def __init__(self, i: int, width: int, stride: int):
        super().__init__()
        o = width * self.expansion
        self.conv1, self.bn1 = make_conv(i, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = make_conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = make_conv(width, o), nn.BatchNorm2d(o)
        self.downsample = _downsample(i, o, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return (self.bn3(self.conv3(y)) + self.downsample(x)).relu()


def _downsample(i: int, o: int, stride: int) -> nn.Module:
    if stride == 1 and i == o:
        return nn.Identity()
    return nn.Sequential(make_conv(i, o, 1, stride), nn.BatchNorm2d(o))


LAYOUTS: dict[int, tuple[type[Basic] | type[Bottleneck], tuple[int, ...]]] = {
    18: (Basic, (2, 2, 2, 2)),
    50: (Bottleneck, (3, 4, 6, 3)),
}


class ResNet(nn.Module):
    """(n, 3, h, w) float -> (n, dim) raw vectors; sides are best multiples of 32.

    depth: 18 or 50. The trunks have 11 176 512 and 23 508 032 parameters: torchvision's 11 689 512 and 25 557 032
    without their classifiers of 1000 classes.
    """

    def __init__(self, dim: int = 128, depth: int = 50):
        super().__init__()
        if depth not in LAYOUTS:
            raise ValueError(f"ResNet has the depths {', '.join(map(str, LAYOUTS))}, not {depth}")
        block, units = LAYOUTS[depth]
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        i = 64
        for n, (width, count) in enumerate(zip(WIDTHS, units, strict=True), 1):
            self.add_module(f"layer{n}", _layer(block, i, width, count, 1 if n == 1 else 2))
            i = width * block.expansion
        self.embedding = nn.Linear(i, dim)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        for n in range(1, len(WIDTHS) + 1):
            x = self.get_submodule(f"layer{n}")(x)
        out: Tensor = self.embedding(x.mean((2, 3)))
        return out


def _layer(block: type[Basic] | type[Bottleneck], i: int, width: int, count: int, stride: int) -> nn.Sequential:
    rest = (block(width * block.expansion, width, 1) for _ in range(count - 1))
    return nn.Sequential(block(i, width, stride), *rest)
