"""PReLU as ONNX Runtime computes it fast on CPUs: its own PRelu takes most of the time of networks with many."""

from copy import deepcopy

from torch import Tensor, nn
from torch.nn import functional as F


class ConvolvedPReLU(nn.Module):
    """a x + (1 - a) relu(x), each product a 1x1 depthwise convolution, which ONNX Runtime fuses with the sum."""

    slopes: Tensor
    rest: Tensor

    def __init__(self, slopes: Tensor):
        """Convert the slopes of a PReLU."""
        super().__init__()
        slopes = slopes.detach().view(-1, 1, 1, 1)
        self.register_buffer("slopes", slopes.clone())
        self.register_buffer("rest", 1 - slopes)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the PReLU of a map (n, c, h, w)."""
        width = len(self.slopes)
        return F.conv2d(x, self.slopes, groups=width) + F.conv2d(x.relu(), self.rest, groups=width)


def replace_prelus(net: nn.Module) -> nn.Module:
    """Copy a network for export, with its channelwise PReLUs as convolutions.

    It computes the same function, up to the rounding of float32.
    """
    copy = deepcopy(net)
    for module in list(copy.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.PReLU) and child.num_parameters > 1:
                setattr(module, name, ConvolvedPReLU(child.weight))
    return copy
