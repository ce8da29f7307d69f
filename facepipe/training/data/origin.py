"""Where a chip set's images come from, for the manifests of models that are trained on it."""

import hashlib
import os
from dataclasses import asdict
from typing import Any

from facepipe.gallery import Gallery
from facepipe.training.data.config import DataConfig


def describe_origin(data: DataConfig) -> dict[str, Any]:
    """Describe a gallery, with its version, contract and list, or a source; with digests of files."""
    if not data.gallery:
        return {"source": data.source, "sha256": hash_file(data.source)}
    gallery = Gallery(data.gallery)
    origin = {"gallery": data.gallery, "version": gallery.version, "contract": asdict(gallery.contract)}
    if data.list:
        origin["list"] = data.list
        origin["list_sha256"] = hash_file(data.list)
    return origin


def hash_file(path: str) -> str | None:
    """Compute the SHA-256 of a local file, or return None for folders and remote files."""
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
