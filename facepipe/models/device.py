"""Where models run."""

import os

from facepipe.errors import ModelError


def gpus() -> int:
    """CUDA devices that torch sees; torch is loaded only where there is an NVIDIA driver."""
    if not os.path.exists("/dev/nvidiactl"):
        return 0
    import torch

    return torch.cuda.device_count()


def resolve(device: str) -> str:
    """`auto` as cuda or cpu; a CUDA device that is asked for and absent is an error."""
    if device == "auto":
        return "cuda" if gpus() else "cpu"
    if device.startswith("cuda") and not gpus():
        raise ModelError(f"device {device} was asked for, and there is no CUDA device; `facepipe doctor` says why")
    return device
