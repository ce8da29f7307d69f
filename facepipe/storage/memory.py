"""Return memory that this process has freed to the system."""

import ctypes
from contextlib import suppress

import pyarrow as pa


def release_freed_memory() -> None:
    """Return what the allocators keep for later to the system: it would count as memory of the process.

    Worth it between steps that hold much. Where the C library cannot do so, nothing happens.
    """
    pa.default_memory_pool().release_unused()
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
