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

_LONGEST = 4 << 10  # bytes of a row: 512 numbers of double precision, a name of a thousand letters
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass(frozen=True)
class NpyHeader:
    """What an array is: its shape, the type of its elements, and whether it is stored column by column."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    columns_first: bool = False


def read_headers(path: str) -> dict[str, NpyHeader]:
    """The arrays of an .npz by name; the one array of an .npy has the name "".

    Raises SourceError for a file that is damaged. `rows` reads only arrays that pass `check`.
    """
    with ExitStack() as stack:
        return {name: _header(stream, f"{path}: {name}" if name else path) for name, stream in _streams(path, stack)}


def check_array(header: NpyHeader, where: str) -> None:
    """Raise ConfigError for an array that holds Python objects, or that cannot be streamed."""
    if header.dtype.hasobject:
        raise ConfigError(
            f"{where} holds Python objects, that is a pickle, which facepipe does not open: save numbers and texts as "
            "they are, such as names=np.array(names, str)"
        )
    if header.columns_first:
        raise ConfigError(f"{where} is stored column by column: save np.ascontiguousarray of it")
    if _row_bytes(header) > _LONGEST:
        raise ConfigError(f"{where} has rows of more than {_LONGEST} bytes: these are neither encodings nor names")


def read_rows(path: str, names: tuple[str, ...], count: int) -> Iterator[tuple[npt.NDArray[np.generic], ...]]:
    """Up to `count` rows of the named arrays at a time, all from the same place."""
    with ExitStack() as stack:
        streams = {name: stream for name, stream in _streams(path, stack) if name in names}
        found = {name: _header(stream, path) for name, stream in streams.items()}
        for name in names:
            check_array(found[name], f"{path}: {name}" if name else path)
        total = min(found[name].shape[0] for name in names)
        for first in range(0, total, count):
            n = min(count, total - first)
            yield tuple(_take(streams[name], found[name], n, f"{path}: {name}") for name in names)


def _streams(path: str, stack: ExitStack) -> Iterator[tuple[str, BinaryIO]]:
    file = stack.enter_context(open_seekable(path))
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


def _header(stream: BinaryIO, where: str) -> NpyHeader:
    try:
        shape, fortran, dtype = _HEADERS[np.lib.format.read_magic(stream)](stream)
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise SourceError(f"cannot read {where}: no array of numpy's format") from error
    return NpyHeader(shape, dtype, fortran and len(shape) > 1)


def _row_bytes(header: NpyHeader) -> int:
    return int(np.prod(header.shape[1:], dtype=object)) * header.dtype.itemsize


def _take(stream: BinaryIO, header: NpyHeader, count: int, where: str) -> npt.NDArray[np.generic]:
    wanted = count * _row_bytes(header)
    try:
        data = stream.read(wanted)
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise SourceError(f"cannot read {where}: {str(error).splitlines()[0]}") from error
    except Exception as error:
        if type(error).__module__ != "zlib":
            raise
        raise SourceError(f"cannot read {where}: {error}") from error
    if len(data) < wanted:
        raise SourceError(f"{where} is cut short")
    shape = (count, *header.shape[1:])
    return np.frombuffer(data, header.dtype).reshape(shape) if wanted else np.zeros(shape, header.dtype)
