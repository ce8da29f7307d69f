"""faiss, set up for facepipe: `from facepipe.nearest.faiss_engine import faiss`."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

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
Result = TypeVar("Result")


def write_index(index: Any, path: str) -> None:
    """Write a faiss index to a file that is on disk when this returns. Raises OSError where it cannot be.

    Not by its path: faiss does not look whether the last bytes found room.
    """
    with open(path, "wb") as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write, _PIECE))
        file.flush()
        os.fsync(file.fileno())


def with_gpus(train: Callable[[Any], Result], dimension: int, say: Callable[[str], None]) -> Result:
    """What `train` makes of an empty L2 index on all GPUs that faiss sees, or of None where there is none to be had.

    k-means looks for the nearest centroids in that index. `say` hears why a GPU that is there was not used.
    """
    count = faiss.get_num_gpus()
    if count < 1:
        return train(None)
    try:
        return train(faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(dimension)))
    except (RuntimeError, NameError, AttributeError) as error:  # a driver too old, no memory left, a build without them
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        say(f"faiss sees {count} GPUs and cannot train on them ({reason[:200]}): k-means runs on the CPU")
    return train(None)


__all__ = ["faiss", "with_gpus", "write_index"]
