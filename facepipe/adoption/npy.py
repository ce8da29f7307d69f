"""Arrays of .npy and .npz files, read some rows at a time. Nothing in them is ever unpickled."""

import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt

from facepipe.errors import ConfigError, SourceError
from facepipe.storage import open_seekable

_MAX_ROW_BYTES = 8 << 10  # 1,024 numbers of double precision, or a name of two thousand letters
_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass(frozen=True)
class NpyHeader:
    """What an array is.

    Attributes:
        shape: Its shape.
        dtype: Type of its elements.
        columns_first: Whether it is stored column by column.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    columns_first: bool = False


def read_headers(path: str) -> dict[str, NpyHeader]:
    """Read the headers of the arrays of an .npz by name; the one array of an .npy has the name "".

    `read_rows` reads only arrays that pass `check_array`.

    Raises:
        SourceError: the file is damaged.
    """
    with ExitStack() as stack:
        return {
            name: _read_header(stream, f"{path}: {name}" if name else path)
            for name, stream in _open_streams(path, stack)
        }


def check_array(header: NpyHeader, where: str) -> None:
    """Raise ConfigError for an array that holds Python objects, or that cannot be streamed."""
    if header.dtype.hasobject:
        raise ConfigError(
            f"{where} holds Python objects, that is a pickle, which facepipe does not open: save numbers and texts as "
            "they are, such as names=np.array(names, str)"
        )
    if header.columns_first:
        raise ConfigError(f"{where} is stored column by column: save np.ascontiguousarray of it")
    if _count_row_bytes(header) > _MAX_ROW_BYTES:
        raise ConfigError(
            f"{where} has rows of more than {_MAX_ROW_BYTES} bytes: these are neither encodings nor names"
        )


def read_rows(path: str, names: tuple[str, ...], count: int) -> Iterator[tuple[npt.NDArray[np.generic], ...]]:
    """Yield up to `count` rows of each of the named arrays at a time, all from the same place."""
    with ExitStack() as stack:
        # Each array has its own stream over the file, so that all can be read side by side.
        streams = {name: stream for name, stream in _open_streams(path, stack) if name in names}
        headers = {name: _read_header(stream, path) for name, stream in streams.items()}
        for name in names:
            check_array(headers[name], f"{path}: {name}" if name else path)
        # Read up to the end of the shortest array, so that all give the same rows.
        total = min(headers[name].shape[0] for name in names)
        for first in range(0, total, count):
            n = min(count, total - first)
            yield tuple(_read_array(streams[name], headers[name], n, f"{path}: {name}") for name in names)


def _open_streams(path: str, stack: ExitStack) -> Iterator[tuple[str, BinaryIO]]:
    """Yield (name, stream) of each array of a file."""
    file = stack.enter_context(open_seekable(path))
    # Without the signature of a zip archive the file is one array.
    if file.read(4) != b"PK\x03\x04":
        file.seek(0)
        yield "", file
        return
    try:
        archive = stack.enter_context(zipfile.ZipFile(file))
        for member in archive.namelist():
            if member.endswith(".npy"):
                yield member.removesuffix(".npy"), cast(BinaryIO, stack.enter_context(archive.open(member)))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError) as error:
        raise SourceError(f"cannot read {path!r}: {str(error).splitlines()[0]}") from error


def _read_header(stream: BinaryIO, where: str) -> NpyHeader:
    try:
        shape, is_fortran, dtype = _READ_HEADER[np.lib.format.read_magic(stream)](stream)
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise SourceError(f"cannot read {where}: not an array of numpy's format") from error
    # A one-dimensional array is the same in both orders.
    return NpyHeader(shape, dtype, is_fortran and len(shape) > 1)


def _count_row_bytes(header: NpyHeader) -> int:
    # Numbers without a bound, because a damaged header may hold sizes that overflow.
    return int(np.prod(header.shape[1:], dtype=object)) * header.dtype.itemsize


def _read_array(stream: BinaryIO, header: NpyHeader, count: int, where: str) -> npt.NDArray[np.generic]:
    """Read the next `count` rows of an array."""
    size = count * _count_row_bytes(header)
    try:
        data = stream.read(size)
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise SourceError(f"cannot read {where}: {str(error).splitlines()[0]}") from error
    # The decompressor's error class can be told by its module only.
    except Exception as error:
        if type(error).__module__ != "zlib":
            raise
        raise SourceError(f"cannot read {where}: {error}") from error
    if len(data) < size:
        raise SourceError(f"{where} is cut short")
    shape = (count, *header.shape[1:])
    return np.frombuffer(data, header.dtype).reshape(shape) if size else np.zeros(shape, header.dtype)
