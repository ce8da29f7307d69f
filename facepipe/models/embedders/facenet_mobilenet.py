"""FaceNet (Schroff et al., CVPR 2015) on MobileNetV1 (Howard et al., arXiv 1704.04861), for 160x160 chips.

The recipe is that of bubbliiiing's facenet-pytorch: full width, average pooling, dropout, a linear layer, batch norm.
"""

from torch import Tensor, nn

from facepipe.models.embedders.layers import ConvBN, initialise, make_conv, make_depthwise_conv

# (channels, stride) of each depthwise separable convolution
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))


class Separable(nn.Module):
    """3x3 by channel, then 1x1 across channels, each with batch norm and ReLU6."""

    def __init__(self, i: int, o: int, stride: int):
        super().__init__()
        self.depthwise = ConvBN(make_depthwise_conv(i, stride), nn.ReLU6())
        self.pointwise = ConvBN(make_conv(i, o), nn.ReLU6())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.pointwise(self.depthwise(x))
        return out


class FaceNetMobileNet(nn.Module):
    """(n, 3, 160, 160) float -> (n, dim) raw vectors; any size works.

    dropout: probability before the linear layer. The trunk has 3 206 976 parameters: MobileNet's 4.2 M of the paper
    (4 231 976) without its classifier of 1000 classes.
    """

    def __init__(self, dim: int = 128, dropout: float = 0.5):
        super().__init__()
        widths = [32, *(o for o, _ in BLOCKS)]
        self.stem = ConvBN(make_conv(3, 32, 3, 2), nn.ReLU6())
        self.blocks = nn.Sequential(*(Separable(i, o, s) for i, (o, s) in zip(widths, BLOCKS, strict=False)))
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(1024, dim, bias=False)
        self.last_bn = nn.BatchNorm1d(dim, 1e-3)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.blocks(self.stem(x)).mean((2, 3)))
        out: Tensor = self.last_bn(self.linear(x))
        return out
