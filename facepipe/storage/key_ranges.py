"""Listing of an object store by several ranges of keys at a time, because one listing gives some 15,000 keys a second.

A range that turns out to be long is divided by the characters of its keys, while others are listed. The order of the
entries is not that of the keys, but it is the same each time that the same objects are listed.
"""

import re
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from queue import Empty, Full, Queue
from typing import Any, NamedTuple

from facepipe.errors import StorageError
from facepipe.storage.client import open_bucket
from facepipe.storage.error_text import describe_error
from facepipe.storage.files import Entry, list_prefix, to_entry
from facepipe.storage.urls import split_url

LISTERS = 8
"""Ranges that are listed at a time."""

_PAGE = 1000
# Pages after which the rest of a range is divided. The first range is divided soon, as nothing else is listed.
_PAGES_OF_FIRST = 4
_PAGES = 16
_QUEUED_PAGES = 8
_MAX_DIVISIONS = 64
# Stores whose listing can begin anywhere. Others would list everything before.
_SCHEMES = ("s3", "gs")
# Ranges begin and end with keys of these characters only: clients and stores agree about them. The last character is
# none of punctuation, which a client may take for a folder.
_LAST_CHARACTERS = "0123456789=ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz"
_SAFE_KEY = re.compile(r"[-./0-9=A-Z_a-z]*")
_POLL_SECONDS = 0.1


class KeyRange(NamedTuple):
    """Keys after one and up to another.

    Attributes:
        after: the keys are greater than this one; empty: from the first on
        end: the keys are no greater than this one; None: to the last
        pages: pages after which the rest is divided
    """

    after: str = ""
    end: str | None = None
    pages: int = _PAGES


_Message = list[Entry] | KeyRange | BaseException | None


def list_prefix_in_ranges(url: str, listers: int = LISTERS) -> Iterator[Entry]:
    """List every object under a prefix, as `list_prefix` does, by several ranges of keys at a time.

    Args:
        url: the prefix.
        listers: number of ranges that are listed at a time.

    Raises:
        StorageError: the prefix cannot be listed.
    """
    if listers < 2 or not url.startswith(tuple(f"{scheme}://" for scheme in _SCHEMES)):
        yield from list_prefix(url)
        return
    bucket, prefix = split_url(url)
    waiting = deque([KeyRange(pages=_PAGES_OF_FIRST)])
    active: deque[_RangeLister] = deque()
    is_empty = True
    try:
        # Take one message of each lister in turn, so that the order does not depend on which is faster.
        while active or waiting:
            while waiting and len(active) < listers:
                active.append(_RangeLister(bucket, prefix, waiting.popleft()))
            message = active[0].receive()
            if isinstance(message, BaseException):
                raise StorageError(f"cannot list {url}: {describe_error(message)}") from message
            if message is None:
                active.popleft()
                continue
            if isinstance(message, KeyRange):
                waiting.append(message)
            else:
                is_empty = is_empty and not message
                yield from message
            active.rotate(-1)
    finally:
        for lister in active:
            lister.stop()
    # The prefix may be the name of one object.
    if is_empty:
        yield from list_prefix(url)


class _RangeLister:
    """A thread that lists a range of keys, page by page, and divides what is left of it if it is long."""

    def __init__(self, bucket: str, prefix: str, keys: KeyRange):
        self._bucket = bucket
        self._prefix = prefix
        self._keys = keys
        self._queue: Queue[_Message] = Queue(_QUEUED_PAGES)
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="listing-range", daemon=True).start()

    def receive(self) -> _Message:
        """Wait for the next page, a range that this one leaves to others, an error, or None at the end."""
        return self._queue.get()

    def stop(self) -> None:
        """End the thread after its current request."""
        self._stopped.set()
        with suppress(Empty):
            self._queue.get_nowait()

    def _run(self) -> None:
        try:
            for message in self._list():
                if not self._send(message):
                    return
            self._send(None)
        except BaseException as error:
            self._send(error)

    def _send(self, message: _Message) -> bool:
        """Queue a message; return False if the thread is to end instead."""
        while not self._stopped.is_set():
            with suppress(Full):
                self._queue.put(message, timeout=_POLL_SECONDS)
                return True
        return False

    def _list(self) -> Iterator[list[Entry] | KeyRange]:
        """Yield the pages of the range, or some of them and the ranges that the rest is divided into."""
        after, end, pages = self._keys
        is_sorted = True
        last = after
        for number, page in enumerate(self._list_pages(after), start=1):
            keys = [meta["path"] for meta in page]
            # A store that lists in no order cannot be divided.
            is_sorted = is_sorted and keys == sorted(keys) and keys[0] > last
            last = keys[-1]
            if end is None or last <= end:
                yield [to_entry(self._bucket, meta) for meta in page if meta["path"] > after]
            else:
                inside = (meta for meta in page if after < meta["path"] <= end)
                yield [to_entry(self._bucket, meta) for meta in inside]
                return
            if number == pages and is_sorted and len(page) == _PAGE:
                start = last
                for boundary in self._divide(last):
                    yield KeyRange(start, boundary)
                    start = boundary
                if start != last:
                    yield KeyRange(start, end)
                    return

    def _list_pages(self, after: str) -> Iterator[list[Any]]:
        import obstore

        store = open_bucket(self._bucket)
        for page in obstore.list(store, prefix=self._prefix or None, offset=after or None, chunk_size=_PAGE):
            if page:
                yield list(page)

    def _find_next(self, after: str) -> str | None:
        """Find the first key of the range after another one."""
        page = next(self._list_pages(after), None)
        if page is None:
            return None
        key = str(page[0]["path"])
        return key if self._keys.end is None or key <= self._keys.end else None

    def _divide(self, last: str) -> Iterator[str]:
        """Yield keys, ascending, that divide what comes after a key, at the first character that differs there.

        Args:
            last: the key that was listed last.
        """
        start = len(self._prefix)
        if not _SAFE_KEY.fullmatch(last[:start]):
            return
        # Find the first position at which a later key differs. If one does at a position, one does at any later.
        low = start
        high = len(last)
        while low < high:
            middle = (low + high) // 2
            boundary = _bound(last, middle)
            if boundary is not None and self._find_next(boundary) is not None:
                high = middle
            else:
                low = middle + 1
        boundary = _bound(last, low) if low < len(last) else None
        # Go from one character at this position to the next that occurs.
        for _ in range(_MAX_DIVISIONS):
            key = None if boundary is None else self._find_next(boundary)
            if boundary is None or key is None:
                return
            yield boundary
            boundary = _bound(key, low) if key[:low] == last[:low] and low < len(key) else None


def _bound(key: str, position: int) -> str | None:
    """Return the least text of safe characters behind all keys that begin as one does up to a position, that included.

    Args:
        key: the key.
        position: position in it.
    """
    head = key[:position]
    following = next((character for character in _LAST_CHARACTERS if character > key[position]), None)
    return None if following is None or not _SAFE_KEY.fullmatch(head) else head + following
