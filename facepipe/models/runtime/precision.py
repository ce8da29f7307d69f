"""The precision of a network: of all its layers, or of all but the last; and of products in single precision."""

from typing import Literal

import torch
from torch import Tensor, nn

Precision = Literal["float32", "tf32", "bfloat16", "float16"]

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def set_float32_products(precision: str) -> None:
    """Set how GPUs multiply numbers of single precision, in convolutions and products of matrices of this process.

    By default cuDNN rounds the factors of convolutions to 10 bits (TF32), as float16 has. That moves the vector of a
    face by up to 0.055, so that float32 means IEEE here, and TF32 has a name of its own.

    Args:
        precision: tf32, or any other for IEEE.
    """
    # The newer `fp32_precision` of one operator alone makes torch refuse to read these, as its exporter does.
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = False


def cast_network(net: nn.Module, precision: str, float32_modules: tuple[str, ...] = ()) -> nn.Module:
    """Cast a network to a precision, in place.

    Sums inside a layer are float32 on GPUs anyway. What half precision rounds is what passes between layers. The last
    layers cost next to nothing, and rounding their output would make equal scores of different ones.

    Args:
        net: The network.
        precision: A key of `DTYPES`.
        float32_modules: Names of submodules that take and give float32.
    """
    dtype = DTYPES[precision]
    net.to(dtype)
    # Bring the exceptions back to float32; their innermost layers convert what they are given.
    if dtype is not torch.float32:
        for name in float32_modules:
            net.get_submodule(name).float()
            for module in net.get_submodule(name).modules():
                if not list(module.children()):
                    module.register_forward_pre_hook(_cast_inputs)
    return net


def _cast_inputs(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(arg.float() for arg in args)
