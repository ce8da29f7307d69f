"""What this machine has for facepipe: found, missing, and what to do about it."""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable
from typing import NamedTuple

from facepipe.errors import FacepipeError
from facepipe.models.zoo.registry import CARDS


class Finding(NamedTuple):
    """One thing looked at; `state` is ok, missing (optional, absent) or broken (facepipe cannot run)."""

    what: str
    state: str
    detail: str


def examine() -> list[Finding]:
    """Look at everything, in the order a newcomer would ask."""
    checks: list[Callable[[], Finding]] = [_python, _cpu, _gpu, _engine, _ray, _faiss, _object_store, _pictures]
    return [check() for check in checks] + [_weights(name) for name, card in CARDS.items() if card.sha256]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    return Finding(
        "python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()} ({sys.prefix})"
    )


def _cpu() -> Finding:
    cpus = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Finding("cpu", "ok", f"{cpus} usable cores, {memory:.1f} GiB of memory")


def _gpu() -> Finding:
    if not os.path.exists("/dev/nvidiactl"):
        return Finding("gpu", "missing", "no NVIDIA driver: the models run on the CPU")
    import torch

    if not torch.cuda.is_available():
        return Finding(
            "gpu", "broken", f"there is a driver, but torch {torch.__version__} sees no device: install a CUDA build"
        )
    names = ", ".join(torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count()))
    return Finding("gpu", "ok", f"{names}, torch {torch.__version__}")


def _engine() -> Finding:
    try:
        import cv2
        import onnxruntime
    except ImportError as error:
        return Finding("engines", "broken", f"{error}: reinstall facepipe")
    return Finding("engines", "ok", f"onnxruntime {onnxruntime.__version__} on CPU, OpenCV {cv2.__version__}")


def _ray() -> Finding:
    version = _version("ray")
    address = os.environ.get("RAY_ADDRESS", "none named (RAY_ADDRESS): Ray starts on this machine")
    return Finding(
        "ray",
        "ok" if version else "broken",
        f"ray {version}, cluster: {address}" if version else "pip install 'ray[data]'",
    )


def _faiss() -> Finding:
    found = [f"{name} {version}" for name in ("faiss-cpu", "faiss-gpu") if (version := _version(name))]
    if not found:
        return Finding(
            "faiss", "missing", "needed for index and search: pip install 'facepipe[cpu]' or 'facepipe[gpu]'"
        )
    return Finding("faiss", "ok", ", ".join(found))


def _object_store() -> Finding:
    version = _version("obstore")
    if version is None:
        return Finding("object store", "missing", "s3:// sources need it: pip install 'facepipe[s3]'")
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "the provider's default")
    return Finding("object store", "ok", f"obstore {version}, endpoint: {endpoint.rpartition('@')[2]}")


def _pictures() -> Finding:
    version = _version("matplotlib")
    if version is None:
        return Finding("pictures", "missing", "ROC pictures need it: pip install 'facepipe[report]'")
    return Finding("pictures", "ok", f"matplotlib {version}")


_DEFAULTS = ("retinaface-mnet025", "dlib-resnet")


def _weights(name: str) -> Finding:
    card = CARDS[name]
    try:
        if card.role == "detector":
            card.load("cpu", 1, (0.5, 0.4))
        else:
            card.load("cpu", 1)
    except FacepipeError as error:
        return Finding(name, "broken" if name in _DEFAULTS else "missing", str(error))
    return Finding(name, "ok", f"{card.weights}, {card.licence}, SHA-256 {card.sha256[:16]}… checked")
