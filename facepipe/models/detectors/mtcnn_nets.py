"""P-Net, R-Net and O-Net of MTCNN (Zhang et al., SPL 2016) as torch modules.

Layers have the names of the paper's figure 2 as the field writes them: conv, prelu, dense; heads are called by what
they say.
"""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F


class _Head(nn.Module):
    """A dense or 1x1 layer each for face probability, box offsets and, of O-Net, landmark offsets."""

    def __init__(self, width: int, dense: bool, landmarks: bool = False):
        super().__init__()
        self.face, self.box = _layer(width, 2, dense), _layer(width, 4, dense)
        self.landmarks = _layer(width, 10, dense) if landmarks else None

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found = (self.face(x).softmax(1)[:, 1], self.box(x))
        return found if self.landmarks is None else (*found, self.landmarks(x))


def _layer(i: int, o: int, dense: bool) -> nn.Module:
    return nn.Linear(i, o) if dense else nn.Conv2d(i, o, 1)


class PNet(nn.Module):
    """(n, 3, h, w), (x - 127.5) / 128, RGB -> face probability (n, r, c), box offsets (n, 4, r, c).

    Every output is a window of 12 x 12 pixels; windows are 2 pixels apart.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 10, 3), nn.PReLU(10)
        self.conv2, self.prelu2 = nn.Conv2d(10, 16, 3), nn.PReLU(16)
        self.conv3, self.prelu3 = nn.Conv2d(16, 32, 3), nn.PReLU(32)
        self.head = _Head(32, dense=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = F.max_pool2d(self.prelu1(self.conv1(x)), 2, 2, ceil_mode=True)
        x = self.prelu2(self.conv2(x))
        heads: tuple[Tensor, ...] = self.head(self.prelu3(self.conv3(x)))
        return heads


class RNet(nn.Module):
    """(n, 3, 24, 24), scaled like P-Net's -> face probability (n,), box offsets (n, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 28, 3), nn.PReLU(28)
        self.conv2, self.prelu2 = nn.Conv2d(28, 48, 3), nn.PReLU(48)
        self.conv3, self.prelu3 = nn.Conv2d(48, 64, 2), nn.PReLU(64)
        self.dense4, self.prelu4 = nn.Linear(576, 128), nn.PReLU(128)
        self.head = _Head(128, dense=True)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = F.max_pool2d(self.prelu1(self.conv1(x)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.prelu2(self.conv2(x)), 3, 2, ceil_mode=True)
        x = self.prelu3(self.conv3(x))
        heads: tuple[Tensor, ...] = self.head(self.prelu4(self.dense4(_columns_first(x))))
        return heads


class ONet(nn.Module):
    """(n, 3, 48, 48), scaled like P-Net's -> face probability (n,), box offsets (n, 4), landmarks (n, 10).

    Landmarks are five x, then five y, as fractions of the window.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 32, 3), nn.PReLU(32)
        self.conv2, self.prelu2 = nn.Conv2d(32, 64, 3), nn.PReLU(64)
        self.conv3, self.prelu3 = nn.Conv2d(64, 64, 3), nn.PReLU(64)
        self.conv4, self.prelu4 = nn.Conv2d(64, 128, 2), nn.PReLU(128)
        self.dense5, self.prelu5 = nn.Linear(1152, 256), nn.PReLU(256)
        self.head = _Head(256, dense=True, landmarks=True)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = F.max_pool2d(self.prelu1(self.conv1(x)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.prelu2(self.conv2(x)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.prelu3(self.conv3(x)), 2, 2, ceil_mode=True)
        x = self.prelu4(self.conv4(x))
        heads: tuple[Tensor, ...] = self.head(self.prelu5(self.dense5(_columns_first(x))))
        return heads


def _columns_first(x: Tensor) -> Tensor:
    """Flattened column by column, channels last: the weights were trained where arrays lie that way (MATLAB)."""
    return x.permute(0, 3, 2, 1).flatten(1)


class MtcnnNets(nn.Module):
    """The three networks of the cascade: `pnet`, `rnet`, `onet`."""

    def __init__(self) -> None:
        super().__init__()
        self.pnet, self.rnet, self.onet = PNet(), RNet(), ONet()


_HEADS = {
    "pnet": {"conv4_1": "head.face", "conv4_2": "head.box"},
    "rnet": {"dense5_1": "head.face", "dense5_2": "head.box"},
    "onet": {"dense6_1": "head.face", "dense6_2": "head.box", "dense6_3": "head.landmarks"},
}


def rename_facenet_pytorch_keys(state: Mapping[str, Tensor], net: str = "") -> dict[str, Tensor]:
    """Names of the public PyTorch port (facenet-pytorch) to ours.

    net: "pnet", "rnet" or "onet" for the state dict of that network alone, nothing for names that begin with it
    """
    if net:
        state = {f"{net}.{name}": tensor for name, tensor in state.items()}
    renamed = {}
    for name, tensor in state.items():
        owner, layer, leaf = name.split(".")
        renamed[f"{owner}.{_HEADS.get(owner, {}).get(layer, layer)}.{leaf}"] = tensor
    return renamed
