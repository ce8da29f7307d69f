"""P-Net, R-Net and O-Net of MTCNN (Zhang et al., SPL 2016) as torch modules.

Layers are named as the field writes those of the paper's figure 2: conv, prelu, dense. Heads are named for what they
predict.
"""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F


class _Head(nn.Module):
    """One dense or 1x1 layer each for face probability, box offsets and, in O-Net, landmark offsets."""

    def __init__(self, width: int, *, dense: bool, landmarks: bool = False):
        super().__init__()
        self.face = _make_layer(width, 2, dense=dense)
        self.box = _make_layer(width, 4, dense=dense)
        self.landmarks = _make_layer(width, 10, dense=dense) if landmarks else None

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        probability = self.face(x).softmax(1)[:, 1]
        offsets = self.box(x)
        if self.landmarks is None:
            return probability, offsets
        return probability, offsets, self.landmarks(x)


def _make_layer(i: int, o: int, *, dense: bool) -> nn.Module:
    return nn.Linear(i, o) if dense else nn.Conv2d(i, o, 1)


class PNet(nn.Module):
    """The network that proposes windows of 12 x 12 pixels, 2 pixels apart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 10, 3)
        self.prelu1 = nn.PReLU(10)
        self.conv2 = nn.Conv2d(10, 16, 3)
        self.prelu2 = nn.PReLU(16)
        self.conv3 = nn.Conv2d(16, 32, 3)
        self.prelu3 = nn.PReLU(32)
        self.head = _Head(32, dense=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the predictions of all windows.

        Args:
            x: (n, 3, h, w), (level - 127.5) / 128, RGB.

        Returns:
            Face probabilities (n, r, c) and box offsets (n, 4, r, c).
        """
        x = F.max_pool2d(self.prelu1(self.conv1(x)), 2, 2, ceil_mode=True)
        x = self.prelu2(self.conv2(x))
        heads: tuple[Tensor, ...] = self.head(self.prelu3(self.conv3(x)))
        return heads


class RNet(nn.Module):
    """The network that refines windows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 28, 3)
        self.prelu1 = nn.PReLU(28)
        self.conv2 = nn.Conv2d(28, 48, 3)
        self.prelu2 = nn.PReLU(48)
        self.conv3 = nn.Conv2d(48, 64, 2)
        self.prelu3 = nn.PReLU(64)
        self.dense4 = nn.Linear(576, 128)
        self.prelu4 = nn.PReLU(128)
        self.head = _Head(128, dense=True)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the predictions of windows.

        Args:
            x: (n, 3, 24, 24), scaled as for P-Net.

        Returns:
            Face probabilities (n,) and box offsets (n, 4).
        """
        x = F.max_pool2d(self.prelu1(self.conv1(x)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.prelu2(self.conv2(x)), 3, 2, ceil_mode=True)
        x = self.prelu3(self.conv3(x))
        heads: tuple[Tensor, ...] = self.head(self.prelu4(self.dense4(_flatten_columns_first(x))))
        return heads


class ONet(nn.Module):
    """The network that decides and finds the landmarks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3)
        self.prelu1 = nn.PReLU(32)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.prelu2 = nn.PReLU(64)
        self.conv3 = nn.Conv2d(64, 64, 3)
        self.prelu3 = nn.PReLU(64)
        self.conv4 = nn.Conv2d(64, 128, 2)
        self.prelu4 = nn.PReLU(128)
        self.dense5 = nn.Linear(1152, 256)
        self.prelu5 = nn.PReLU(256)
        self.head = _Head(256, dense=True, landmarks=True)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the predictions of windows.

        Args:
            x: (n, 3, 48, 48), scaled as for P-Net.

        Returns:
            Face probabilities (n,), box offsets (n, 4), and landmarks (n, 10): five x, then five y, as fractions of the
            window.
        """
        x = F.max_pool2d(self.prelu1(self.conv1(x)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.prelu2(self.conv2(x)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.prelu3(self.conv3(x)), 2, 2, ceil_mode=True)
        x = self.prelu4(self.conv4(x))
        heads: tuple[Tensor, ...] = self.head(self.prelu5(self.dense5(_flatten_columns_first(x))))
        return heads


def _flatten_columns_first(x: Tensor) -> Tensor:
    """Flatten column by column, channels last: the weights were trained where arrays lie that way (MATLAB)."""
    return x.permute(0, 3, 2, 1).flatten(1)


class MtcnnNets(nn.Module):
    """The three networks of the cascade.

    Attributes:
        pnet: Proposes windows.
        rnet: Refines them.
        onet: Decides, and finds the landmarks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pnet = PNet()
        self.rnet = RNet()
        self.onet = ONet()


_HEADS = {
    "pnet": {"conv4_1": "head.face", "conv4_2": "head.box"},
    "rnet": {"dense5_1": "head.face", "dense5_2": "head.box"},
    "onet": {"dense6_1": "head.face", "dense6_2": "head.box", "dense6_3": "head.landmarks"},
}


def rename_facenet_pytorch_keys(state: Mapping[str, Tensor], net: str = "") -> dict[str, Tensor]:
    """Rename the tensors of the public PyTorch port (facenet-pytorch) to ours.

    Args:
        state: Tensors by name.
        net: "pnet", "rnet" or "onet" if the state dict is of that network alone; empty if names begin with one of them.
    """
    if net:
        state = {f"{net}.{name}": tensor for name, tensor in state.items()}
    renamed = {}
    for name, tensor in state.items():
        owner, layer, leaf = name.split(".")
        new_layer = _HEADS.get(owner, {}).get(layer, layer)
        renamed[f"{owner}.{new_layer}.{leaf}"] = tensor
    return renamed
