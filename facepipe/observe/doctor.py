"""Checks of this machine for `facepipe doctor`: what works, what is missing, and what to install."""

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple

from facepipe.errors import FacepipeError
from facepipe.extras import format_install
from facepipe.models.protocols import DetectionLimits
from facepipe.models.zoo.registry import CARDS
from facepipe.storage import is_remote
from facepipe.storage.conditional import require_usable_place
from facepipe.storage.uploads import UploadsUnknownError, list_uploads

_DEFAULT_MODELS = ("retinaface-mnet025", "dlib-resnet")


class Finding(NamedTuple):
    """The outcome of one check.

    Attributes:
        what: what was checked.
        state: ok, missing (optional and absent) or broken (facepipe cannot run).
        detail: versions, or what to install.
    """

    what: str
    state: str
    detail: str


def examine_machine(place: str = "") -> list[Finding]:
    """Run all checks, in the order in which a newcomer would ask.

    Args:
        place: path or URL of a gallery, or of where one will be, which is checked too if it is given.
    """
    checks: list[Callable[[], Finding]] = [
        _check_python,
        _check_cpu,
        _check_gpu,
        _check_engines,
        _check_torch,
        _check_ray,
        _check_faiss,
        _check_object_store,
        _check_temporary_folder,
        _check_pictures,
    ]
    findings = [check() for check in checks]
    if place:
        findings.append(_check_place(place))
        if is_remote(place):
            findings.append(_check_uploads(place))
    findings.extend(_check_weights(name) for name, card in CARDS.items() if card.sha256)
    return findings


def _find_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_python() -> Finding:
    system = f"{platform.python_version()} on {platform.system()} {platform.machine()} ({sys.prefix})"
    return Finding("python", "ok", system)


def _check_cpu() -> Finding:
    cpus = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Finding("cpu", "ok", f"{cpus} usable cores, {memory:.1f} GiB of memory")


def _check_gpu() -> Finding:
    if not os.path.exists("/dev/nvidiactl"):
        return Finding("gpu", "missing", "no NVIDIA driver: the models run on the CPU")
    if not _find_version("torch"):
        detail = f"the driver is installed, and torch is not: {format_install('torch', extra='gpu')}"
        return Finding("gpu", "missing", detail)
    import torch

    if not torch.cuda.is_available():
        detail = f"the driver is installed, but torch {torch.__version__} sees no device: install a CUDA build"
        return Finding("gpu", "broken", detail)
    names = ", ".join(torch.cuda.get_device_name(gpu) for gpu in range(torch.cuda.device_count()))
    return Finding("gpu", "ok", f"{names}, torch {torch.__version__}")


def _check_engines() -> Finding:
    try:
        import cv2
        import onnxruntime
    except ImportError as error:
        return Finding("engines", "broken", f"{error}: reinstall facepipe")
    return Finding("engines", "ok", f"onnxruntime {onnxruntime.__version__} on CPU, OpenCV {cv2.__version__}")


def _check_ray() -> Finding:
    version = _find_version("ray")
    if version is None:
        return Finding("ray", "broken", "not installed: reinstall facepipe")
    address = os.environ.get("RAY_ADDRESS", "none (RAY_ADDRESS is not set): Ray starts on this machine")
    return Finding("ray", "ok", f"ray {version}, cluster: {address}")


def _check_faiss() -> Finding:
    versions = {name: _find_version(name) for name in ("faiss-cpu", "faiss-gpu")}
    installed = [f"{name} {version}" for name, version in versions.items() if version]
    if not installed:
        return Finding("faiss", "broken", f"needed for index and search: {format_install('faiss')}")
    return Finding("faiss", "ok", ", ".join(installed))


def _check_torch() -> Finding:
    version = _find_version("torch")
    if version is None:
        detail = f"needed for training, GPUs and models from checkpoints: {format_install('torch')}"
        return Finding("torch", "missing", detail)
    return Finding("torch", "ok", f"torch {version}")


def _check_object_store() -> Finding:
    version = _find_version("obstore")
    if version is None:
        return Finding("object store", "missing", f"needed for s3:// sources: {format_install('obstore')}")
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "the provider's default")
    # Leave out credentials that the address may hold.
    return Finding("object store", "ok", f"obstore {version}, endpoint: {endpoint.rpartition('@')[2]}")


def _check_temporary_folder() -> Finding:
    """Look for room where tables of ids are kept: 32 bytes per image, in steps of two."""
    try:
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding("temporary files", "broken", f"{error}: set TMPDIR to a folder with room")
    return Finding("temporary files", "ok", f"{free / 2**30:.1f} GiB free in {folder} (TMPDIR)")


def _check_place(place: str) -> Finding:
    """Check that a gallery's place keeps two runs from overwriting each other's work."""
    what = "object store" if is_remote(place) else "disk"
    try:
        require_usable_place(place)
    except FacepipeError as error:
        return Finding(f"{what} of {place}", "broken", str(error))
    how = "compares tags before it writes" if is_remote(place) else "has locks and hard links"
    return Finding(f"{what} of {place}", "ok", how)


def _check_uploads(place: str) -> Finding:
    """Look for parts of objects whose upload never ended, which no listing shows."""
    what = f"incomplete uploads to {place}"
    try:
        uploads = [upload for upload in list_uploads(place) if upload.is_abandoned]
    except UploadsUnknownError as error:
        return Finding(what, "missing", f"{error}. A lifecycle rule of the bucket deletes them (docs/operations.md)")
    except FacepipeError as error:
        return Finding(what, "broken", str(error))
    if uploads:
        detail = f"{len(uploads)}, such as {uploads[0].url}: `facepipe compact`, `index` and reports delete them"
        return Finding(what, "broken", detail)
    return Finding(what, "ok", "none that is older than a day")


def _check_pictures() -> Finding:
    version = _find_version("matplotlib")
    if version is None:
        return Finding("pictures", "missing", f"needed for ROC pictures: {format_install('matplotlib')}")
    return Finding("pictures", "ok", f"matplotlib {version}")


def _check_weights(name: str) -> Finding:
    """Load a registered model, which checks its weights."""
    card = CARDS[name]
    try:
        if card.role == "detector":
            card.load("cpu", 1, DetectionLimits(min_score=0.5, max_iou=0.4))
        else:
            card.load("cpu", 1)
    except FacepipeError as error:
        return Finding(name, "broken" if name in _DEFAULT_MODELS else "missing", str(error))
    return Finding(name, "ok", f"{card.weights}, {card.licence}, SHA-256 {card.sha256[:16]}… checked")
