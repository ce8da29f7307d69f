"""Delete what is ours from folders in which other files may lie, and keep the others.

A file is ours by its name in a folder that is ours. A link never is: somebody made it, and it may lead anywhere.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from facepipe.errors import ConfigError
from facepipe.storage.files import delete, delete_many, file_exists, list_prefix, open_seekable, raise_listing_error
from facepipe.storage.urls import is_remote, join

Owns = Callable[[str], bool]
"""Tells whether a file is ours, by its name in the folder, with slashes. The name of a folder ends with one."""


def delete_owned(folder: str, owns: Owns, before_batch: Callable[[], None] = lambda: None) -> list[str]:
    """Delete the files in a folder that are ours, and the folders in it that were ours and are empty afterwards.

    Args:
        folder: a local folder or a URL. If it is a link, its owner made it one, and the files behind it count.
        owns: tells which files are ours.
        before_batch: called again and again before something is deleted. If it raises, the rest stays.

    Returns:
        Names of the files and links that are left, relative to the folder.

    Raises:
        StorageError: a folder cannot be listed, or a file cannot be deleted.
    """
    if is_remote(folder):
        return _delete_owned_objects(folder, owns, before_batch)
    left = []
    deleted_from: set[str] = set()
    for name, is_folder in walk_files(folder):
        parent = name.rpartition("/")[0]
        if is_folder:
            # A folder is ours if it held a file of ours, or if its name is ours.
            if name in deleted_from or owns(name + "/"):
                deleted_from.add(parent)
                with suppress(OSError):  # something is left in it
                    os.rmdir(join(folder, name))
        elif owns(name) and not os.path.islink(join(folder, name)):
            before_batch()
            delete(join(folder, name))
            deleted_from.add(parent)
        else:
            left.append(name)
    return left


def _delete_owned_objects(folder: str, owns: Owns, before_batch: Callable[[], None]) -> list[str]:
    prefix = folder.rstrip("/") + "/"
    owned = []
    left = []
    for entry in list_prefix(prefix):
        name = entry.url.removeprefix(prefix)
        if owns(name):
            owned.append(entry.url)
        else:
            left.append(name)
    delete_many(owned, before_batch)
    return left


def delete_owned_folder(folder: str, owns: Owns) -> list[str]:
    """Delete the files of a folder that are ours, and then the folder itself if nothing is left in it.

    A folder that is a link is left as it is.

    Returns:
        As `delete_owned`; "." for a link.
    """
    if not is_remote(folder) and os.path.islink(folder):
        return ["."]
    left = delete_owned(folder, owns)
    if not is_remote(folder):
        with suppress(OSError):  # something is left in it, or there is no such folder
            os.rmdir(folder)
    return left


def walk_files(folder: str) -> Iterator[tuple[str, bool]]:
    """Walk over a local folder without following links.

    Yields:
        Names relative to the folder, and whether each is a folder. A folder comes after what it holds. A link is no
        folder, whatever it leads to.

    Raises:
        StorageError: a folder cannot be listed.
    """
    yield from _walk(folder, "")


def _walk(folder: str, inner: str) -> Iterator[tuple[str, bool]]:
    path = os.path.join(folder, inner)
    try:
        with os.scandir(path) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError as error:
        raise_listing_error(error)
        return
    for entry in entries:
        name = f"{inner}/{entry.name}" if inner else entry.name
        is_folder = entry.is_dir(follow_symlinks=False)
        if is_folder:
            yield from _walk(folder, name)
        yield name, is_folder


def require_own_list(path: str, columns: Sequence[str]) -> None:
    """Require that a CSV file that is about to be written is absent, or holds a list of these columns.

    Args:
        path: path or URL of the file.
        columns: names of its columns, which are its first line.

    Raises:
        ConfigError: there is another file.
        StorageError: it cannot be read.
    """
    if not file_exists(path):
        return
    with open_seekable(path) as file:
        first_line = file.readline().decode("utf-8", "replace").strip()
    if first_line != ",".join(columns):
        raise ConfigError(f"{path!r} exists and is no list of {', '.join(columns)}: choose another name")
