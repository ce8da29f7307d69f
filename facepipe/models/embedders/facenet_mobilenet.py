"""FaceNet (Schroff et al., CVPR 2015) on MobileNetV1 (Howard et al., arXiv 1704.04861), for 160x160 chips.

The recipe is that of bubbliiiing's facenet-pytorch: full width, average pooling, dropout, a linear layer, batch norm.
"""

from torch import Tensor, nn

from facepipe.models.embedders.layers import ConvBN, initialise, make_conv, make_depthwise_conv

# (channels, stride) of each depthwise separable convolution.
BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (1024, 2),
    (1024, 1),
)


class SeparableConv(nn.Module):
    """3x3 by channel, then 1x1 across channels, each with batch norm and ReLU6."""

    def __init__(self, i: int, o: int, stride: int):
        super().__init__()
        self.depthwise = ConvBN(make_depthwise_conv(i, stride), nn.ReLU6())
        self.pointwise = ConvBN(make_conv(i, o), nn.ReLU6())

    def forward(self, x: Tensor) -> Tensor:
        """Apply both convolutions."""
        out: Tensor = self.pointwise(self.depthwise(x))
        return out


class FaceNetMobileNet(nn.Module):
    """The network, for chips of any size.

    The trunk has 3 206 976 parameters: MobileNet's 4.2 M of the paper (4 231 976) without its classifier of 1000
    classes.
    """

    def __init__(self, dim: int = 128, dropout: float = 0.5):
        """Build the network with random weights.

        Args:
            dim: Length of the vectors.
            dropout: Probability before the linear layer.
        """
        super().__init__()
        self.stem = ConvBN(make_conv(3, 32, 3, 2), nn.ReLU6())
        blocks = []
        i = 32
        for o, stride in BLOCKS:
            blocks.append(SeparableConv(i, o, stride))
            i = o
        self.blocks = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(1024, dim, bias=False)
        self.last_bn = nn.BatchNorm1d(dim, 1e-3)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Embed chips (n, 3, h, w) as raw vectors (n, dim)."""
        x = self.dropout(self.blocks(self.stem(x)).mean((2, 3)))
        out: Tensor = self.last_bn(self.linear(x))
        return out
