"""One writer at a time: a lock on a file in the gallery, which the system releases however the process ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from facepipe.errors import ConfigError, GalleryBusyError, GalleryError
from facepipe.storage import is_remote


@contextmanager
def writer_lock(path: str, what: str = "gallery") -> Iterator[None]:
    """Hold the gallery (or the index, by its folder) for writing, or raise GalleryBusyError."""
    if is_remote(path):
        raise ConfigError(
            f"{path}: writing a gallery into an object store is not supported yet; use a local or mounted folder"
        )
    if os.path.exists(path) and not os.path.isdir(path):
        raise ConfigError(f"the {what} {path!r} is a file; name a folder")
    try:
        os.makedirs(path, exist_ok=True)
        file = open(os.path.join(path, ".lock"), "w")  # noqa: SIM115
    except OSError as error:
        raise GalleryError(f"cannot write to the {what} {path!r}: {(error.strerror or str(error)).lower()}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise GalleryBusyError(f"another run is writing to the {what} {path!r}; wait for it to end") from error
        yield
