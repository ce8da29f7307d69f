"""MobileFaceNet (Chen, Liu, Gao, Han, CCBR 2018, arXiv 1804.07573), table 1, as a torch module.

The global depthwise convolution is as large as the map before it: 7x7 for 112x112 chips, 7x6 for 112x96 (h x w) ones.
"""

from torch import Tensor, nn

from facepipe.models.embedders.layers import ConvBN, initialise, make_conv, make_depthwise_conv

# (expansion, channels, units, stride) of each row of bottlenecks.
BOTTLENECKS = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))


class InvertedResidual(nn.Module):
    """Inverted residual of MobileNetV2 (Sandler et al., CVPR 2018) with PReLU: widen, filter by channel, narrow."""

    def __init__(self, i: int, o: int, expansion: int, stride: int):
        super().__init__()
        wide = i * expansion
        self.expand = ConvBN(make_conv(i, wide), nn.PReLU(wide))
        self.depthwise = ConvBN(make_depthwise_conv(wide, stride), nn.PReLU(wide))
        self.project = ConvBN(make_conv(wide, o))
        self.has_shortcut = stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block's map."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.has_shortcut else y


class MobileFaceNet(nn.Module):
    """The network.

    At 112x112 and 128-D it has 1 003 136 parameters and 221 M multiply-adds. The paper says 0.99 M parameters; without
    the slopes of the PReLUs there are 995 584.
    """

    def __init__(self, dim: int = 128, size: tuple[int, int] = (112, 112)):
        """Build the network with random weights.

        Args:
            dim: Length of the vectors.
            size: (width, height) of the chips, multiples of 16.
        """
        super().__init__()
        width, height = size
        self.stem = ConvBN(make_conv(3, 64, 3, 2), nn.PReLU(64))
        self.stem_depthwise = ConvBN(make_depthwise_conv(64), nn.PReLU(64))
        self.blocks = nn.Sequential(*_make_bottlenecks())
        self.expand = ConvBN(make_conv(128, 512), nn.PReLU(512))
        self.global_depthwise = ConvBN(nn.Conv2d(512, 512, (height // 16, width // 16), groups=512, bias=False))
        self.linear = ConvBN(make_conv(512, dim))
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Embed chips (n, 3, h, w) as raw vectors (n, dim)."""
        x = self.expand(self.blocks(self.stem_depthwise(self.stem(x))))
        out: Tensor = self.linear(self.global_depthwise(x)).flatten(1)
        return out


def _make_bottlenecks() -> list[InvertedResidual]:
    blocks = []
    i = 64
    for expansion, o, units, stride in BOTTLENECKS:
        # Only the first unit of a row has the stride.
        for unit in range(units):
            blocks.append(InvertedResidual(i, o, expansion, stride if unit == 0 else 1))
            i = o
    return blocks
