"""Read lists of given faces of any layout, and finish them: a folder of files that workers map into memory."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import IO

import numpy as np

from facepipe import storage
from facepipe.errors import SourceError, StorageError
from facepipe.given.batch import LabelCodes, RecordBatch
from facepipe.given.coco import read_coco
from facepipe.given.join import finish_records
from facepipe.given.records import RECORD, Kind, ListFigures, Records
from facepipe.given.text_list import read_text_list
from facepipe.types import Int64, UInt64

FIGURES = "faces.json"
KEYS = "keys"
STARTS = "starts"
FACES = "faces"
LABELS = "labels"
FILES = (KEYS, STARTS, FACES, LABELS, FIGURES)
"""Files of the folder; that of the figures comes last."""
# Lists are sorted in pieces, by the first byte of the key.
_PIECES = 256
_PIECE_SHIFT = np.uint64(56)
_COPIED_BYTES = 1 << 22


@contextmanager
def read_lists(paths: Sequence[str]) -> Iterator[str]:
    """Read lists of faces, and yield a temporary folder with the files of `FILES`.

    Args:
        paths: local lists: CSV, TSV, lists with white space, or COCO's JSON. Their lines are joined by image.

    Raises:
        SourceError: a list is missing or of no known kind, or more than half of it cannot be used.
    """
    require_lists(paths)
    with tempfile.TemporaryDirectory(prefix="facepipe-") as folder:
        try:
            _write_files(list(paths), folder)
        except OSError as error:
            raise StorageError(
                f"cannot keep the list of boxes in {folder!r} (TMPDIR): {storage.describe_error(error)}"
            ) from error
        yield folder


def require_lists(paths: Sequence[str]) -> None:
    """Require that lists are files of this machine. Raises SourceError otherwise."""
    for path in paths:
        if storage.is_remote(path) or not os.path.isfile(path):
            raise SourceError(f"no such list of boxes on this machine: {path!r}")


def digest_lists(paths: Sequence[str]) -> str:
    """Compute the digest of what lists hold, in any order. Raise SourceError if one cannot be read."""
    digests = []
    for path in paths:
        try:
            with open(path, "rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise SourceError(f"cannot read the list of boxes {path!r}: {storage.describe_error(error)}") from error
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def copy_lists(folder: str, target: str) -> None:
    """Copy the files of a folder to another one, which may be in an object store."""
    storage.make_folder(target)
    for name in FILES:
        path = storage.join(target, name)
        if storage.is_remote(target):
            storage.write_file(path, os.path.join(folder, name))
        else:
            shutil.copyfile(os.path.join(folder, name), path)


class _Pieces:
    """Temporary files for records, by the first byte of their keys."""

    def __init__(self, folder: str):
        self._folder = folder
        self._files: dict[int, IO[bytes]] = {}

    def __enter__(self) -> "_Pieces":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def write(self, records: Records) -> None:
        """Add records."""
        numbers = (records["key"] >> _PIECE_SHIFT).astype(np.int64)
        order = np.argsort(numbers, kind="stable")
        bounds = np.searchsorted(numbers[order], np.arange(_PIECES + 1))
        for number in np.unique(numbers).tolist():
            if number not in self._files:
                self._files[number] = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  closed by __exit__
            self._files[number].write(records[order[bounds[number] : bounds[number + 1]]].tobytes())

    def read(self) -> Iterator[Records]:
        """Yield the records of each file, in order of the files."""
        for number in sorted(self._files):
            self._files[number].seek(0)
            # What is read is no array that can be changed.
            yield np.frombuffer(self._files[number].read(), RECORD).copy()
            self._files[number].close()


def _write_files(paths: list[str], folder: str) -> None:
    figures = ListFigures(paths)
    codes = LabelCodes()
    with _Pieces(folder) as pieces:
        depths: set[int] = set()
        for number, path in enumerate(paths):
            depths |= _read_list(path, number, codes, figures, pieces)
        figures.depths = sorted(depths, reverse=True)
        _finish_pieces(pieces, figures, folder)
    figures.has_labels = bool(codes.labels)
    with open(os.path.join(folder, LABELS), "w", encoding="utf-8", errors="surrogatepass") as file:
        json.dump(codes.labels, file)
    with open(os.path.join(folder, FIGURES), "w", encoding="utf-8", errors="surrogateescape") as file:
        json.dump(asdict(figures), file)


def _read_list(path: str, number: int, codes: LabelCodes, figures: ListFigures, pieces: _Pieces) -> set[int]:
    """Read a list into pieces. Returns the numbers of parts that its names have."""
    batch = RecordBatch(number, codes, figures)
    unusable = figures.unusable
    for records in read_coco(path, batch) if _is_json(path) else read_text_list(path, batch):
        pieces.write(records)
    unusable = figures.unusable - unusable
    if 2 * unusable > batch.lines:
        raise SourceError(
            f"{unusable} of {batch.lines} lines of the list of boxes {path!r} cannot be used ("
            f"{'; '.join(figures.examples)}). If boxes are left, top, width and height, give the list a header such as "
            "path,x,y,w,h"
        )
    if batch.is_relative:
        raise SourceError(
            f"the boxes in {path!r} are shares of the picture: no coordinate is above 2. Multiply them by the width "
            "and height of the image: pixels are expected"
        )
    if batch.is_mirrored:
        figures.mirrored.append(number)
    return batch.depths


def _is_json(path: str) -> bool:
    """Tell from its first character whether a list is JSON."""
    with open(path, "rb") as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")


def _finish_pieces(pieces: _Pieces, figures: ListFigures, folder: str) -> None:
    """Sort the pieces, and write them one after the other."""
    with (
        open(os.path.join(folder, KEYS), "wb") as keys,
        open(os.path.join(folder, STARTS), "wb") as starts,
        open(os.path.join(folder, FACES), "wb") as faces,
    ):
        count = 0
        for piece in pieces.read():
            records, repeated = finish_records(piece, figures.mirrored)
            distinct, first = _find_images(records["key"])
            keys.write(distinct.astype("<u8").tobytes())
            starts.write((first + count).astype("<i8").tobytes())
            faces.write(records.tobytes())
            count += len(records)
            figures.repeated += repeated
            figures.images += len(distinct)
            figures.faces += int((records["kind"] == Kind.FACE).sum())
        starts.write(np.array([count], "<i8").tobytes())


def _find_images(keys: UInt64) -> tuple[UInt64, Int64]:
    distinct, first = np.unique(keys, return_index=True)
    return distinct, first.astype(np.int64)
