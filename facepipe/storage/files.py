"""Bytes in and out of a local disk or an object store: every function takes a path or a URL.

Object stores go through `obstore`, which lists as a stream: a prefix of a hundred million keys is never held in memory.
"""

import io
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from facepipe.errors import StorageError
from facepipe.storage.atomic import make_folders, open_for_writing, replace_file
from facepipe.storage.client import open_bucket
from facepipe.storage.error_text import describe_error
from facepipe.storage.urls import is_remote, join, split_url

# Bytes per request when a container in a store is read piece by piece.
_REMOTE_BUFFER = 1 << 18
# The same if it is read from its beginning to its end.
_SEQUENTIAL_BUFFER = 48 << 20
# Bytes of the first request: often only the beginning of a container is read, to see whether it holds an image.
_FIRST_BYTES = 1 << 20
# Objects per page of a listing.
_LIST_CHUNK = 1000
# Objects that S3 deletes by one request, at most.
DELETE_BATCH = 1000
# Most bytes that Linux reads in one call, which is 4 kB less than 2 GiB.
_MAX_READ = 0x7FFFF000


class Entry(NamedTuple):
    """One file or object of a listing.

    Attributes:
        url: Its path or URL.
        size: Bytes.
        fingerprint: A text that changes with the content.
        modified: When it was last written, in seconds since 1970 by the clock of the machine or store that holds it.
    """

    url: str
    size: int
    fingerprint: str
    modified: float = 0.0


class TooLargeError(StorageError):
    """There are more bytes than the limit allows."""


class ReplacedError(StorageError):
    """The file is not the one that was listed: it was written since."""


class NoSuchFileError(StorageError):
    """There is no file or object of this name."""


# ---- listing and looking


def list_files(folder: str) -> Iterator[Entry]:
    """List every file below a folder or prefix; nothing if there is no such folder.

    Raises:
        StorageError: the folder, or one in it, cannot be listed. It is never taken for an empty one.
    """
    if is_remote(folder):
        yield from list_prefix(folder.rstrip("/") + "/")
        return
    # A sorted walk, so that each listing of the same folder has the same order.
    for parent, folders, names in os.walk(folder, onerror=raise_listing_error):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(parent, name)
            try:
                info = os.lstat(path)
            except FileNotFoundError:  # deleted since it was listed
                continue
            except OSError as error:
                raise StorageError(f"cannot list {path!r}: {describe_error(error)}") from error
            yield Entry(path, info.st_size, get_local_fingerprint(info), info.st_mtime)


def raise_listing_error(error: OSError) -> None:
    """Raise StorageError for a folder that cannot be listed, unless there is none.

    A link that leads nowhere is no empty folder: the disk that it leads to may not be mounted.
    """
    path = os.fsdecode(error.filename).rstrip("/") or "/"
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError:
        pass  # the first error says more
    raise StorageError(f"cannot list {path!r}: {describe_error(error)}") from error


def list_prefix(url: str, after: str = "") -> Iterator[Entry]:
    """List every object under a prefix as a stream in the store's order, or the one object of that name.

    Args:
        url: the prefix.
        after: name below the prefix behind which the listing begins.
    """
    import obstore

    bucket, prefix = split_url(url)
    is_empty = True
    try:
        offset = prefix + after if after else None
        for batch in obstore.list(open_bucket(bucket), prefix=prefix or None, offset=offset, chunk_size=_LIST_CHUNK):
            for meta in batch:
                is_empty = False
                yield to_entry(bucket, meta)
    except obstore.exceptions.BaseError as error:
        raise StorageError(f"cannot list {url}: {describe_error(error)}") from error
    # The prefix may be the full name of one object, which some stores do not list.
    if is_empty and prefix and not url.endswith("/"):
        with suppress(NoSuchFileError):
            yield get_entry(url)


def list_names(folder: str, after: str = "") -> Iterable[str]:
    """List the names in a folder, in no order; none if there is no such folder.

    In an object store the names are keys relative to the prefix, those of deeper objects included.

    Args:
        folder: local folder or prefix.
        after: only names that come after this one are listed.
    """
    if is_remote(folder):
        start = len(folder.rstrip("/")) + 1
        return [entry.url[start:] for entry in list_prefix(folder.rstrip("/") + "/", after)]
    try:
        return [name for name in os.listdir(folder) if name > after]
    except OSError as error:
        raise_listing_error(error)
        return []


def get_entry(path: str | bytes) -> Entry:
    """Get size and fingerprint of one file or object.

    Raises:
        NoSuchFileError: there is none.
        StorageError: it cannot be looked up.
    """
    if is_remote(path):
        import obstore

        bucket, key = split_url(os.fsdecode(path))
        try:
            meta = obstore.head(open_bucket(bucket), key)
        except (obstore.exceptions.NotFoundError, FileNotFoundError) as error:
            raise NoSuchFileError(describe_error(error)) from error
        except (obstore.exceptions.BaseError, OSError) as error:
            raise StorageError(describe_error(error)) from error
        return to_entry(bucket, meta)
    try:
        info = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NoSuchFileError(describe_error(error)) from error
    except (OSError, ValueError) as error:
        raise StorageError(describe_error(error)) from error
    return Entry(os.fsdecode(path), info.st_size, get_local_fingerprint(info), info.st_mtime)


def to_entry(bucket: str, meta: Any) -> Entry:
    """Make the entry of an object from what the client says of it."""
    fingerprint = f"{meta['size']}-{meta['e_tag']}"
    return Entry(f"{bucket}/{meta['path']}", meta["size"], fingerprint, meta["last_modified"].timestamp())


def get_local_fingerprint(info: os.stat_result) -> str:
    """Join size and modification time of a local file to a fingerprint."""
    return f"{info.st_size}-{info.st_mtime_ns}"


def file_exists(path: str) -> bool:
    """Tell whether there is a file or an object of this name. Raises StorageError if that cannot be looked up."""
    try:
        get_entry(path)
    except NoSuchFileError:
        return False
    except StorageError as error:
        raise StorageError(f"cannot look up {path!r}: {error}") from error
    return True


def folder_exists(path: str) -> bool:
    """Tell whether there is a folder, or a prefix with at least one object.

    Raises:
        StorageError: that cannot be looked up.
    """
    if is_remote(path):
        return next(iter(list_prefix(path.rstrip("/") + "/")), None) is not None
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise StorageError(f"cannot look up {path!r}: {describe_error(error)}") from error


def may_exist(path: str) -> bool:
    """Tell whether there is a local file or folder; a URL is not looked up and may always exist."""
    return is_remote(path) or os.path.exists(path)


def is_special_file(path: str) -> bool:
    """Tell whether a path leads to a device, FIFO or socket. Opening one may block, or set something off.

    Raises:
        StorageError: there is no such file.
    """
    if is_remote(path):
        return False
    try:
        return is_special_mode(os.stat(path).st_mode)
    except (OSError, ValueError) as error:
        raise StorageError(describe_error(error)) from error


def is_special_mode(mode: int) -> bool:
    """Tell whether a file's mode is that of a device, FIFO or socket."""
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


# ---- reading


def read(
    path: str | bytes,
    offset: int | None = None,
    length: int | None = None,
    limit: int | None = None,
    fingerprint: str | None = None,
) -> bytes:
    """Read a file or object, or a part of it.

    Args:
        path: local path or URL.
        offset: first byte; 0 by default.
        length: bytes to read; all by default.
        limit: most bytes to read. More are refused before anything is read.
        fingerprint: fingerprint that the file must have; any by default. An offset means nothing in another file.

    Raises:
        TooLargeError: there are more bytes than `limit`.
        ReplacedError: the file has another fingerprint.
        StorageError: the file cannot be read, or ends before `length` bytes.
    """
    if is_remote(path):
        return _read_remote(path, offset, length, limit, fingerprint)
    return _read_local(path, offset, length, limit, fingerprint)


def _read_local(
    path: str | bytes, offset: int | None, length: int | None, limit: int | None, fingerprint: str | None
) -> bytes:
    try:
        # O_NONBLOCK: opening a FIFO without a writer would block for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        # Unbuffered: the file is read in as few calls as can be, and a buffer would copy it.
        with open(descriptor, "rb", buffering=0) as file:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode):
                raise StorageError("is a directory" if stat.S_ISDIR(info.st_mode) else "not a regular file")
            _require_fingerprint(get_local_fingerprint(info), fingerprint)
            expected = info.st_size if length is None else length
            _check_limit(expected, limit)
            file.seek(offset or 0)
            data = _require_length(_read_up_to(file, expected), expected)
            # The file may be written in its place while it is read, so look again.
            _require_fingerprint(get_local_fingerprint(os.fstat(descriptor)), fingerprint)
            return data
    except (OSError, ValueError) as error:
        raise StorageError(describe_error(error)) from error


def _read_up_to(file: io.FileIO, length: int) -> bytes:
    """Read so many bytes, or all that are left. One call of the system may return fewer, and never 2 GiB."""
    parts = []
    remaining = length
    while remaining:
        part = file.read(min(remaining, _MAX_READ))
        if not part:
            break
        parts.append(part)
        remaining -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _read_remote(
    path: str | bytes, offset: int | None, length: int | None, limit: int | None, fingerprint: str | None
) -> bytes:
    import obstore

    bucket, key = split_url(os.fsdecode(path))
    start = offset or 0
    try:
        # A range is checked before it is requested, a whole object as soon as its size is known.
        if length is not None:
            _check_limit(length, limit)
            if not length:
                return b""
            # The answer to one request is of one version of the object, and says of which.
            result = obstore.get(open_bucket(bucket), key, options={"range": (start, start + length)})
            _require_fingerprint(to_entry(bucket, result.meta).fingerprint, fingerprint)
            return _require_length(bytes(result.bytes()), length)
        result = obstore.get(open_bucket(bucket), key)
        _require_fingerprint(to_entry(bucket, result.meta).fingerprint, fingerprint)
        _check_limit(result.meta["size"], limit)
        return bytes(result.bytes())
    except (obstore.exceptions.BaseError, OSError) as error:
        raise StorageError(describe_error(error)) from error


def _check_limit(size: int, limit: int | None) -> None:
    if limit is not None and size > limit:
        raise TooLargeError(f"{size} bytes, the limit is {limit}")


def _require_fingerprint(actual: str, expected: str | None) -> None:
    if expected is not None and actual != expected:
        raise ReplacedError("the file was replaced after it was listed")


def _require_length(data: bytes, expected: int) -> bytes:
    if len(data) != expected:
        raise StorageError(f"truncated: {len(data)} of {expected} bytes")
    return data


def open_seekable(path: str | bytes, *, is_sequential: bool = False) -> BinaryIO:
    """Open a seekable binary file object, for readers of containers (tar, Parquet).

    Args:
        path: path or URL of the file.
        is_sequential: whether it is read from its beginning to its end. An object is requested in large ranges then.
    """
    try:
        if is_remote(path):
            size = _SEQUENTIAL_BUFFER if is_sequential else _REMOTE_BUFFER
            return io.BufferedReader(_RemoteFile(os.fsdecode(path)), size)
        return open(path, "rb")
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot open {os.fsdecode(path)!r}: {describe_error(error)}") from error


def get_open_fingerprint(file: BinaryIO) -> str:
    """Get the fingerprint of a file that `open_seekable` opened, whatever its name leads to by now."""
    remote = getattr(file, "raw", None)
    if isinstance(remote, _RemoteFile):
        return remote.fingerprint
    return get_local_fingerprint(os.fstat(file.fileno()))


# The size is read once at opening; the buffer above this class joins small reads.
class _RemoteFile(io.RawIOBase):
    """An object of a store that is read by ranges, all of them of the version that was opened.

    Attributes:
        fingerprint: fingerprint of that version.
    """

    def __init__(self, url: str):
        entry = get_entry(url)
        self.fingerprint = entry.fingerprint
        self._path = url.encode()
        self._size = entry.size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        # Positions are kept here: no request is made until bytes are read.
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, offset + origin)
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), max(0, self._size - self._position))
        if self._position == 0:
            length = min(length, _FIRST_BYTES)
        if length:
            buffer[:length] = _read_remote(self._path, self._position, length, None, self.fingerprint)
            self._position += length
        return length


# ---- writing and deleting


def write(path: str, data: bytes, *, sync: bool = True) -> None:
    """Write a whole file or object.

    Args:
        path: local path or URL.
        data: the content.
        sync: have a local file on disk (fsync) before this returns.
    """
    try:
        if is_remote(path):
            _write_remote(path, data)
        else:
            _write_local(path, data, sync)
    except OSError as error:
        raise StorageError(f"cannot write {path!r}: {describe_error(error)}") from error


def _write_remote(path: str, data: bytes | Path) -> None:
    import obstore

    bucket, key = split_url(path)
    try:
        obstore.put(open_bucket(bucket), key, data)
    except (obstore.exceptions.BaseError, OSError) as error:
        raise StorageError(f"cannot write {path!r}: {describe_error(error)}") from error


def _write_local(path: str, data: bytes, sync: bool) -> None:
    # Through a link the bytes would replace a file somewhere else.
    descriptor = open_for_writing(path, os.O_TRUNC)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
    except OSError:
        # The disk is full: half a file is of no use, and takes the space that is left.
        with suppress(OSError):
            os.unlink(path)
        raise


def replace(path: str, data: bytes, *, unique: bool = False) -> None:
    """Write a file or object so that readers see the old content or the new; afterwards it survives a power cut.

    Args:
        path: local path or URL; the folder of a local file is made.
        data: the content.
        unique: several processes may write this file at once.
    """
    if is_remote(path):
        write(path, data)
        return
    make_parent_folder(path)
    with replace_file(path, sync=True, unique=unique) as unfinished:
        _write_local(unfinished, data, sync=False)


def write_file(path: str, local: str) -> None:
    """Write the content of a local file as a file or an object, in parts if it is long."""
    if is_remote(path):
        _write_remote(path, Path(local))
        return
    with open(local, "rb") as file:
        write(path, file.read())


def make_folder(path: str) -> None:
    """Make a local folder and its parents; new ones survive a power cut. Object stores have no folders."""
    if is_remote(path):
        return
    try:
        make_folders(path)
    except OSError as error:
        raise StorageError(f"cannot write {path!r}: {describe_error(error)}") from error


def make_parent_folder(path: str) -> None:
    """Make the folder of a local file. Object stores have no folders."""
    if not is_remote(path):
        make_folder(os.path.dirname(path) or ".")


def delete(path: str) -> None:
    """Delete a file or an object; it is no error if there is none."""
    try:
        if is_remote(path):
            import obstore

            bucket, key = split_url(path)
            with suppress(FileNotFoundError):
                obstore.delete(open_bucket(bucket), key)
            return
        with suppress(FileNotFoundError):
            os.unlink(path)
    except OSError as error:
        raise StorageError(f"cannot delete {path!r}: {describe_error(error)}") from error
    except Exception as error:
        if type(error).__module__.startswith("obstore"):
            raise StorageError(f"cannot delete {path!r}: {describe_error(error)}") from error
        raise


def delete_many(paths: Iterable[str], before_batch: Callable[[], None] = lambda: None) -> None:
    """Delete files or objects, a thousand objects per request; it is no error if one is not there.

    Args:
        paths: local paths or URLs.
        before_batch: called before each batch. If it raises, the rest stays.

    Raises:
        StorageError: one cannot be deleted.
    """
    remaining = iter(paths)
    while batch := list(islice(remaining, DELETE_BATCH)):
        before_batch()
        remote = [path for path in batch if is_remote(path)]
        for path in batch:
            if not is_remote(path):
                delete(path)
        if remote:
            _delete_objects(remote)


def _delete_objects(urls: list[str]) -> None:
    """Delete objects by one request per bucket, or one by one in a store that has no such request."""
    import obstore

    keys: dict[str, list[str]] = {}
    for url in urls:
        bucket, key = split_url(url)
        keys.setdefault(bucket, []).append(key)
    for bucket, names in keys.items():
        try:
            obstore.delete(open_bucket(bucket), names)
        # An object that is not there, or no support for the request: which of them it is shows one by one.
        except (obstore.exceptions.BaseError, OSError):
            for name in names:
                delete(f"{bucket}/{name}")


def delete_empty_folders(folder: str, keep: str = "") -> None:
    """Delete the empty folders below a local folder, except the one called `keep`. Object stores have no folders."""
    if is_remote(folder) or not os.path.isdir(folder):
        return
    for name in os.listdir(folder):
        if name == keep:
            continue
        for path, _, _ in os.walk(join(folder, name), topdown=False):
            # It is not empty, or deleted already: a worker of a run that was killed may still be ending.
            with suppress(OSError):
                os.rmdir(path)
