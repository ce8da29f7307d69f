"""Make local folders so that they can be removed again if what they were made for fails."""

import os
from contextlib import suppress

from facepipe.storage.atomic import make_folders


def make_new_folders(path: str) -> list[str]:
    """Make a folder and those above it; return the ones that were made, the deepest one first.

    Raises:
        OSError: a folder cannot be made. None is left that was.
    """
    folders = []
    missing = os.path.abspath(path)
    while not os.path.lexists(missing):
        folders.append(missing)
        missing = os.path.dirname(missing)
    try:
        make_folders(path)
    except OSError:
        remove_new_folders(folders)
        raise
    return folders


def remove_new_folders(folders: list[str]) -> None:
    """Remove folders that `make_new_folders` made, up to the first one that is not empty."""
    for folder in folders:
        try:
            with suppress(FileNotFoundError):
                os.rmdir(folder)
        except OSError:
            return
