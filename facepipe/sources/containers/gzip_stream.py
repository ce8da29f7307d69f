"""Tars that gzip has packed, `.tar.gz` and `.tgz`: a stream that is unpacked as it is read, from its beginning on.

A place in such a file is a place in what it unpacks to. Going forward costs the unpacking of what lies between. Going
back costs all of it again, so that `MemberReader` keeps an unpacked copy of a file that is read here and there.
"""

import io
import os
import shutil
import tempfile
import weakref
import zlib
from typing import IO, Any, BinaryIO, cast

from facepipe.errors import StorageError
from facepipe.sources.extensions import get_extension
from facepipe.storage import ReplacedError, TooLargeError, describe_error, get_open_fingerprint, open_seekable

PACKED_TARS = ("tar.gz", "tgz")
"""Extensions of tars that gzip has packed."""

_MAGIC = b"\x1f\x8b"
_GZIP = 16 + zlib.MAX_WBITS  # zlib checks the length and the checksum at the end, too
_PACKED_CHUNK = 1 << 18
_CHUNK = 1 << 20
# Images hardly shrink. What unpacks to so much, and so many times its size, is there to fill a machine.
_BOMB_BYTES = 1 << 30
_BOMB_RATIO = 100
_MAX_RESTARTS = 1  # of a file, until it is unpacked to a disk
_FREE_BYTES = 4 << 30  # of the disk that unpacked copies leave free


def is_packed_tar(path: str | bytes) -> bool:
    """Tell from its name whether a file is a tar that gzip has packed."""
    return get_extension(os.fsdecode(path)) in PACKED_TARS


class UnpackedStream(io.RawIOBase):
    """What a gzip file unpacks to, as a file that can be read and sought in. Some 3 MiB of it are in memory.

    Attributes:
        restarts: How often it was unpacked from its beginning again.
    """

    def __init__(self, file: BinaryIO):
        """Begin at the first byte.

        Args:
            file: the packed file. It is closed with this one.

        Raises:
            StorageError: It is not a gzip file.
        """
        self.restarts = 0
        self._file = file
        self._position = 0
        self._begin()
        if not self._pending.startswith(_MAGIC):
            raise StorageError("not packed with gzip, whatever its name says")

    def _begin(self) -> None:
        self._file.seek(0)
        self._decompressor: Any = zlib.decompressobj(_GZIP)
        self._pending = bytes(self._file.read(_PACKED_CHUNK))
        self._packed_bytes = len(self._pending)
        # The two chunks that were unpacked last, and where they begin: labels are read a little behind a header.
        self._previous = b""
        self._chunk = b""
        self._start = 0
        self._is_at_end = False

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def seekable(self) -> bool:
        """Tell that it can be sought in."""
        return True

    def tell(self) -> int:
        """Return the position in what is unpacked."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position. Nothing is unpacked until bytes are read. The end is not known, so that it cannot count."""
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("the end of a gzip file is not known")
        self._position = max(0, offset + (self._position if whence == io.SEEK_CUR else 0))
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Read bytes from the position on; fewer at the end only.

        Raises:
            StorageError: The file is truncated or damaged, or is a bomb.
        """
        if size < 0:
            raise io.UnsupportedOperation("a gzip file is read in parts")
        if self._position < self._start - len(self._previous):
            self.restarts += 1
            self._begin()
        parts = []
        remaining = size
        while remaining:
            if self._position >= self._start + len(self._chunk):
                if not self._unpack_chunk():
                    break
                continue
            part = self._slice(remaining)
            parts.append(part)
            remaining -= len(part)
            self._position += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _slice(self, size: int) -> bytes:
        """Return bytes at the position out of one of the two chunks."""
        at = self._position - self._start
        if at >= 0:
            return self._chunk[at : at + size]
        at += len(self._previous)
        return self._previous[at : at + size]

    def _unpack_chunk(self) -> bool:
        """Unpack the next chunk; False at the end."""
        chunk = self._decompress()
        if not chunk:
            return False
        self._start += len(self._chunk)
        self._previous = self._chunk
        self._chunk = chunk
        unpacked = self._start + len(chunk)
        if unpacked > _BOMB_BYTES and unpacked > _BOMB_RATIO * self._packed_bytes:
            raise StorageError(f"unpacks to more than {_BOMB_RATIO} times its size: {unpacked} bytes so far")
        return True

    def _decompress(self) -> bytes:
        while not self._is_at_end:
            if not self._pending:
                self._pending = bytes(self._file.read(_PACKED_CHUNK))
                self._packed_bytes += len(self._pending)
                if not self._pending:
                    raise StorageError("truncated: its compressed data do not end")
            try:
                chunk = bytes(self._decompressor.decompress(self._pending, _CHUNK))
            except zlib.error as error:
                raise StorageError(f"damaged: {error}") from error
            self._pending = self._decompressor.unconsumed_tail
            if self._decompressor.eof:
                self._open_next(self._decompressor.unused_data)
            if chunk:
                return chunk
        return b""

    def _open_next(self, rest: bytes) -> None:
        """Begin with what follows the end of a gzip member: another member, zeros that fill a block, or nothing."""
        while True:
            rest = rest.lstrip(b"\0")
            if len(rest) >= len(_MAGIC):
                break
            more = bytes(self._file.read(_PACKED_CHUNK))
            self._packed_bytes += len(more)
            if not more:
                break
            rest += more
        if not rest:
            self._is_at_end = True
            return
        if not rest.startswith(_MAGIC):
            raise StorageError("damaged: more data behind the end of what gzip has packed")
        self._decompressor = zlib.decompressobj(_GZIP)
        self._pending = rest

    def require_fingerprint(self, fingerprint: str) -> None:
        """Raise ReplacedError if the packed file was written while it was open."""
        if get_open_fingerprint(self._file) != fingerprint:
            raise ReplacedError("the file was written while it was read")

    def close(self) -> None:
        """Close the packed file as well."""
        if not self.closed:
            self._file.close()
        super().close()


def open_packed_tar(path: str | bytes) -> tuple[BinaryIO, str]:
    """Open a tar that gzip has packed.

    Returns:
        The file that it unpacks to, and the fingerprint of the packed one.

    Raises:
        StorageError: It cannot be opened, or is not packed with gzip.
    """
    file = open_seekable(path, is_sequential=True)
    try:
        return cast(BinaryIO, UnpackedStream(file)), get_open_fingerprint(file)
    except BaseException:
        file.close()
        raise


class MemberReader:
    """Reads members of packed tars. One tar is open at a time, so that members in its order are unpacked once.

    A tar that is gone back in a second time is unpacked into a temporary file, and read from there. Such files stay
    until the disk has less than 4 GiB left; the one that was read first goes first.
    """

    def __init__(self) -> None:
        self._path = b""
        self._fingerprint = ""
        self._stream: UnpackedStream | None = None
        self._restarts: dict[tuple[bytes, str], int] = {}
        self._copies: dict[tuple[bytes, str], IO[bytes]] = {}
        weakref.finalize(self, _close_all, self._copies)

    def read(
        self, path: bytes, offset: int, length: int, max_bytes: int | None = None, fingerprint: str | None = None
    ) -> bytes:
        """Read a member.

        Args:
            path: path or URL of the tar.
            offset: first byte of the member in what the tar unpacks to.
            length: number of bytes.
            max_bytes: most bytes. More are refused before anything is read.
            fingerprint: fingerprint that the tar must have; any by default.

        Raises:
            TooLargeError: There are more bytes than `max_bytes`.
            ReplacedError: The tar has another fingerprint.
            StorageError: The tar cannot be read.
        """
        if max_bytes is not None and length > max_bytes:
            raise TooLargeError(f"{length} bytes, the limit is {max_bytes}")
        copy = self._find_copy(path, fingerprint)
        if copy is not None:
            return _read_part(copy, offset, length)
        try:
            stream = self._open(path, fingerprint)
            key = (path, self._fingerprint)
            before = stream.restarts
            if self._restarts.get(key, 0) > _MAX_RESTARTS:
                copy = self._unpack(stream)
                if copy is not None:
                    self._copies[key] = copy
                    return _read_part(copy, offset, length)
            data = _read_part(stream, offset, length)
            stream.require_fingerprint(self._fingerprint)
            self._restarts[key] = self._restarts.get(key, 0) + stream.restarts - before
        except OSError as error:
            self.close()
            raise StorageError(describe_error(error)) from error
        except StorageError:
            # A damaged stream cannot be read on.
            self.close()
            raise
        return data

    def _find_copy(self, path: bytes, fingerprint: str | None) -> IO[bytes] | None:
        for (name, version), copy in self._copies.items():
            if name == path and fingerprint in (None, version):
                return copy
        return None

    def _open(self, path: bytes, fingerprint: str | None) -> UnpackedStream:
        """Return the stream of a tar, at whatever place it is."""
        if self._stream is None or self._path != path or fingerprint not in (None, self._fingerprint):
            if self._stream is not None and self._stream.tell():
                # Coming back to this tar will cost its beginning again.
                key = (self._path, self._fingerprint)
                self._restarts[key] = self._restarts.get(key, 0) + 1
            self.close()
            stream, self._fingerprint = open_packed_tar(path)
            self._stream = cast(UnpackedStream, stream)
            self._path = path
        if fingerprint not in (None, self._fingerprint):
            raise ReplacedError("the file was replaced after it was listed")
        return self._stream

    def _unpack(self, stream: UnpackedStream) -> IO[bytes] | None:
        """Unpack a tar into a temporary file that has no name; None if the disk is too small."""
        copy = tempfile.TemporaryFile(prefix="facepipe-")  # noqa: SIM115  # it stays open
        try:
            stream.seek(0)
            while chunk := stream.read(_CHUNK):
                while shutil.disk_usage(tempfile.gettempdir()).free < _FREE_BYTES:
                    if not self._copies:
                        copy.close()
                        return None
                    self._copies.pop(next(iter(self._copies))).close()
                copy.write(chunk)
        except BaseException:
            copy.close()
            raise
        return copy

    def close(self) -> None:
        """Close the open tar. Unpacked copies stay."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None
        self._path = b""
        self._fingerprint = ""


def _close_all(files: dict[tuple[bytes, str], IO[bytes]]) -> None:
    for file in files.values():
        file.close()


def _read_part(file: Any, offset: int, length: int) -> bytes:
    file.seek(offset)
    data = bytes(file.read(length))
    if len(data) != length:
        raise StorageError(f"truncated: {len(data)} of {length} bytes")
    return data
