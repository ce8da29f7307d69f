"""Files that are mapped into memory and written there.

Their room on the disk is taken beforehand. If a page found none later, SIGBUS would end the process without a message.
"""

import mmap
import os
import tempfile
from contextlib import suppress
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from facepipe.errors import StorageError
from facepipe.storage.error_text import describe_error


def create_array(path: str, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> "np.memmap[Any, np.dtype[Any]]":
    """Create a .npy file of zeros, and map it to write to.

    Args:
        path: the file; one that is there is replaced.
        dtype: type of the array.
        shape: shape of the array.

    Raises:
        StorageError: there is no room for it.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        descriptor = os.open(path, os.O_RDWR)
        try:
            _allocate(descriptor, os.fstat(descriptor).st_size)
        finally:
            os.close(descriptor)
    except OSError as error:
        with suppress(OSError):
            os.unlink(path)
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        raise StorageError(f"cannot write {path!r} of {size >> 10:,} KiB: {describe_error(error)}") from error
    return array


def map_temporary_file(size: int, folder: str | None = None) -> tuple[mmap.mmap, IO[bytes]]:
    """Make a file without a name, and map it to write to. It goes with the process.

    Args:
        size: its bytes, zero at first.
        folder: where it is made; the system's folder for temporary files by default.

    Returns:
        The mapped bytes, and the file, which the caller closes.

    Raises:
        StorageError: there is no room for it.
    """
    try:
        folder = folder or tempfile.gettempdir()
        file = tempfile.TemporaryFile(dir=folder, prefix="facepipe-")  # noqa: SIM115  the caller closes it
        try:
            _allocate(file.fileno(), size)
            return mmap.mmap(file.fileno(), size), file
        except BaseException:
            file.close()
            raise
    except OSError as error:
        raise StorageError(
            f"cannot keep a table of {size >> 10:,} KiB in {folder or 'TMPDIR'!r}: {describe_error(error)}. "
            "Set TMPDIR to a folder with more room"
        ) from error


def release_pages(array: npt.NDArray[Any]) -> None:
    """Release the memory of the pages of a mapped array; they are read from the file again when they are needed.

    Without this all pages that were ever read count as memory of the process. An array that is not mapped stays.
    """
    mapped = getattr(array, "_mmap", None)
    if isinstance(array, np.memmap) and mapped is not None and array.mode == "r":
        mapped.madvise(mmap.MADV_DONTNEED)


def _allocate(descriptor: int, size: int) -> None:
    """Make a file so long, and take the room for it on the disk."""
    if size:
        os.posix_fallocate(descriptor, 0, size)
