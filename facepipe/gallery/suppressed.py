"""Hashes of erased images, by uri and by content, so that they do not come back. They are kept in the gallery.

The source may go on listing an erased image. Hashes recognise it without saying what it was called.
"""

from collections.abc import Iterable

import numpy as np

from facepipe import storage
from facepipe.hashing import hash64
from facepipe.types import UInt64

FOLDER = "erased"
_URIS = ".uris"
_CONTENTS = ".contents"


def get_erased_folder(gallery: str) -> str:
    """Return the folder of a gallery that holds receipts and these hashes."""
    return storage.join(gallery, FOLDER)


def write_erased_file(gallery: str, name: str, data: bytes) -> str:
    """Write a file of this folder, whole or not at all, because half a file would stop every later run.

    Returns:
        The path of the file.
    """
    path = storage.join(get_erased_folder(gallery), name)
    storage.replace(path, data)
    return path


def suppress_images(gallery: str, name: str, uris: Iterable[str], contents: Iterable[str]) -> None:
    """Keep images from coming back.

    Args:
        gallery: path or URL of the gallery.
        name: name of the erasure, from which the files get theirs.
        uris: uris that must not come back.
        contents: image ids that must not come back, under whatever uri.
    """
    for ending, values in ((_URIS, uris), (_CONTENTS, contents)):
        hashes = np.unique(np.array([hash64(value) for value in values], np.uint64))
        write_erased_file(gallery, name + ending, hashes.astype("<u8").tobytes())


def release_images(gallery: str, name: str) -> None:
    """Let the images of an erasure come back, as far as no other erasure keeps them out."""
    for ending in (_URIS, _CONTENTS):
        storage.delete(storage.join(get_erased_folder(gallery), name + ending))


def read_uris(gallery: str) -> UInt64:
    """Read the sorted hashes of uris that must not come back."""
    return _read_hashes(gallery, _URIS)


def read_contents(gallery: str) -> UInt64:
    """Read the sorted hashes of image ids that must not come back."""
    return _read_hashes(gallery, _CONTENTS)


def _read_hashes(gallery: str, ending: str) -> UInt64:
    paths = [entry.url for entry in storage.list_files(get_erased_folder(gallery)) if entry.url.endswith(ending)]
    parts = [np.frombuffer(storage.read(path.encode()), "<u8") for path in paths]
    return np.unique(np.concatenate([np.empty(0, np.uint64), *parts]))
