"""The "improved residual" networks of ArcFace (Deng et al., CVPR 2019): LResNet50E-IR and its other depths.

As in insightface's fresnet symbol: input version 1 (3x3 stem of stride 1), unit version 3, output version E.
"""

from torch import Tensor, nn

from facepipe.models.embedders.layers import ConvBN, FixedScaleBatchNorm1d, initialise, make_conv

# Units of each stage, by depth.
UNITS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}
WIDTHS = (64, 128, 256, 512)


class ImprovedUnit(nn.Module):
    """BN, 3x3, BN, PReLU, 3x3 with the stride, BN, added to the shortcut; no activation after the sum."""

    def __init__(self, i: int, o: int, stride: int, eps: float):
        super().__init__()
        self.bn = nn.BatchNorm2d(i, eps)
        self.conv1 = ConvBN(make_conv(i, o, 3), nn.PReLU(o), eps)
        self.conv2 = ConvBN(make_conv(o, o, 3, stride), eps=eps)
        # insightface gives the first unit of every stage a convolution there, also if the widths are equal.
        self.shortcut = ConvBN(make_conv(i, o, 1, stride), eps=eps) if stride != 1 or i != o else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Compute the unit's map."""
        out: Tensor = self.conv2(self.conv1(self.bn(x))) + self.shortcut(x)
        return out


class IResNet(nn.Module):
    """The network; LResNet50E-IR is depth 50 with 512-D and has 43.6 M parameters."""

    def __init__(
        self,
        dim: int = 128,
        size: tuple[int, int] = (112, 112),
        depth: int = 50,
        dropout: float = 0.4,
        eps: float = 2e-5,
    ):
        """Build the network with random weights.

        Args:
            dim: Length of the vectors.
            size: (width, height) of the chips, multiples of 16.
            depth: 18, 34, 50 or 100.
            dropout: Probability before the fully connected layer.
            eps: Epsilon of the batch norms: 2e-5 in insightface's MXNet networks, 1e-5 in its arcface_torch ones.

        Raises:
            ValueError: There is no such depth.
        """
        super().__init__()
        if depth not in UNITS:
            raise ValueError(f"IResNet has the depths {', '.join(map(str, UNITS))}, not {depth}")
        self.stem = ConvBN(make_conv(3, WIDTHS[0], 3), nn.PReLU(WIDTHS[0]), eps)
        self.stages = nn.Sequential(*_make_stages(UNITS[depth], eps))
        self.bn = nn.BatchNorm2d(WIDTHS[-1], eps)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(WIDTHS[-1] * (size[0] // 16) * (size[1] // 16), dim)
        self.last_bn = FixedScaleBatchNorm1d(dim, eps)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Embed chips (n, 3, h, w) as raw vectors (n, dim)."""
        x = self.dropout(self.bn(self.stages(self.stem(x))).flatten(1))
        out: Tensor = self.last_bn(self.linear(x))
        return out


def _make_stages(units: tuple[int, ...], eps: float) -> list[nn.Sequential]:
    stages = []
    i = WIDTHS[0]
    for o, count in zip(WIDTHS, units, strict=True):
        # The first unit of every stage halves the sides of the map.
        first = ImprovedUnit(i, o, 2, eps)
        rest = [ImprovedUnit(o, o, 1, eps) for _ in range(count - 1)]
        stages.append(nn.Sequential(first, *rest))
        i = o
    return stages
