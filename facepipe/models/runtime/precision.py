"""The precision that a network computes in: all of it, or all but the layers that its numbers come out of."""

from typing import Literal

import torch
from torch import Tensor, nn

Precision = Literal["float32", "bfloat16", "float16"]

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def cast_network(net: nn.Module, precision: str, exact: tuple[str, ...] = ()) -> nn.Module:
    """The network in a precision, in place; submodules named in `exact` take and give float32.

    Sums inside a layer are float32 on GPUs anyway: what half precision rounds is what passes between layers. The last
    layers cost next to nothing, and rounding what they give would make equal scores of different ones.
    """
    dtype = DTYPES[precision]
    net.to(dtype)
    if dtype is not torch.float32:
        for name in exact:
            net.get_submodule(name).float()
            for module in net.get_submodule(name).modules():
                if not list(module.children()):
                    module.register_forward_pre_hook(_in_float32)
    return net


def _in_float32(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(arg.float() for arg in args)
