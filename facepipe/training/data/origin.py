"""Where a chip set's images are from, for the manifests of what is trained on it."""

import hashlib
import os
from dataclasses import asdict
from typing import Any

from facepipe.gallery import Gallery
from facepipe.training.data.config import DataConfig


def describe_origin(data: DataConfig) -> dict[str, Any]:
    """A gallery with its version and contract and the list, or a source; with digests of files."""
    if not data.gallery:
        return {"source": data.source, "sha256": hash_file(data.source)}
    gallery = Gallery(data.gallery)
    found = {"gallery": data.gallery, "version": gallery.version, "contract": asdict(gallery.contract)}
    return found | ({"list": data.list, "list_sha256": hash_file(data.list)} if data.list else {})


def hash_file(path: str) -> str | None:
    """SHA-256 of a local file; None for folders and what is elsewhere."""
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
