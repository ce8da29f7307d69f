"""The folder of this machine in which copies of files and aliases of folders are kept."""

import os
import stat
from contextlib import suppress

from facepipe.errors import StorageError
from facepipe.hashing import hash64


def get_cache_folder(gallery: str = "") -> str:
    """Return the folder with this machine's copies, of all galleries or of one.

    FACEPIPE_CACHE names it; the default is ~/.cache/facepipe.
    """
    folder = os.environ.get("FACEPIPE_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "facepipe")
    # A hash of the URL keeps the copies of different galleries apart.
    return os.path.join(folder, f"{hash64(gallery.rstrip('/')):016x}") if gallery else folder


def make_private(folder: str) -> None:
    """Make a folder that no other user can look into; refuse one that another user made first."""
    # The folder may be there already: whose it is decides.
    with suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    info = os.lstat(folder)
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
        raise StorageError(f"{folder!r} is not a folder of yours: have FACEPIPE_CACHE name a place that is")
    if info.st_mode & 0o077:
        os.chmod(folder, 0o700)
