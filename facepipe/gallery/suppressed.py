"""What was erased and must not come back: hashes of uris and of contents, kept in the gallery.

The source may go on listing an erased image. Hashes tell it again without saying what it was called.
"""

from collections.abc import Iterable

import numpy as np

from facepipe import storage
from facepipe.hashing import hash64
from facepipe.types import UInt64

FOLDER = "erased"
_URIS, _CONTENTS = ".uris", ".contents"


def get_erased_folder(gallery: str) -> str:
    """Where receipts, and these hashes, lie."""
    return storage.join(gallery, FOLDER)


def write_erased_file(gallery: str, name: str, data: bytes) -> str:
    """Write a file of this folder, whole or not at all: a torn one would stop every later run. Its path."""
    path = storage.join(get_erased_folder(gallery), name)
    storage.replace(path, data)
    return path


def suppress_images(gallery: str, name: str, uris: Iterable[str], contents: Iterable[str]) -> None:
    """Keep images from coming back: under their uris, and under any other as long as their bytes are the same."""
    for ending, values in ((_URIS, uris), (_CONTENTS, contents)):
        hashes = np.unique(np.array([hash64(value) for value in values], np.uint64))
        write_erased_file(gallery, name + ending, hashes.astype("<u8").tobytes())


def read_uris(gallery: str) -> UInt64:
    """Sorted hashes of uris that must not come back."""
    return _all(gallery, _URIS)


def read_contents(gallery: str) -> UInt64:
    """Sorted hashes of image ids that must not come back."""
    return _all(gallery, _CONTENTS)


def _all(gallery: str, ending: str) -> UInt64:
    found = [f.url for f in storage.list_files(get_erased_folder(gallery)) if f.url.endswith(ending)]
    parts = [np.frombuffer(storage.read(path.encode()), "<u8") for path in found]
    return np.unique(np.concatenate([np.empty(0, np.uint64), *parts]))
