"""ResNet-18 and ResNet-50 (He et al., CVPR 2016) with an embedding layer instead of the classifier.

Names are torchvision's, which timm shares. As in both, the stride of a bottleneck is in its 3x3 convolution; in the
paper it is in the first 1x1.
"""

from torch import Tensor, nn

from facepipe.models.embedders.layers import initialise, make_conv

WIDTHS = (64, 128, 256, 512)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; ReLU after the sum.

    Attributes:
        expansion: Channels out per channel of the 3x3 convolutions.
    """

    expansion = 1

    def __init__(self, i: int, width: int, stride: int):
        super().__init__()
        self.conv1 = make_conv(i, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = make_conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _make_downsample(i, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block's map."""
        y: Tensor = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.downsample(x)).relu()


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last four times as wide; ReLU after the sum.

    Attributes:
        expansion: Channels out per channel of the 3x3 convolution.
    """

    expansion = 4

    def __init__(self, i: int, width: int, stride: int):
        super().__init__()
        o = width * self.expansion
        self.conv1 = make_conv(i, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = make_conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = make_conv(width, o)
        self.bn3 = nn.BatchNorm2d(o)
        self.downsample = _make_downsample(i, o, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block's map."""
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return (self.bn3(self.conv3(y)) + self.downsample(x)).relu()


def _make_downsample(i: int, o: int, stride: int) -> nn.Module:
    if stride == 1 and i == o:
        return nn.Identity()
    return nn.Sequential(make_conv(i, o, 1, stride), nn.BatchNorm2d(o))


# The block of each depth, and the blocks per layer.
LAYOUTS: dict[int, tuple[type[BasicBlock] | type[BottleneckBlock], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    50: (BottleneckBlock, (3, 4, 6, 3)),
}


class ResNet(nn.Module):
    """The network; sides of chips are best multiples of 32.

    The trunks have 11 176 512 and 23 508 032 parameters: torchvision's 11 689 512 and 25 557 032 without their
    classifiers of 1000 classes.
    """

    def __init__(self, dim: int = 128, depth: int = 50):
        """Build the network with random weights.

        Args:
            dim: Length of the vectors.
            depth: 18 or 50.

        Raises:
            ValueError: There is no such depth.
        """
        super().__init__()
        if depth not in LAYOUTS:
            raise ValueError(f"ResNet has the depths {', '.join(map(str, LAYOUTS))}, not {depth}")
        block, blocks_per_layer = LAYOUTS[depth]
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        i = 64
        for n, (width, blocks) in enumerate(zip(WIDTHS, blocks_per_layer, strict=True), 1):
            # The first layer keeps the size of the map, each further one halves it.
            stride = 1 if n == 1 else 2
            self.add_module(f"layer{n}", _make_layer(block, i, width, blocks=blocks, stride=stride))
            i = width * block.expansion
        self.embedding = nn.Linear(i, dim)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Embed chips (n, 3, h, w) as raw vectors (n, dim)."""
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        for n in range(1, len(WIDTHS) + 1):
            x = self.get_submodule(f"layer{n}")(x)
        out: Tensor = self.embedding(x.mean((2, 3)))
        return out


def _make_layer(
    block: type[BasicBlock] | type[BottleneckBlock], i: int, width: int, *, blocks: int, stride: int
) -> nn.Sequential:
    first = block(i, width, stride)
    rest = [block(width * block.expansion, width, 1) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)
