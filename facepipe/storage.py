"""Bytes in and out of a local disk or an object store (s3://, gs://, az://), behind five small functions.

Object stores go through `obstore`, which lists as a stream: a prefix of a hundred million keys is never held in memory.
"""

import io
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple

from facepipe.errors import ConfigError, StorageError

SCHEMES = ("s3://", "gs://", "az://", "abfs://", "memory://")
_REMOTE_BUFFER = 1 << 18


class Entry(NamedTuple):
    """One object of a listing: its URL, its size in bytes and a fingerprint that changes with its content."""

    url: str
    size: int
    fingerprint: str


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
    return f"{scheme}://{bucket}", key


@lru_cache(maxsize=16)
def bucket_store(bucket: str) -> Any:
    """The obstore client of a bucket; credentials and endpoint come from the environment (AWS_*)."""
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise ConfigError(f"{bucket} needs the object-store extra: pip install 'facepipe[s3]'") from error
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
    options = {"client_options": {"allow_http": True}} if endpoint.startswith("http://") else {}
    return from_url(bucket, **options)


def list_prefix(url: str) -> Iterator[Entry]:
    """Every object under a prefix, streamed in the store's order; or the one object of that name."""
    import obstore

    bucket, prefix = split_url(url)
    found = False
    try:
        for batch in obstore.list(bucket_store(bucket), prefix=prefix or None, chunk_size=1000):
            for meta in batch:
                found = True
                yield Entry(f"{bucket}/{meta['path']}", meta["size"], f"{meta['size']}-{meta['e_tag']}")
    except obstore.exceptions.BaseError as error:
        raise StorageError(f"cannot list {url}: {_reason(error)}") from error
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
            raise StorageError(_reason(error)) from error
        return Entry(url, meta["size"], f"{meta['size']}-{meta['e_tag']}")
    try:
        info = os.stat(path)
    except (OSError, ValueError) as error:
        raise StorageError(_reason(error)) from error
    return Entry(os.fsdecode(path), info.st_size, local_fingerprint(info))


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
        raise StorageError(_reason(error)) from error


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
        raise StorageError(_reason(error)) from error


def open_seekable(path: str | bytes) -> BinaryIO:
    """A seekable binary file object, for readers of containers (tar, Parquet)."""
    try:
        if is_remote(path):
            return io.BufferedReader(_RemoteFile(os.fsdecode(path)), _REMOTE_BUFFER)
        return open(path, "rb")
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot open {os.fsdecode(path)!r}: {_reason(error)}") from error


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


def write(path: str, data: bytes) -> None:
    """Write a whole file or object; a local file is on disk (fsync) when this returns."""
    try:
        if is_remote(path):
            import obstore

            bucket, key = split_url(path)
            obstore.put(bucket_store(bucket), key, data)
            return
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(f"cannot write {path!r}: {_reason(error)}") from error


class TooLargeError(StorageError):
    """More bytes than the limit allows."""


def _check_limit(size: int, limit: int | None) -> None:
    if limit is not None and size > limit:
        raise TooLargeError(f"{size} bytes, the limit is {limit}")


def _exactly(data: bytes, wanted: int) -> bytes:
    if len(data) != wanted:
        raise StorageError(f"truncated: {len(data)} of {wanted} bytes")
    return data


def _reason(error: BaseException) -> str:
    """One short line, without the path (the row has it) and without credentials."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__)[:200]
