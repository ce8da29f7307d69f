"""Optional packages: what is missing, and the command that installs it the way facepipe was installed."""

import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import sys
from contextlib import suppress
from typing import Any
from urllib.parse import unquote, urlsplit

from facepipe.errors import MissingPackageError

EXTRAS = {
    "torch": ("train", "gpu"),
    "faiss": ("cpu", "gpu"),
    "obstore": ("s3",),
    "matplotlib": ("report",),
    "onnxscript": ("export",),
    "dlib": ("dlib",),
    "mtcnn": ("mtcnn",),
    "pynvml": ("gpu",),
    "openlineage": ("openlineage",),
    "lance": ("lance",),
    "pytorch_metric_learning": ("pml",),
}
"""The extras that bring a module, the likeliest first."""

# Name of the package of a module that is called otherwise. Only these are installed if facepipe itself is not.
_PACKAGES = {
    "faiss": "faiss-cpu",
    "dlib": "dlib-bin",
    "pynvml": "nvidia-ml-py",
    "openlineage": "openlineage-python",
    "lance": "pylance",
    "pytorch_metric_learning": "pytorch-metric-learning",
}


def require_module(module: str, what: str, *, extra: str = "") -> None:
    """Require that an optional module is installed.

    Args:
        module: its name, such as "torch".
        what: what needs it, as a message begins, such as "training".
        extra: the extra to suggest; by default the first that brings the module.

    Raises:
        MissingPackageError: it is not installed. The message says what to type.
    """
    if importlib.util.find_spec(module) is None:
        raise MissingPackageError(describe_missing(module, what, extra=extra))


def describe_missing(module: str, what: str, *, extra: str = "") -> str:
    """Say that an optional module is not installed, and what to type; see `require_module`."""
    return f"{what} needs {module}, which is not installed: {format_install(module, extra=extra)}"


def format_install(module: str, *, extra: str = "") -> str:
    """Format the command that installs an optional module into this environment.

    It is the one that fits how facepipe was installed: from a folder, from a repository or by its name; with pip or uv;
    into an environment of its own by pipx or not at all. A folder or an address is named by PEP 610's direct_url.json.

    Args:
        module: its name.
        extra: the extra that brings it; by default the first of those in `EXTRAS`.
    """
    distribution = _find_distribution()
    if distribution is None:
        return f"{_format_installer('pip')} {_PACKAGES.get(module, module)}"
    if os.path.exists(os.path.join(sys.prefix, "pipx_metadata.json")):
        return f"pipx inject facepipe {_PACKAGES.get(module, module)}"
    requirement = _format_requirement(distribution, extra or EXTRAS[module][0])
    return f"{_format_installer((distribution.read_text('INSTALLER') or 'pip').strip())} {requirement}"


def _find_distribution() -> "importlib.metadata.Distribution | None":
    """Find the record of the installation. A folder of sources may hold one beside it, which knows no origin."""
    found = list(importlib.metadata.distributions(name="facepipe"))
    return next((each for each in found if each.read_text("direct_url.json")), found[0] if found else None)


def _format_installer(name: str) -> str:
    if name == "uv":
        return f"uv pip install --python {shlex.quote(sys.executable)}"
    found = shutil.which("pip")
    if found and os.path.dirname(os.path.abspath(found)) == os.path.dirname(os.path.abspath(sys.executable)):
        return "pip install"
    return f"{shlex.quote(sys.executable)} -m pip install"


def _format_requirement(distribution: importlib.metadata.Distribution, extra: str) -> str:
    """Format what pip installs: the source that facepipe came from, with the extra."""
    origin = _read_origin(distribution)
    url = str(origin.get("url", ""))
    if not url:
        return shlex.quote(f"facepipe[{extra}]")
    if "dir_info" in origin:
        folder = unquote(urlsplit(url).path)
        flag = "-e " if origin["dir_info"].get("editable") else ""
        return f"{flag}{shlex.quote(f'{folder}[{extra}]')}"
    if "vcs_info" in origin:
        vcs = origin["vcs_info"]
        url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    return shlex.quote(f"facepipe[{extra}] @ {url}")


def _read_origin(distribution: importlib.metadata.Distribution) -> dict[str, Any]:
    with suppress(ValueError, TypeError):
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        if isinstance(origin, dict):
            return origin
    return {}
