"""Bytes in and out of a local disk or an object store (s3://, gs://, az://), behind a few small functions.

Object stores go through `obstore`, which lists as a stream: a prefix of a hundred million keys is never held in memory.
"""

import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from facepipe.errors import ConfigError, StorageError
from facepipe.storage.redact import redact

SCHEMES = ("s3://", "gs://", "az://", "abfs://", "memory://")
_ARROW = re.compile(r"\x1b\[[0-9;]*m|↳")
_REMOTE_BUFFER = 1 << 18
_RETRY_SECONDS = 120.0  # the client tries ten times at most, which takes it about a minute where answers come at once


class Entry(NamedTuple):
    """One object of a listing: its URL, its size in bytes, a fingerprint that changes with its content, and when it
    was last written (seconds since 1970, by the clock of the machine or store that holds it)."""

    url: str
    size: int
    fingerprint: str
    modified: float = 0.0


def is_remote(path: str | bytes) -> bool:
    """Whether the path is a URL of an object store."""
    text = os.fsdecode(path)
    return text.startswith(SCHEMES)


def join(base: str, *names: str) -> str:
    """Join names to a local path or a URL."""
    return "/".join([base.rstrip("/") or "/", *names]) if is_remote(base) else os.path.join(base, *names)


def split_url(url: str) -> tuple[str, str]:
    """`s3://bucket/a/b` as ("s3://bucket", "a/b")."""
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    if not bucket:
        raise ConfigError(f"{url!r} names no bucket: write {scheme}://BUCKET/PREFIX")
    if holds_credentials(url):  # such a URL would end up in the gallery, in every uri
        raise ConfigError(f"{redact(url)!r} holds credentials: they belong into the environment (docs/security.md)")
    if key and not {"", ".", ".."}.isdisjoint(key.removesuffix("/").split("/")):
        raise StorageError(f"{url!r} has an empty part, or one of dots alone, which the client cannot ask for")
    return f"{scheme}://{bucket}", key


def holds_credentials(url: str) -> bool:
    """Whether a URL names a user before its host; abfs://CONTAINER@ACCOUNT is none."""
    scheme, _, rest = url.partition("://")
    user, at, _ = rest.partition("/")[0].rpartition("@")
    return bool(at) and (":" in user or not scheme.startswith(("az", "abfs")))


@lru_cache(maxsize=16)
def bucket_store(bucket: str) -> Any:
    """The obstore client of a bucket; credentials and endpoint come from the environment (AWS_*)."""
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise ConfigError(f"{bucket} needs the object-store extra: pip install 'facepipe[s3]'") from error
    options: dict[str, Any] = {"retry_config": {"retry_timeout": timedelta(seconds=retry_seconds())}}
    if plain_http():
        options["client_options"] = {"allow_http": True}
    return from_url(bucket, **options)


def retry_seconds() -> float:
    """How long a request to an object store is tried again: FACEPIPE_RETRY_SECONDS, 120 by default."""
    text = os.environ.get("FACEPIPE_RETRY_SECONDS", "")
    try:
        seconds = float(text) if text else _RETRY_SECONDS
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 280:  # beyond, the store may refuse the request's signature
        raise ConfigError(f"FACEPIPE_RETRY_SECONDS is {text!r}: give seconds up to 280, such as 120")
    return seconds


def plain_http() -> bool:
    """Whether the endpoint that the environment names is http:// and not https://."""
    return os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")


def list_prefix(url: str) -> Iterator[Entry]:
    """Every object under a prefix, streamed in the store's order; or the one object of that name."""
    import obstore

    bucket, prefix = split_url(url)
    found = False
    try:
        for batch in obstore.list(bucket_store(bucket), prefix=prefix or None, chunk_size=1000):
            for meta in batch:
                found = True
                yield _entry(bucket, meta)
    except obstore.exceptions.BaseError as error:
        raise StorageError(f"cannot list {url}: {reason(error)}") from error
    if not found and prefix and not url.endswith("/"):
        with suppress(StorageError):
            yield entry(url)


def entry(path: str | bytes) -> Entry:
    """Size and fingerprint of one file or object."""
    if is_remote(path):
        import obstore

        url = os.fsdecode(path)
        bucket, key = split_url(url)
        try:
            meta = obstore.head(bucket_store(bucket), key)
        except (obstore.exceptions.BaseError, FileNotFoundError) as error:
            raise StorageError(reason(error)) from error
        return _entry(bucket, meta)
    try:
        info = os.stat(path)
    except (OSError, ValueError) as error:
        raise StorageError(reason(error)) from error
    return Entry(os.fsdecode(path), info.st_size, local_fingerprint(info), info.st_mtime)


def _entry(bucket: str, meta: Any) -> Entry:
    mark = f"{meta['size']}-{meta['e_tag']}"
    return Entry(f"{bucket}/{meta['path']}", meta["size"], mark, meta["last_modified"].timestamp())


def local_fingerprint(info: os.stat_result) -> str:
    """Size and modification time of a local file."""
    return f"{info.st_size}-{info.st_mtime_ns}"


def read(path: bytes, offset: int | None = None, length: int | None = None, limit: int | None = None) -> bytes:
    """The bytes of a file or object, or `length` bytes from `offset`; refuses more than `limit` before reading."""
    return _read_remote(path, offset, length, limit) if is_remote(path) else _read_local(path, offset, length, limit)


def _read_local(path: bytes, offset: int | None, length: int | None, limit: int | None) -> bytes:
    try:
        # O_NONBLOCK: opening a FIFO that nobody writes to would block for ever.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb", buffering=0) as file:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise StorageError("is a directory" if stat.S_ISDIR(info.st_mode) else "not a regular file")
            wanted = info.st_size if length is None else length
            _check_limit(wanted, limit)
            file.seek(offset or 0)
            return _exactly(file.read(wanted) if wanted else b"", wanted)
    except (OSError, ValueError) as error:
        raise StorageError(reason(error)) from error


def _read_remote(path: bytes, offset: int | None, length: int | None, limit: int | None) -> bytes:
    import obstore

    bucket, key = split_url(path.decode())
    try:
        if length is not None:
            _check_limit(length, limit)
            data = obstore.get_range(bucket_store(bucket), key, start=offset or 0, length=length) if length else b""
            return _exactly(bytes(data), length)
        result = obstore.get(bucket_store(bucket), key)
        _check_limit(result.meta["size"], limit)
        return bytes(result.bytes())
    except (obstore.exceptions.BaseError, OSError) as error:
        raise StorageError(reason(error)) from error


def open_seekable(path: str | bytes) -> BinaryIO:
    """A seekable binary file object, for readers of containers (tar, Parquet)."""
    try:
        if is_remote(path):
            return io.BufferedReader(_RemoteFile(os.fsdecode(path)), _REMOTE_BUFFER)
        return open(path, "rb")
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot open {os.fsdecode(path)!r}: {reason(error)}") from error


class _RemoteFile(io.RawIOBase):
    """An object read by ranges."""

    def __init__(self, url: str):
        self._path, self._size, self._at = url.encode(), entry(url).size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), max(0, self._size - self._at))
        if length:
            buffer[:length] = _read_remote(self._path, self._at, length, None)
            self._at += length
        return length


def make_folder_of(path: str) -> None:
    """Make the folder that a local file is to lie in; object stores have none."""
    if not is_remote(path):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot write {path!r}: {reason(error)}") from error


def write(path: str, data: bytes) -> None:
    """Write a whole file or object; a local file is on disk (fsync) when this returns."""
    try:
        if is_remote(path):
            import obstore

            bucket, key = split_url(path)
            try:
                obstore.put(bucket_store(bucket), key, data)
            except obstore.exceptions.BaseError as error:
                raise StorageError(f"cannot write {path!r}: {reason(error)}") from error
            return
        _write_local(path, data)
    except OSError as error:
        raise StorageError(f"cannot write {path!r}: {reason(error)}") from error


def _write_local(path: str, data: bytes) -> None:
    try:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):  # a full disk: half a file helps nobody, and takes the room that is left
            os.unlink(path)
        raise


def write_file(path: str, local: str) -> None:
    """Write a local file as a file or an object, in pieces where it is long."""
    if not is_remote(path):
        with open(local, "rb") as file:
            write(path, file.read())
        return
    import obstore

    bucket, key = split_url(path)
    try:
        obstore.put(bucket_store(bucket), key, Path(local))
    except (obstore.exceptions.BaseError, OSError) as error:
        raise StorageError(f"cannot write {path!r}: {reason(error)}") from error


def delete(path: str) -> None:
    """Delete a file or an object, or see that there is none."""
    try:
        if is_remote(path):
            import obstore

            bucket, key = split_url(path)
            with suppress(FileNotFoundError):
                obstore.delete(bucket_store(bucket), key)
            return
        with suppress(FileNotFoundError):
            os.unlink(path)
    except OSError as error:
        raise StorageError(f"cannot delete {path!r}: {reason(error)}") from error
    except Exception as error:
        if type(error).__module__.startswith("obstore"):
            raise StorageError(f"cannot delete {path!r}: {reason(error)}") from error
        raise


def files_in(folder: str) -> Iterator[Entry]:
    """Every file below a folder or prefix; nothing where there is no such folder."""
    if is_remote(folder):
        yield from list_prefix(folder.rstrip("/") + "/")
        return
    for at, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(at, name)
            with suppress(FileNotFoundError):  # it went while we looked
                info = os.lstat(path)
                yield Entry(path, info.st_size, local_fingerprint(info), info.st_mtime)


class TooLargeError(StorageError):
    """More bytes than the limit allows."""


def _check_limit(size: int, limit: int | None) -> None:
    if limit is not None and size > limit:
        raise TooLargeError(f"{size} bytes, the limit is {limit}")


def _exactly(data: bytes, wanted: int) -> bytes:
    if len(data) != wanted:
        raise StorageError(f"truncated: {len(data)} of {wanted} bytes")
    return data


def reason(error: BaseException) -> str:
    """One short line, without the path (the row has it) and without credentials."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    lines = [_ARROW.sub("", line).strip() for line in redact(str(error)).strip().splitlines()]
    if not lines:
        return type(error).__name__
    # deltalake puts the cause on the last line of several that begin with an arrow.
    text = f"{lines[0]}: {lines[-1]}" if "↳" in str(error) and len(lines) > 1 else lines[0]
    return text[:300]
