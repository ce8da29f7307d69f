"""What lies inside a folder, and what leads out of it: names with `..` or a scheme, and symbolic links.

A gallery may come from anybody. Its log, its manifest and its folders name files, and each name becomes a path. So
every part of every name is checked, and nothing is read or written through a link below the gallery's own folders.
"""

import os
import re
from collections.abc import Iterator

from facepipe.errors import StorageError
from facepipe.storage.error_text import describe_error
from facepipe.storage.urls import is_remote

# One part of a name. Percent signs are left out because some readers decode names and others do not. Colons are left
# out because of schemes and drives, backslashes because of systems that take them for slashes.
_PART = re.compile(r"[^\x00-\x1f\x7f%:/\\]+")
_DOTS = frozenset({".", ".."})


def is_inside(name: str) -> bool:
    """Tell whether a name, joined to a folder, names a file in that folder whatever reads the name."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return all(_PART.fullmatch(part) and part not in _DOTS for part in name.split("/"))


def require_inside(name: str, what: str) -> None:
    """Raise StorageError for a name that may lead out of its folder.

    Args:
        name: the name as it was read.
        what: what names it, for the message.
    """
    if not is_inside(name):
        raise StorageError(f"{what} names {name!r}, which may lead out of its folder; nothing of it is read")


def is_link(path: str) -> bool:
    """Tell whether a path is a symbolic link, whatever it leads to. URLs are none."""
    return not is_remote(path) and os.path.islink(path)


def find_link(folder: str, name: str) -> str | None:
    """Find the first part of a name below a folder that is a link.

    Args:
        folder: a local folder or a URL. The folder itself may be a link.
        name: the name in it; it may hold slashes.

    Returns:
        The path of the link; None if there is none.
    """
    if is_remote(folder):
        return None
    path = folder
    for part in name.split("/"):
        path = os.path.join(path, part)
        if os.path.islink(path):
            return path
    return None


def require_no_link(folder: str, name: str) -> None:
    """Raise StorageError if a file or folder below a folder is a link, or lies behind one."""
    link = find_link(folder, name)
    if link is not None:
        raise make_link_error(link)


def make_link_error(path: str) -> StorageError:
    """Make the error for a link in a place where facepipe follows none."""
    return StorageError(
        f"{path!r} is a link, and a gallery must not lead out of itself: replace the link by what it leads to"
    )


def iterate_links(folder: str) -> Iterator[str]:
    """Iterate over the links below a folder, by name in it, without following any. URLs have none.

    Raises:
        StorageError: a folder cannot be listed.
    """
    if is_remote(folder):
        return
    pending = [""]
    while pending:
        inner = pending.pop()
        try:
            with os.scandir(os.path.join(folder, inner)) as entries:
                for entry in entries:
                    # The kind of an entry comes with the listing, so that nothing is looked up for each file.
                    name = f"{inner}/{entry.name}" if inner else entry.name
                    if entry.is_symlink():
                        yield name
                    elif entry.is_dir(follow_symlinks=False):
                        pending.append(name)
        except FileNotFoundError:
            continue
        except OSError as error:
            path = os.path.join(folder, inner)
            raise StorageError(f"cannot list {path!r}: {describe_error(error)}") from error
