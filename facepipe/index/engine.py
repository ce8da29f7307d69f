"""faiss, set up for facepipe: `from facepipe.index.engine import faiss`."""

import os
from typing import Any

from facepipe.errors import ConfigError

try:
    import faiss as _faiss
except ImportError as missing:
    raise ConfigError(
        "index and search need faiss: pip install 'facepipe[cpu]', or 'facepipe[gpu]' on a machine with a GPU"
    ) from missing

_BLAS_FROM = 20  # queries from which distances are matrix products; 1.15 has 1000, which is 4 times slower in between
faiss: Any = _faiss  # its type stubs lack most of what is used here
faiss.cvar.distance_compute_blas_threshold = _BLAS_FROM

_PIECE = 1 << 24


def write_index(index: Any, path: str) -> None:
    """Write a faiss index to a file that is on disk when this returns. Raises OSError where it cannot be.

    Not by its path: faiss does not look whether the last bytes found room.
    """
    with open(path, "wb") as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write, _PIECE))
        file.flush()
        os.fsync(file.fileno())


__all__ = ["faiss", "write_index"]
