"""What a complete listing of a source says of the images that the gallery has of it, for the driver and the workers.

The listing may run on another machine than the driver, and the workers on others again. So it writes files into the
run's folder: figures, the images that it did not find, and the contents that a new image may have been moved from.
Images and contents are hashes, and never in memory all at once: of a hundred million images they are 3.2 GB.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import IO

import numpy as np

from facepipe import storage
from facepipe.errors import StorageError
from facepipe.storage.hashtable import HashTable
from facepipe.types import Bool, UInt64

_FIGURES = "listing.json"
_UNLISTED = "unlisted"
_CONTENTS = "contents"
# Columns of the file of images: uri, content, whether it is marked as missing.
_COLUMNS = 3
_ROWS = 1 << 17
_COPIED_BYTES = 1 << 22
# Contents are sorted in pieces, by their first byte.
_PIECES = 256
_PIECE_SHIFT = np.uint64(56)


@dataclass(frozen=True)
class ListingFigures:
    """Figures of a complete listing.

    Attributes:
        listed: Images that the source listed.
        held: Images that the gallery has of the source, and that are not marked as missing.
        unlisted: Those among them that were not listed.
        broken: Places that could not be listed.
        has_unlisted: Whether the images that were not listed are written down, marked as missing or not.
        has_contents: Whether the contents of images that may have moved are written down.
        gives_labels: Whether an image without a label has none by the source's word.
        broken_place: The first place that could not be listed, with the reason.
    """

    listed: int
    held: int
    unlisted: int
    broken: int
    has_unlisted: bool
    has_contents: bool
    gives_labels: bool = True
    broken_place: str = ""


def write_listing(
    folder: str,
    figures: ListingFigures,
    unlisted: Iterable[tuple[UInt64, UInt64, Bool]],
    contents: Iterable[UInt64],
) -> None:
    """Write what a listing found out.

    Args:
        folder: path or URL of a folder of the run.
        figures: the figures.
        unlisted: images that were not listed, as `KnownImages.read_unlisted` yields them.
        contents: hashes of contents that an image may have been moved from, as `KnownImages.read_moved_contents` yields
            them.
    """
    storage.make_folder(folder)
    if figures.has_unlisted:
        _write_unlisted(storage.join(folder, _UNLISTED), unlisted)
    if figures.has_contents:
        _write_contents(storage.join(folder, _CONTENTS), contents)
    # The figures come last: without them nothing of a listing counts.
    storage.write(storage.join(folder, _FIGURES), json.dumps(asdict(figures)).encode())


def _write_unlisted(path: str, unlisted: Iterable[tuple[UInt64, UInt64, Bool]]) -> None:
    with _write_in_pieces(path) as file:
        for uris, hashes, is_marked in unlisted:
            file.write(np.stack([uris, hashes, is_marked.astype(np.uint64)], 1).astype("<u8").tobytes())


def _write_contents(path: str, contents: Iterable[UInt64]) -> None:
    """Write hashes in ascending order, each once."""
    with _write_in_pieces(path) as file, ExitStack() as stack:
        # The pieces are files without a name, which go with the process.
        pieces = [stack.enter_context(tempfile.TemporaryFile(prefix="facepipe-")) for _ in range(_PIECES)]
        for hashes in contents:
            numbers = (hashes >> _PIECE_SHIFT).astype(np.int64)
            order = np.argsort(numbers, kind="stable")
            bounds = np.searchsorted(numbers[order], np.arange(_PIECES + 1))
            for number in np.unique(numbers).tolist():
                part = hashes[order[bounds[number] : bounds[number + 1]]]
                pieces[number].write(part.astype("<u8").tobytes())
        for piece in pieces:
            piece.seek(0)
            file.write(np.unique(np.frombuffer(piece.read(), "<u8")).tobytes())


@contextmanager
def _write_in_pieces(path: str) -> Iterator[IO[bytes]]:
    """Open a file to write to: in its place on a disk, or a temporary one that is uploaded in the end."""
    try:
        with tempfile.NamedTemporaryFile(prefix="facepipe-") if storage.is_remote(path) else open(path, "wb") as file:
            yield file
            file.flush()
            if storage.is_remote(path):
                storage.write_file(path, file.name)
    except OSError as error:
        raise StorageError(f"cannot write {path!r}: {storage.describe_error(error)}") from error


def read_figures(folder: str) -> ListingFigures:
    """Read the figures of a listing. Raises StorageError if it was not complete."""
    try:
        return ListingFigures(**json.loads(storage.read(storage.join(folder, _FIGURES))))
    except (TypeError, ValueError) as error:
        raise StorageError(f"{folder!r} holds no complete listing") from error


def map_contents(folder: str) -> UInt64:
    """Map the sorted hashes of contents that an image may have been moved from into memory, (n,)."""
    path = storage.join(folder, _CONTENTS)
    if not storage.file_exists(path):
        return np.empty(0, np.uint64)
    if not storage.is_remote(path):
        return np.memmap(path, "<u8", "r") if os.path.getsize(path) else np.empty(0, np.uint64)
    # A copy without a name, which goes with the map.
    with tempfile.TemporaryFile(prefix="facepipe-") as local, storage.open_seekable(path) as remote:
        shutil.copyfileobj(remote, local, _COPIED_BYTES)
        local.flush()
        return np.memmap(local, "<u8", "r") if local.tell() else np.empty(0, np.uint64)


def load_unlisted(folder: str, figures: ListingFigures) -> HashTable:
    """Load the images that were not listed: from the hash of the uri to its content and whether it is marked.

    The caller closes the table.
    """
    table = HashTable(width=2)
    try:
        if figures.has_unlisted:
            for rows in _read_unlisted(storage.join(folder, _UNLISTED)):
                table.add(rows[:, 0], rows[:, 1:])
    except BaseException:
        table.close()
        raise
    return table


def _read_unlisted(path: str) -> Iterator[UInt64]:
    with storage.open_seekable(path) as file:
        while data := file.read(_ROWS * _COLUMNS * 8):
            yield np.frombuffer(data, "<u8").reshape(-1, _COLUMNS).astype(np.uint64)
