"""Layers that the embedding networks share."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval


class ConvBN(nn.Module):
    """Convolution without bias, batch norm, and an activation or none."""

    def __init__(self, conv: nn.Conv2d, act: nn.Module | None = None, eps: float = 1e-5):
        super().__init__()
        self.conv = conv
        self.bn: nn.Module = nn.BatchNorm2d(conv.out_channels, eps)
        self.act = act if act is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the three layers."""
        out: Tensor = self.act(self.bn(self.conv(x)))
        return out


def make_conv(i: int, o: int, kernel: int = 1, stride: int = 1) -> nn.Conv2d:
    """Make a dense convolution with "same" padding and no bias."""
    return nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=False)


def make_depthwise_conv(width: int, stride: int = 1) -> nn.Conv2d:
    """Make a 3x3 convolution of every channel by itself, without bias."""
    return nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False)


class FixedScaleBatchNorm1d(nn.BatchNorm1d):
    """Batch norm whose scale stays 1 (`fix_gamma` in MXNet): a buffer, so that no optimiser can change it."""

    def __init__(self, width: int, eps: float):
        super().__init__(width, eps)
        del self.weight
        self.register_buffer("weight", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise vectors (n, width)."""
        # Count batches as torch's own batch norm does.
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum or 0.1,
            self.eps,
        )


def initialise(net: nn.Module) -> None:
    """Initialise convolutions with normal weights of variance 2 / fan-out (He et al., ICCV 2015).

    All other layers keep torch's initial values.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def fold_batch_norms(net: nn.Module) -> nn.Module:
    """Copy a network in inference mode, with the batch norms of its `ConvBN` layers folded into the convolutions."""
    folded = copy.deepcopy(net).eval()
    for module in folded.modules():
        if isinstance(module, ConvBN) and isinstance(module.bn, nn.BatchNorm2d):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    return folded


def count_parameters(net: nn.Module) -> int:
    """Count the trainable parameters, without running statistics and fixed scales."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)
