"""Small files that several processes write: a write names what it replaces, and of two at once one is refused.

Object stores do this by conditional requests (If-Match, If-None-Match). On local disks the writers hold a lock on a
file beside the file. Some stores accept conditions and ignore them, and some file systems do so with locks. So both are
seen before the first write, once per bucket or disk and process.
"""

import errno
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from facepipe.errors import StorageError
from facepipe.storage.atomic import create_file, open_for_writing
from facepipe.storage.client import open_bucket
from facepipe.storage.error_text import describe_error
from facepipe.storage.files import delete, replace
from facepipe.storage.locks import GUARD, PROBE, require_locks
from facepipe.storage.urls import is_remote, join, split_url

# What a file system without hard links answers to a request for one.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
# Client of each bucket whose store was seen to compare tags. Another endpoint has another client.
_proven: dict[str, Any] = {}
# A write takes milliseconds, and some seconds on a disk that is very busy.
_MAX_GUARD_SECONDS = 60.0
_GUARD_POLL_SECONDS = 0.01


class ConflictError(StorageError):
    """Another writer changed a file first."""


def read_tagged(path: str) -> tuple[bytes, str] | None:
    """Read a small file or object together with the tag of its content; None if there is none.

    The tag is different for every other content. `write_if` replaces the content by it.
    """
    if is_remote(path):
        return _read_tagged_remote(path)
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError as error:
        # A link that leads nowhere, such as to a disk that is not mounted, does not mean that there is no file.
        folder = os.path.dirname(path)
        if os.path.islink(path) or (os.path.islink(folder) and not os.path.isdir(folder)):
            raise StorageError(f"cannot read {path!r}: it is behind a link that leads nowhere") from error
        return None
    except OSError as error:
        raise StorageError(f"cannot read {path!r}: {describe_error(error)}") from error
    return data, _hash_content(data)


def _read_tagged_remote(path: str) -> tuple[bytes, str] | None:
    import obstore

    bucket, key = split_url(path)
    try:
        result = obstore.get(open_bucket(bucket), key)
        return bytes(result.bytes()), str(result.meta["e_tag"])
    except FileNotFoundError:
        return None
    except (obstore.exceptions.BaseError, OSError) as error:
        raise StorageError(f"cannot read {path!r}: {describe_error(error)}") from error


def write_if(path: str, data: bytes, tag: str | None) -> str:
    """Replace the content that has a tag, or create the file.

    Args:
        path: local path or URL.
        data: the new content. It must differ from everything that any other writer writes there.
        tag: tag of the content to replace; None if there must be none.

    Returns:
        The tag of the new content.

    Raises:
        ConflictError: the content has another tag. Of several writers at once one succeeds.
        StorageError: the file cannot be written, or the place cannot keep two writers apart.
    """
    if is_remote(path):
        _require_conditions(path.rpartition("/")[0])
        return _write_if_remote(path, data, tag)
    return _write_if_local(path, data, tag)


def create(path: str, data: bytes) -> None:
    """Create a small file or object. It is on disk before anyone can see it, and no lock is needed.

    Args:
        path: local path, whose folder must be there, or URL.
        data: the content. It must differ from everything that any other writer writes there.

    Raises:
        ConflictError: there is one. Of several writers at once one succeeds.
        StorageError: the file cannot be written, or the store cannot keep two writers apart.
    """
    if is_remote(path):
        _require_conditions(path.rpartition("/")[0])
        _write_if_remote(path, data, None)
        return
    try:
        is_new = create_file(path, data)
    except OSError as error:
        hint = " (does this file system have hard links?)" if error.errno in _NO_LINKS else ""
        raise StorageError(f"cannot write {path!r}: {describe_error(error)}{hint}") from error
    if not is_new:
        raise ConflictError(f"{path!r} was written by another writer")


def _write_if_remote(path: str, data: bytes, tag: str | None) -> str:
    import obstore

    bucket, key = split_url(path)
    mode: Any = "create" if tag is None else {"e_tag": tag}
    # The store itself compares the tag, so no other writer can come in between.
    try:
        return str(obstore.put(open_bucket(bucket), key, data, mode=mode)["e_tag"])
    except (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError) as error:
        # If the answer to a successful write is lost, the client retries it, and the store refuses the retry.
        current = read_tagged(path)
        if current is not None and current[0] == data:
            return current[1]
        raise ConflictError(f"{path!r} was changed by another writer") from error
    except (obstore.exceptions.BaseError, OSError) as error:
        raise StorageError(f"cannot write {path!r}: {describe_error(error)}") from error


def _write_if_local(path: str, data: bytes, tag: str | None) -> str:
    try:
        require_locks(os.path.dirname(path) or ".")
        with _lock(path):
            _require_tag(path, tag)
            replace(path, data)
    except OSError as error:
        raise StorageError(f"cannot write {path!r}: {describe_error(error)}") from error
    return _hash_content(data)


def delete_if(path: str, tag: str) -> None:
    """Delete a local file whose content has a tag, and the file on which its writers hold a lock.

    Args:
        path: local path.
        tag: tag of the content.

    Raises:
        ConflictError: the content has another tag.
    """
    try:
        with _lock(path):
            _require_tag(path, tag)
            os.unlink(path)
            os.unlink(path + GUARD)
    except OSError as error:
        raise StorageError(f"cannot delete {path!r}: {describe_error(error)}") from error


@contextmanager
def _lock(path: str) -> Iterator[None]:
    """Hold the lock on a file beside a file, so that comparing and writing are one step; a crash frees it."""
    while True:
        with open(open_for_writing(path + GUARD), "w") as guard:
            lock_guard(guard, path)
            # Somebody may have deleted the file meanwhile, and then a lock on it excludes nobody.
            if not _is_at(guard.fileno(), path + GUARD):
                continue
            yield
            return


def lock_guard(guard: IO[str], path: str) -> None:
    """Lock a file that guards others. A crash of the holder frees it.

    Args:
        guard: the file, open.
        path: what it guards, for the message.

    Raises:
        StorageError: another process keeps it for too long, because that process is stopped.
    """
    deadline = time.monotonic() + _MAX_GUARD_SECONDS
    while True:
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise StorageError(
                    f"cannot write {path!r}: for {_MAX_GUARD_SECONDS:g} s another process has been in the middle of "
                    "writing there; if that process is stopped, continue it or end it"
                ) from error
        time.sleep(_GUARD_POLL_SECONDS)


def _is_at(descriptor: int, path: str) -> bool:
    """Tell whether a path leads to an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _require_tag(path: str, tag: str | None) -> None:
    current = read_tagged(path)
    if (current[1] if current else None) != tag:
        raise ConflictError(f"{path!r} was changed by another writer")


def _hash_content(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def require_usable_place(folder: str) -> None:
    """Require of a gallery's place all that writing to it needs. Nothing is left there.

    Args:
        folder: path or URL. If a local folder does not exist yet, the nearest one above it is checked.

    Raises:
        StorageError: the place must not hold a gallery, or cannot be written to.
    """
    if is_remote(folder):
        _require_conditions(folder)
        return
    folder = os.path.abspath(folder)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    path = os.path.join(folder, PROBE + secrets.token_hex(8))
    try:
        require_locks(folder)
        create(path, b"")
    except OSError as error:
        raise StorageError(f"cannot write to {folder!r}: {describe_error(error)}") from error
    finally:
        with suppress(OSError):
            os.unlink(path)


def _require_conditions(prefix: str) -> None:
    """Write a small object below a prefix, and delete it, to see that its store compares tags."""
    bucket = split_url(prefix)[0]
    client = open_bucket(bucket)
    if _proven.get(bucket) is client:
        return
    path = join(prefix, PROBE + secrets.token_hex(8))
    # Of four writes two must succeed, and two must be refused.
    try:
        tag = _write_if_remote(path, b"first", None)
        _require_conflict(path, b"second", None, "If-None-Match")
        _write_if_remote(path, b"third", tag)
        _require_conflict(path, b"fourth", tag, "If-Match")
    finally:
        with suppress(StorageError):  # a bucket that lets nobody delete: what was seen above matters more
            delete(path)
    _proven[bucket] = client


def _require_conflict(path: str, data: bytes, tag: str | None, header: str) -> None:
    """Write under a condition that does not hold; raise StorageError if the store writes all the same."""
    try:
        _write_if_remote(path, data, tag)
    except ConflictError:
        return
    raise StorageError(
        f"the object store of {split_url(path)[0]} ignores {header}, so two runs could overwrite each other's work: "
        "use a store, or a version of it, with conditional writes (docs/operations.md)"
    )
