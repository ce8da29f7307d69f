"""Members of tar files, read in large ranges: one read, or one request to an object store, covers many members."""

from collections.abc import Mapping
from concurrent.futures import Executor, Future
from typing import NamedTuple

from facepipe import storage
from facepipe.errors import StorageError

# Bytes between two wanted members that are read with them: headers, labels, members that are not wanted.
_MAX_GAP = 1 << 20
_RANGE_BYTES = 32 << 20


class Container(NamedTuple):
    """A container file as it was listed.

    Attributes:
        path: path or URL
        fingerprint: its fingerprint; None if it is not known
    """

    path: bytes
    fingerprint: str | None


class _Range(NamedTuple):
    """Bytes of a container, from start to end."""

    container: Container
    start: int
    end: int


class RangeReader:
    """Reads members of containers by ranges that are planned for many members before the first one is read.

    One range is in memory at a time; of a container in an object store, the next one is requested meanwhile. It is read
    by one thread.
    """

    def __init__(self, executor: Executor, max_bytes: int = _RANGE_BYTES):
        """Make a reader.

        Args:
            executor: runs requests ahead.
            max_bytes: maximum number of bytes per range; a larger member has a range of its own.
        """
        self._executor = executor
        self._max_bytes = max_bytes
        self._ranges: list[_Range] = []
        self._number_by_member: dict[tuple[Container, int], int] = {}
        self._current: tuple[int, bytes | None] = (-1, None)
        self._ahead: dict[int, Future[bytes]] = {}

    def plan(self, members: Mapping[Container, list[tuple[int, int]]]) -> None:
        """Plan the ranges of members. Those of an earlier plan are forgotten.

        Args:
            members: (offset, length) of members, by their container.
        """
        self.close()
        for container, places in members.items():
            for offset, length in sorted(places):
                last = self._ranges[-1] if self._ranges else None
                end = offset + length
                fits = (
                    last is not None
                    and last.container == container
                    and offset - last.end <= _MAX_GAP
                    and end - last.start <= self._max_bytes
                )
                if last is not None and fits:
                    self._ranges[-1] = last._replace(end=max(end, last.end))
                else:
                    self._ranges.append(_Range(container, offset, end))
                self._number_by_member[container, offset] = len(self._ranges) - 1

    def read(self, container: Container, offset: int, length: int) -> bytes | None:
        """Read a member.

        Returns:
            Its bytes; None if it is not in the plan, or its range cannot be read: it has to be read by itself.

        Raises:
            ReplacedError: The container is not the one that was listed.
        """
        number = self._number_by_member.get((container, offset))
        if number is None:
            return None
        if self._current[0] != number:
            self._current = (-1, None)
            self._current = (number, self._load(number))
        data = self._current[1]
        start = offset - self._ranges[number].start
        return None if data is None else data[start : start + length]

    def _load(self, number: int) -> bytes | None:
        """Read a range, and request the next one."""
        waiting = self._ahead.pop(number, None)
        for future in self._ahead.values():
            future.cancel()
        self._ahead.clear()
        following = number + 1
        if following < len(self._ranges) and storage.is_remote(self._ranges[following].container.path):
            self._ahead[following] = self._executor.submit(_read_range, self._ranges[following])
        try:
            return waiting.result() if waiting is not None else _read_range(self._ranges[number])
        except storage.ReplacedError:
            raise
        except StorageError:
            return None

    def close(self) -> None:
        """Forget the plan, and free the memory."""
        for future in self._ahead.values():
            future.cancel()
        self._ahead.clear()
        self._ranges.clear()
        self._number_by_member.clear()
        self._current = (-1, None)


def _read_range(place: _Range) -> bytes:
    container = place.container
    return storage.read(container.path, place.start, place.end - place.start, None, container.fingerprint)
