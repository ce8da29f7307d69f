"""Aliases of folders whose paths a library would misread, such as one below `My%20Photos`.

deltalake decodes %-escapes in a path, and takes a backslash for a slash. pyarrow and faiss take no path that is not
UTF-8. An alias is a symbolic link with a plain path, in the cache of this machine.
"""

import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import suppress

from facepipe.errors import StorageError
from facepipe.hashing import hash64
from facepipe.storage.cache import get_cache_folder, make_private
from facepipe.storage.error_text import describe_error
from facepipe.storage.urls import is_remote

# What deltalake reads as it is written: no percent sign, backslash, control character or byte that is not UTF-8.
_PLAIN = re.compile("[^%\\\\\x00-\x1f\x7f\ud800-\udfff]*")
_LOG = "_delta_log"
_FOLDER = "folder"


def find_table_path(folder: str) -> str:
    """Find the path by which deltalake can open a table: that of its folder, or of an alias.

    deltalake follows links to a table. So only the log, which is all that deltalake reads and writes, is behind a link.

    Args:
        folder: path or URL of the table.
    """
    if is_remote(folder):
        return folder
    real_path = os.path.realpath(folder)
    if _PLAIN.fullmatch(real_path):
        return folder
    return os.path.dirname(_make_alias(os.path.join(real_path, _LOG), _LOG))


def find_utf8_path(folder: str) -> str:
    """Find a path of a local folder that is UTF-8: its own, or that of an alias. A URL stays as it is."""
    try:
        folder.encode()
        return folder
    except UnicodeEncodeError:
        return _make_alias(os.path.abspath(folder), _FOLDER)


def find_utf8_output(path: str) -> str:
    """Find a path of a file or folder to be written whose folder's path is UTF-8; its own name has to be."""
    folder, name = os.path.split(path.rstrip("/"))
    return os.path.join(find_utf8_path(folder), name) if os.path.isdir(folder) else path


def _make_alias(target: str, name: str) -> str:
    """Make a link to a path in a folder of its own, unless it is there; return its path."""
    reason = "no place for it"
    for cache in _list_places():
        # The hash names the folder, so that every process finds the same one.
        folder = os.path.join(cache, f"{hash64(target):016x}")
        link = os.path.join(folder, name)
        try:
            os.makedirs(os.path.dirname(cache), mode=0o700, exist_ok=True)
            make_private(cache)
            make_private(folder)
            if not _is_link_to(link, target):
                # Another process may make the same link: a rename replaces one by the other.
                unfinished = f"{link}.{secrets.token_hex(4)}"
                os.symlink(target, unfinished)
                os.replace(unfinished, link)
            return link
        except OSError as error:
            reason = describe_error(error)
    raise StorageError(
        f"{target!r} holds characters that the table's library misreads, and an alias cannot be made ({reason}): set "
        "FACEPIPE_CACHE to a folder of yours without such characters"
    )


def _list_places() -> Iterator[str]:
    """Yield the folders in which aliases may be made: in the cache, or else among the temporary files."""
    places = (
        os.path.join(os.path.realpath(get_cache_folder()), "aliases"),
        os.path.join(os.path.realpath(tempfile.gettempdir()), f"facepipe-{os.geteuid()}"),
    )
    return (place for place in places if _PLAIN.fullmatch(place))


def _is_link_to(link: str, target: str) -> bool:
    with suppress(OSError):
        return os.readlink(link) == target
    return False
