"""Write local files whole or not at all: under another name beside them first, then renamed.

A reader sees the old file or the new one. A process that is killed leaves at most a file with the ending `.new`.
"""

import ctypes
import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from facepipe.errors import StorageError
from facepipe.storage.error_text import describe_error

# Ending of files that are not finished; whoever lists a folder can leave them out.
UNFINISHED = ".new"
# Ending of files that get their name by a link; a killed process may leave them.
_TEMPORARY = ".tmp"

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# A file system or a C library without the call.
_CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.EOPNOTSUPP)


@contextmanager
def replace_file(path: str, *, sync: bool = False, unique: bool = False, what: str = "") -> Iterator[str]:
    """Yield a path beside a file to write to; it takes the file's place when the block ends without an error.

    Args:
        path: the file that is created or replaced.
        sync: have the content on disk before the file gets its name, and the name before the block returns.
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
    """Give a file that was written under another name its own; with `sync` both are on disk afterwards."""
    if sync:
        sync_file(unfinished)
    os.replace(unfinished, path)
    if sync:
        _sync_entries(os.path.dirname(path))


def create_file(path: str, data: bytes) -> bool:
    """Create a file that is on disk before anyone can see it.

    Of several processes that create the same file at once, one succeeds. No locks are needed for that, so it works on
    network file systems too.

    Args:
        path: the file; its folder must be there.
        data: the content.

    Returns:
        Whether the file was created; False if there is one.

    Raises:
        OSError: the file system refuses, for example because it has no hard links.
    """
    unfinished = f"{path}.{secrets.token_hex(4)}{_TEMPORARY}"
    try:
        with open(unfinished, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # Unlike a rename, a link never replaces what is there.
        try:
            os.link(unfinished, path)
        except FileExistsError:
            # A network file system may have made the link and lost the answer. Then the content has two names.
            if os.stat(unfinished).st_nlink != 2:
                return False
    finally:
        with suppress(FileNotFoundError):
            os.unlink(unfinished)
    _sync_entries(os.path.dirname(path))
    return True


def make_folders(path: str) -> None:
    """Make a folder and its parents if there are none; new ones survive a power cut.

    Raises:
        OSError: a folder cannot be made.
    """
    # Find out which folders are new. A parent's entry for a new folder has to be synced, too.
    missing: list[str] = []
    folder = os.path.abspath(path)
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    os.makedirs(path, exist_ok=True)
    for folder in reversed(missing):
        _sync_entries(os.path.dirname(folder))


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
    """Have the entries of a folder on disk, so that new, renamed and deleted files stay so after a power cut."""
    try:
        _sync_entries(path)
    except OSError as error:
        raise StorageError(f"cannot write {path!r}: {describe_error(error)}") from error


def _sync_entries(folder: str) -> None:
    try:
        descriptor = os.open(folder or ".", os.O_RDONLY)
    except PermissionError:
        return  # a folder that may be written to and not read cannot be synced
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot sync a folder; they write its entries at once.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_disks(*folders: str) -> None:
    """Have everything that was written to the disks of some folders survive a power cut, deletions included.

    Args:
        folders: local folders; those that do not exist are left out.

    Raises:
        StorageError: something that was written cannot be brought to disk.
    """
    synced: set[int] = set()
    for folder in folders:
        try:
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                # One call does a whole disk, so each disk is synced once.
                device = os.fstat(descriptor).st_dev
                if device not in synced:
                    _sync_disk(descriptor)
                synced.add(device)
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise StorageError(f"cannot write {folder!r}: {describe_error(error)}") from error


def _sync_disk(descriptor: int) -> None:
    """Sync the disk of an open folder; all disks on a system that cannot sync one."""
    sync_one = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if sync_one is None:
        os.sync()
    elif sync_one(descriptor):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def swap_folders(new: str, current: str) -> None:
    """Let two folders change places in one step: afterwards `current` is the new one, and `new` the former one.

    If there is no current folder, the new one is renamed.

    Raises:
        OSError: there is no new folder. The current one then stays.
    """
    if not os.path.isdir(new):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), new)
    try:
        _exchange(new, current)
    except FileNotFoundError:
        os.rename(new, current)  # there is no current folder, or no new one any more
    except OSError as error:
        if error.errno not in _CANNOT_EXCHANGE:
            raise
        _swap_by_renaming(new, current)


def _exchange(new: str, current: str) -> None:
    """Exchange two names by the system's call for it."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if call(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(current), _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), new)


def _swap_by_renaming(new: str, current: str) -> None:
    """Exchange two names on a file system that cannot do it in one step; a kill leaves the former one as `.old`."""
    aside = current + ".old"
    os.rename(current, aside)
    try:
        os.rename(new, current)
    except OSError:
        os.rename(aside, current)
        raise
    os.rename(aside, new)
