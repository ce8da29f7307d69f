"""Where models run."""

import os
import re

from facepipe.errors import ModelError


def count_gpus() -> int:
    """CUDA devices that torch sees; torch is loaded only where there is an NVIDIA driver."""
    if not os.path.exists("/dev/nvidiactl"):
        return 0
    import torch

    return torch.cuda.device_count()


def resolve_device(device: str) -> str:
    """`auto` as cuda or cpu, other names as they are: cpu, cuda, cuda:N.

    Raises ModelError for another name, and for a CUDA device that is asked for and absent.
    """
    if device == "auto":
        return "cuda" if count_gpus() else "cpu"
    named = re.fullmatch(r"cpu|cuda(?::(0|[1-9][0-9]*))?", device)
    if named is None:
        raise ModelError(f"no device is called {device!r}; there are auto, cpu, cuda and cuda:N (cuda:0 is the first)")
    if device == "cpu":
        return device
    there = count_gpus()
    if not there:
        raise ModelError(f"device {device} was asked for, and there is no CUDA device; `facepipe doctor` says why")
    if int(named[1] or 0) >= there:
        raise ModelError(f"device {device} was asked for, and the last one here is cuda:{there - 1}")
    return device
