"""Listings that threads run ahead of their turn: several archives of an object store are read at a time."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Full, Queue

from facepipe.sources.item import WorkItem

_MAX_BATCH = 256  # items per message of a thread
_QUEUED_BATCHES = 16
_MAX_WAITING = 2_000  # entries that are looked at ahead of the one whose turn it is
_POLL_SECONDS = 0.1

Listing = Callable[[], Iterable[WorkItem]]


@dataclass(frozen=True)
class Listed:
    """What one entry of a source gives.

    Attributes:
        list_items: lists its items.
        is_slow: whether it is an archive, whose listing is worth a thread.
    """

    list_items: Listing
    is_slow: bool


def list_ahead(entries: Iterable[Listed], threads: int) -> Iterator[WorkItem]:
    """Yield the items of all entries in order, while threads list the next slow ones.

    The order is that of the entries, whichever thread is faster. An error is raised when it is the turn of its entry.

    Args:
        entries: the entries.
        threads: number of slow entries that are listed at a time.
    """
    source = iter(entries)
    waiting: deque[Listed | _Lister] = deque()
    active = 0
    is_ended = False
    try:
        while True:
            # Look ahead until enough archives are listed at a time.
            while not is_ended and active < threads and len(waiting) < _MAX_WAITING:
                entry = next(source, None)
                if entry is None:
                    is_ended = True
                elif entry.is_slow:
                    waiting.append(_Lister(entry.list_items))
                    active += 1
                else:
                    waiting.append(entry)
                    if active == 0:
                        break  # nothing is worth waiting for
            if not waiting:
                return
            first = waiting[0]
            yield from first.list_items()
            if isinstance(first, _Lister):
                active -= 1
            waiting.popleft()
    finally:
        for lister in waiting:
            if isinstance(lister, _Lister):
                lister.stop()


class _Lister:
    """A thread that lists one entry, and waits if it is too far ahead."""

    def __init__(self, list_items: Listing):
        self._list_items = list_items
        self._queue: Queue[list[WorkItem] | BaseException | None] = Queue(_QUEUED_BATCHES)
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="listing-archive", daemon=True).start()

    def list_items(self) -> Iterator[WorkItem]:
        """Yield the items, as they come."""
        while (message := self._queue.get()) is not None:
            if isinstance(message, BaseException):
                raise message
            yield from message

    def stop(self) -> None:
        """End the thread after its current item."""
        self._stopped.set()
        with suppress(Empty):
            self._queue.get_nowait()

    def _run(self) -> None:
        # The first item is sent at once; later messages are larger.
        size = 1
        batch: list[WorkItem] = []
        end: BaseException | None = None
        try:
            for item in self._list_items():
                batch.append(item)
                if len(batch) >= size:
                    if not self._send(batch):
                        return
                    batch = []
                    size = min(2 * size, _MAX_BATCH)
        except BaseException as error:
            end = error
        # What came before an error is listed.
        if self._send(batch):
            self._send(end)

    def _send(self, message: list[WorkItem] | BaseException | None) -> bool:
        """Queue a message; return False if the thread is to end instead."""
        while not self._stopped.is_set():
            with suppress(Full):
                self._queue.put(message, timeout=_POLL_SECONDS)
                return True
        return False
