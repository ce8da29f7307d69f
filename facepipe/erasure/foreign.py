"""Files of others below the reports: whether they hold erased data. They are read, and never changed.

A file may be of any kind and length. Tables and arrays are searched as such. Anything else, and whatever cannot be read
as what its name says, is searched as bytes.
"""

import html
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from facepipe.erasure.erased_data import ANY, ErasedData
from facepipe.erasure.selection import compute_marks
from facepipe.erasure.tables import holds_erased
from facepipe.errors import StorageError
from facepipe.storage import describe_error

OnForeign = Callable[[str], None]
"""Is called with the name of a file that facepipe did not write and that holds erased data."""

# A word: a uri without spaces, or a label of one word.
_WORDS = re.compile(rb"[^\s\"'<>,;\x00]+")
_SEPARATOR = re.compile(rb"[\s\"'<>,;\x00]")
_SEPARATORS = tuple(bytes([byte]) for byte in range(256) if _SEPARATOR.match(bytes([byte])))
_CHUNK_BYTES = 8 << 20
_MAX_SHOWN = 5  # files that a message names
_MAX_WORD_BYTES = 64 << 10  # a longer word is no uri; it is searched in pieces
# What reading a damaged file, or one of another format, may raise.
_UNREADABLE = (pa.ArrowException, ValueError, KeyError, TypeError, EOFError, BadZipFile)


def describe_foreign(paths: Sequence[str]) -> str:
    """Say which files hold erased data and were left alone, and what to do."""
    shown = ", ".join(repr(path) for path in paths[:_MAX_SHOWN])
    more = f" and {len(paths) - _MAX_SHOWN} more" if len(paths) > _MAX_SHOWN else ""
    return (
        f"the images are erased, but facepipe did not write {shown}{more}, which still hold erased data: delete them, "
        "or move them elsewhere"
    )


def find_foreign(folder: str, names: Iterable[str], erased: ErasedData, on_foreign: OnForeign) -> None:
    """Find files that hold erased data. Links are left out: what they lead to is not in the gallery.

    Args:
        folder: the folder of the files.
        names: names of the files in it, with slashes.
        erased: what must not be left.
        on_foreign: called with the names of such files.

    Raises:
        StorageError: a file cannot be read.
    """
    for name in names:
        path = os.path.join(folder, name)
        if os.path.isfile(path) and not os.path.islink(path) and mentions_erased(path, erased):
            on_foreign(name)


def mentions_erased(path: str, erased: ErasedData) -> bool:
    """Tell whether a file of any kind holds erased data."""
    try:
        if path.endswith(".parquet"):
            return _is_in_table(path, erased)
        if path.endswith((".npz", ".npy")):
            return _is_in_arrays(path, erased)
    except OSError as error:
        # Arrow raises errors without a number for damaged files.
        if error.errno is not None:
            raise StorageError(f"cannot read {path!r}: {describe_error(error)}") from error
    except _UNREADABLE:
        pass
    try:
        return _is_in_bytes(path, erased)
    except OSError as error:
        raise StorageError(f"cannot read {path!r}: {describe_error(error)}") from error


def _is_in_table(path: str, erased: ErasedData) -> bool:
    with pq.ParquetFile(path) as file:
        return any(holds_erased(batch, erased) for batch in file.iter_batches())


def _is_in_arrays(path: str, erased: ErasedData) -> bool:
    """Tell whether an array holds an erased vector or face id."""
    with open(path, "rb") as file:
        loaded = np.load(file)
        arrays = [loaded] if isinstance(loaded, np.ndarray) else [loaded[name] for name in loaded.files]
    return any(_holds_vector(array, erased) or _holds_id(array, erased) for array in arrays)


def _holds_vector(array: Any, erased: ErasedData) -> bool:
    is_vectors = array.ndim == 2 and array.dtype == np.float32 and array.shape[1] >= 2
    return is_vectors and bool(np.isin(compute_marks(array), erased.marks).any())


def _holds_id(array: Any, erased: ErasedData) -> bool:
    return array.dtype == np.int64 and bool(np.isin(array, erased.faces).any())


def _is_in_bytes(path: str, erased: ErasedData) -> bool:
    """Tell whether a file contains a uri, a label or an image id, as a word or as words.

    Memory does not grow with the file.
    """
    # Single words are looked up in a set; only texts of several words need a search each.
    texts = {
        form.encode("utf-8", "surrogateescape") for text in erased.by_role[ANY] for form in _list_written_forms(text)
    }
    phrases = [text for text in texts if not _WORDS.fullmatch(text)]
    longest = max((len(phrase) for phrase in phrases), default=0)
    with open(path, "rb") as file:
        for chunk in iterate_chunks(file, _CHUNK_BYTES, longest):
            if not texts.isdisjoint(_WORDS.findall(chunk)) or any(phrase in chunk for phrase in phrases):
                return True
    return False


def _list_written_forms(text: str) -> set[str]:
    """List how a text may be written: as it is, in JSON, in HTML and in a CSV file."""
    return {
        text,
        json.dumps(text)[1:-1],
        json.dumps(text, ensure_ascii=False)[1:-1],
        html.escape(text),
        text.replace('"', '""'),
    }


def iterate_chunks(file: BinaryIO, size: int, longest: int) -> Iterator[bytes]:
    """Iterate over the content of a file in chunks that begin and end between words.

    Args:
        file: the file.
        size: bytes that are read at a time.
        longest: length of the longest text of several words. Each one is whole in at least one chunk.
    """
    rest = b""
    while data := file.read(size):
        chunk = rest + data
        # A word that goes on in the next chunk is left to it, unless it is too long to be one.
        end = 1 + max(chunk.rfind(byte) for byte in _SEPARATORS)
        if len(chunk) - end > _MAX_WORD_BYTES:
            end = len(chunk)
        yield chunk[:end]
        # Texts of several words may begin before the end, and a chunk must not begin within a word.
        start = max(0, end - longest - _MAX_WORD_BYTES)
        separator = _SEPARATOR.search(chunk, start, end) if start else None
        rest = chunk[separator.end() if separator else start :]
    yield rest


def iterate_words(file: BinaryIO) -> Iterator[list[str]]:
    """Iterate over the words of a file of any kind, a chunk at a time."""
    for chunk in iterate_chunks(file, _CHUNK_BYTES, 0):
        yield [word.decode("utf-8", "surrogateescape") for word in _WORDS.findall(chunk)]


def iterate_strings(value: Any) -> Iterator[str]:
    """Iterate over all strings in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from iterate_strings(item)
    elif isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from iterate_strings(item)
