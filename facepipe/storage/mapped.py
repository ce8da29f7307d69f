"""Files that are mapped into memory and written there.

Their room on the disk is taken beforehand. If a page found none later, SIGBUS would end the process without a message.
"""

import mmap
import os
import tempfile
import weakref
from contextlib import suppress
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from facepipe.errors import StorageError
from facepipe.storage.error_text import describe_error

_COPIED_ROWS = 1 << 16
_MIN_FILE_BYTES = 1 << 20  # of an array that is worth a file


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


def make_temporary_array(dtype: npt.DTypeLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Make an array of zeros in a file without a name. A small one is made in memory.

    Raises:
        StorageError: there is no room for it.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if size < _MIN_FILE_BYTES:
        return np.zeros(shape, dtype)
    mapped, file = map_temporary_file(size)
    file.close()
    return np.frombuffer(mapped, dtype).reshape(shape)


def copy_column(values: npt.NDArray[Any], rows: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
    """Copy numbers (n,), or those in some rows (m,), into a file without a name.

    Raises:
        StorageError: there is no room for them.
    """
    count = len(values) if rows is None else len(rows)
    copy = make_temporary_array(values.dtype, (count,))
    for at in range(0, count, _COPIED_ROWS):
        block = slice(at, at + _COPIED_ROWS)
        copy[block] = values[block] if rows is None else values[rows[block]]
    return copy


class TemporaryRows:
    """Rows of numbers in a file without a name, which takes room on the disk as rows are needed.

    Attributes:
        array: The rows, (max_rows, width). Those for which no room was taken must not be touched.
    """

    def __init__(self, dtype: npt.DTypeLike, max_rows: int, width: int):
        """Reserve addresses for so many rows, and take no room.

        Raises:
            StorageError: there can be no file of that size.
        """
        self._row_bytes = width * np.dtype(dtype).itemsize
        size = max(1, max_rows * self._row_bytes)
        try:
            self._descriptor, path = tempfile.mkstemp(prefix="facepipe-")
            os.unlink(path)
            weakref.finalize(self, os.close, self._descriptor)
            os.truncate(self._descriptor, size)
            mapped = mmap.mmap(self._descriptor, size)
        except OSError as error:
            raise _describe_missing_room(size, error) from error
        self.array = np.frombuffer(mapped, dtype, max_rows * width).reshape(max_rows, width)

    def take_room(self, rows: int) -> None:
        """Take room for the first rows.

        Raises:
            StorageError: there is none.
        """
        try:
            _allocate(self._descriptor, rows * self._row_bytes)
        except OSError as error:
            raise _describe_missing_room(rows * self._row_bytes, error) from error


class TemporaryColumn:
    """Numbers that are appended to a column in a file without a name."""

    def __init__(self, dtype: npt.DTypeLike, max_count: int):
        """Take room for so many numbers.

        Raises:
            StorageError: there is none.
        """
        self._values = make_temporary_array(dtype, (max_count,))
        self._count = 0

    @property
    def array(self) -> npt.NDArray[Any]:
        """The numbers, (n,)."""
        return self._values[: self._count]

    def append(self, values: npt.NDArray[Any]) -> None:
        """Append numbers (m,)."""
        self._values[self._count : self._count + len(values)] = values
        self._count += len(values)

    def clear(self) -> None:
        """Forget all numbers, and keep the room."""
        self._count = 0


def _describe_missing_room(size: int, error: OSError) -> StorageError:
    return StorageError(
        f"cannot keep a table of {size >> 10:,} KiB in {tempfile.gettempdir()!r}: {describe_error(error)}. "
        "Set TMPDIR to a folder with more room"
    )


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
