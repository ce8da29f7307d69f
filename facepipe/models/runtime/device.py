"""Devices that models run on, their faults, and the precision of networks on them."""

import importlib.util
import os
import re
import warnings
from typing import Literal

from facepipe.errors import ModelError
from facepipe.extras import describe_missing, require_module
from facepipe.models.runtime.batches import is_out_of_memory

NetworkPrecision = Literal["auto", "float32", "tf32", "bfloat16", "float16"]

# What torch, ONNX Runtime and CUDA's libraries write if a device fails; in lower case.
_DEVICE_FAULTS = (
    "cuda error",
    "cuda failure",
    "cudaerror",
    "cuda driver",
    "cudnn error",
    "cudnn failure",
    "cudnn_status",
    "cublas error",
    "cublas failure",
    "cublas_status",
    "device-side assert",
    "launch failure",
    "illegal memory access",
    "no kernel image",
    "uncorrectable ecc",
)


def count_gpus() -> int:
    """Count the CUDA devices that torch sees; torch is only imported if there is an NVIDIA driver.

    Without torch no model runs on a GPU, so that there is none to count.
    """
    if not os.path.exists("/dev/nvidiactl"):
        return 0
    if importlib.util.find_spec("torch") is None:
        warnings.warn(describe_missing("torch", "using the GPUs of this machine", extra="gpu"), stacklevel=2)
        return 0
    import torch

    return torch.cuda.device_count()


def resolve_device(device: str) -> str:
    """Resolve `auto` to cuda or cpu, and check any other name.

    Args:
        device: auto, cpu, cuda or cuda:N.

    Raises:
        ModelError: The name is unknown, or that CUDA device is not available.
        MissingPackageError: It is a CUDA device, and torch is not installed.
    """
    if device == "auto":
        return "cuda" if count_gpus() else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::(0|[1-9][0-9]*))?", device)
    if match is None:
        raise ModelError(f"no device is called {device!r}; there are auto, cpu, cuda and cuda:N (cuda:0 is the first)")
    if device == "cpu":
        return device
    require_module("torch", f"the device {device}", extra="gpu")
    gpus = count_gpus()
    if not gpus:
        raise ModelError(f"device {device} requested, but no CUDA device is available; `facepipe doctor` says why")
    if int(match[1] or 0) >= gpus:
        raise ModelError(f"device {device} requested, but the last one here is cuda:{gpus - 1}")
    return device


def resolve_precision(precision: NetworkPrecision) -> str:
    """Resolve `auto` to float32."""
    return "float32" if precision == "auto" else precision


def find_device_fault(error: BaseException) -> BaseException | None:
    """Find the fault of a device in an exception or its causes.

    Running out of memory is no fault: fewer images at a time may fit.

    Returns:
        The exception that the device's library raised; None if it is another error, such as one of Python.
    """
    cause: BaseException | None = error
    while cause is not None:
        if is_out_of_memory(cause):
            return None
        message = str(cause).lower()
        is_from_torch = type(cause).__name__ == "AcceleratorError"
        if is_from_torch or any(words in message for words in _DEVICE_FAULTS):
            return cause
        cause = cause.__cause__
    return None
