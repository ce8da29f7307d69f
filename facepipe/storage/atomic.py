"""Write local files whole or not at all: under another name beside them first, then renamed.

A reader sees the old file or the new one. A process that is killed leaves at most a file with the ending `.new`.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from facepipe.errors import StorageError
from facepipe.storage.error_text import describe_error

# Ending of files that are not finished; whoever lists a folder can leave them out.
UNFINISHED = ".new"


@contextmanager
def replace_file(path: str, *, sync: bool = False, unique: bool = False, what: str = "") -> Iterator[str]:
    """Yield a path beside a file to write to; it takes the file's place when the block ends without an error.

    Args:
        path: the file that is created or replaced.
        sync: have the content on disk before the file gets its name.
        unique: give each writer a name of its own, if several may write the same file at once.
        what: what the file is, for the error message, such as "report".

    Raises:
        StorageError: an operation of the file system failed in the block, or when the file was renamed.
    """
    try:
        with write_beside(path, sync=sync, unique=unique) as unfinished:
            yield unfinished
    except OSError as error:
        target = f"the {what} {path!r}" if what else repr(path)
        raise StorageError(f"cannot write {target}: {describe_error(error)}") from error


@contextmanager
def write_beside(path: str, *, sync: bool = False, unique: bool = False) -> Iterator[str]:
    """Do as `replace_file`, but let an OSError pass. If the block deletes what it wrote, the file stays as it was."""
    unfinished = f"{path}.{secrets.token_hex(4)}{UNFINISHED}" if unique else path + UNFINISHED
    _refuse_link(unfinished)
    try:
        # The block may have deleted its file, and then nothing is published.
        yield unfinished
        if os.path.exists(unfinished):
            publish_file(unfinished, path, sync=sync)
    # On any error, also an interruption, the unfinished file goes.
    except BaseException:
        with suppress(OSError):
            os.unlink(unfinished)
        raise


def publish_file(unfinished: str, path: str, *, sync: bool) -> None:
    """Give a file that was written under another name its own."""
    if sync:
        sync_file(unfinished)
    os.replace(unfinished, path)


def open_for_writing(path: str, flags: int = 0) -> int:
    """Open a file to write to, and create it if there is none. What a link leads to is not opened.

    Args:
        path: the file.
        flags: more flags of `os.open`, such as O_TRUNC. Without that flag the content stays, as in a lock file.

    Returns:
        The descriptor.

    Raises:
        StorageError: the path is a link.
        OSError: the file cannot be opened.
    """
    _refuse_link(path)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o666)


def _refuse_link(path: str) -> None:
    """Raise StorageError for a link: whoever planted it would choose which file is overwritten."""
    if os.path.islink(path):
        raise StorageError(f"{path!r} is a link, and facepipe writes nothing through links: delete the link")


def sync_file(path: str) -> None:
    """Have the content of a file on disk (fsync)."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: str) -> None:
    """Have the entries of a folder on disk, so that new and renamed files survive a power cut."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StorageError(f"cannot write {path!r}: {describe_error(error)}") from error
