"""faiss, set up for facepipe: `from facepipe.nearest.faiss_engine import faiss`."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

from facepipe.errors import MissingPackageError
from facepipe.extras import describe_missing

try:
    import faiss as _faiss
except ImportError as missing:
    raise MissingPackageError(describe_missing("faiss", "searching among embeddings")) from missing

# With this many queries faiss computes distances as matrix products. faiss 1.15 defaults to 1,000, which is four times
# slower in between.
_MIN_QUERIES_FOR_BLAS = 20
_WRITE_BUFFER_BYTES = 1 << 24

faiss: Any = _faiss  # the type stubs of faiss lack most of what is used here
faiss.cvar.distance_compute_blas_threshold = _MIN_QUERIES_FOR_BLAS

Result = TypeVar("Result")


def write_index(index: Any, path: str) -> None:
    """Write a faiss index to a file and wait until it is on disk.

    faiss gets an open file instead of a path: with a path it does not notice if the last bytes find no room.

    Raises:
        OSError: the file cannot be written.
    """
    with open(path, "wb") as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write, _WRITE_BUFFER_BYTES))
        file.flush()
        os.fsync(file.fileno())


def train_on_gpus(train: Callable[[Any], Result], dimension: int, log: Callable[[str], None]) -> Result:
    """Train with an empty L2 index on all GPUs that faiss sees, or on the CPU if there are none.

    Args:
        train: gets the index in which k-means looks for the nearest centroids; None stands for the CPU.
        dimension: of the vectors.
        log: is called with the reason if there are GPUs and they cannot be used.

    Returns:
        The result of `train`.
    """
    count = faiss.get_num_gpus()
    if count < 1:
        return train(None)
    try:
        return train(faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(dimension)))
    except (RuntimeError, NameError, AttributeError) as error:
        # The driver is too old, the memory is full, or faiss was built without these functions.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        log(f"faiss sees {count} GPUs and cannot train on them ({reason[:200]}): k-means runs on the CPU")
    return train(None)


__all__ = ["faiss", "train_on_gpus", "write_index"]
