"""One writer at a time: a lease on a small file, renewed by a heartbeat, that others take over when it stops beating.

Works on local disks and object stores alike. Nobody's wall clock is trusted: who finds a lease watches whether it
changes. A lease is no proof at the moment of a commit; that one is conditional on the table's version as well.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from facepipe import storage
from facepipe.errors import ConfigError, GalleryBusyError, GalleryError, StorageError
from facepipe.storage import conditional

NAME, GUARD = ".lock", ".lock.guard"
_SECONDS = 60.0  # without a heartbeat, after which others take a lease over
_BEATS = 4  # heartbeats in that time
_TRUST = 0.75  # of that time a holder believes in its own lease without having renewed it
_LONGEST = 3600.0
_HELD: set[str] = set()  # the leases of this process


@dataclass(frozen=True)
class Holder:
    """What the file says. machine: boot and process namespace, in which the pid and its start time mean something."""

    holder: str
    host: str
    machine: str
    pid: int
    began: str
    beat: int = 0
    seconds: float = _SECONDS
    released: bool = False

    @classmethod
    def me(cls, seconds: float) -> "Holder":
        """This process."""
        pid = os.getpid()
        return cls(secrets.token_hex(8), socket.gethostname(), _machine(), pid, _began(pid), 0, seconds)

    def encode(self) -> bytes:
        """For the file."""
        return json.dumps(asdict(self)).encode()

    def gone(self) -> bool | None:
        """Whether the process is no more; None where only the heartbeat tells: on another machine, or stopped."""
        if not self.machine or self.machine != _machine():
            return None
        if self.pid == os.getpid() and self.began == _began(self.pid):
            return self.holder not in _HELD  # this process may have failed to take it, or to let go
        began, state = _process(self.pid)
        return None if began == self.began and state in "Tt" else began != self.began


class Lease:
    """A lease that is held. `check` before anything that must not happen without it."""

    def __init__(self, path: str, what: str, holder: Holder, tag: str):
        self._path, self._what, self._holder, self._tag = path, what, holder, tag
        self._renewed = _now()
        self._lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise GalleryBusyError where the lease may be another's by now."""
        if self._lost or _now() - self._renewed > _TRUST * self._holder.seconds:
            raise GalleryBusyError(
                f"the lease on the {self._what} {os.path.dirname(self._path)!r} was lost: it could not be renewed for "
                f"{self._holder.seconds:g} s, or another run took it over; what was committed is kept"
            )

    def release(self) -> None:
        """Let go; somebody else's lease is left alone."""
        self._stop.set()
        self._thread.join()
        try:
            if not self._lost:
                with suppress(StorageError):  # it expires by itself
                    self._write(replace(self._holder, released=True))
        finally:
            _HELD.discard(self._holder.holder)

    def _beat(self) -> None:
        while not self._stop.wait(self._holder.seconds / _BEATS):
            began = _now()
            try:
                self._write(replace(self._holder, beat=self._holder.beat + 1))
                self._renewed = began
            except conditional.ConflictError:
                self._lost = True
                return
            except StorageError:  # the store may come back before the lease ends
                continue

    def _write(self, holder: Holder) -> None:
        try:
            self._tag = conditional.write_if(self._path, holder.encode(), self._tag)
        except conditional.ConflictError:
            # A renewal that failed may have landed all the same: what lies there is then this lease, with another tag.
            found = conditional.read_tagged(self._path)
            now = _decoded(found[0]) if found else None
            if found is None or now is None or now.holder != self._holder.holder:
                raise
            self._tag = conditional.write_if(self._path, holder.encode(), found[1])
        self._holder = holder


def lease_seconds() -> float:
    """How long a lease lives without a heartbeat: FACEPIPE_LEASE_SECONDS, 60 by default."""
    text = os.environ.get("FACEPIPE_LEASE_SECONDS", "")
    try:
        seconds = float(text) if text else _SECONDS
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < _LONGEST:
        raise ConfigError(f"FACEPIPE_LEASE_SECONDS is {text!r}: give seconds, such as 60")
    return seconds


@contextmanager
def writer_lock(
    folder: str, what: str = "gallery", waiting: Callable[[str], None] = lambda line: None
) -> Iterator[Lease]:
    """Hold the gallery (or the index, or the reports, by their folder) for writing, or raise GalleryBusyError.

    A lease left by a process of this machine that has ended is taken over at once; one left on another machine when no
    heartbeat has been seen for its time. `waiting` is told so.
    """
    if not storage.is_remote(folder):
        _make(folder, what)
    lease = _acquire(storage.join(folder, NAME), what, waiting)
    try:
        yield lease
    finally:
        lease.release()


def _make(folder: str, what: str) -> None:
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ConfigError(f"the {what} {folder!r} is a file; name a folder")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise GalleryError(f"cannot write to the {what} {folder!r}: {storage.reason(error)}") from error


def _acquire(path: str, what: str, waiting: Callable[[str], None]) -> Lease:
    mine = Holder.me(lease_seconds())
    folder = os.path.dirname(path)
    while True:
        try:
            found = conditional.read_tagged(path)
            held = _decoded(found[0]) if found else None
            if held is not None and not held.released:
                _outlive(path, folder, what, held, waiting)
            return _take(path, what, mine, found[1] if found else None)
        except conditional.ConflictError:
            continue  # another was faster: see what it says
        except StorageError as error:
            raise GalleryError(f"cannot write to the {what} {folder!r}: {error}") from error


def _take(path: str, what: str, mine: Holder, tag: str | None) -> Lease:
    _HELD.add(mine.holder)  # first: another thread of this process may read the lease as soon as it is written
    try:
        return Lease(path, what, mine, conditional.write_if(path, mine.encode(), tag))
    except BaseException:
        _HELD.discard(mine.holder)
        raise


def _outlive(path: str, folder: str, what: str, held: Holder, waiting: Callable[[str], None]) -> None:
    """Return when the holder is known to be gone; raise GalleryBusyError when it is seen to live."""
    gone = held.gone()
    if gone is None:
        waiting(f"the {what} is held by a run on {held.host}: watching it for up to {held.seconds:g} s")
        ends, last = _now() + held.seconds, held
        while _now() < ends:
            time.sleep(min(1.0, held.seconds / 20))
            found = conditional.read_tagged(path)
            now = _decoded(found[0]) if found else None
            if now is None or now.released:
                return
            if now != last:
                break
        else:
            return
    elif gone:
        return
    raise GalleryBusyError(
        f"another run (process {held.pid} on {held.host}) is writing to the {what} {folder!r}; wait for it to end"
    )


def _decoded(data: bytes) -> Holder | None:
    """What a lease file says; None for one that says nothing: a damaged one, or what older versions left."""
    try:
        found = TypeAdapter(Holder).validate_json(data, strict=True)
    except ValueError:
        return None
    return found if 0 < found.seconds < _LONGEST else None


def _now() -> float:
    """Seconds that go on while the machine sleeps, and that no setting of the clock changes."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _machine() -> str:
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _began(pid: int) -> str:
    """When a process began, in the kernel's ticks; empty where there is none (a zombie is none)."""
    return _process(pid)[0]


def _process(pid: int) -> tuple[str, str]:
    """(when it began, the letter of its state)."""
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()
        return ("" if fields[0] in "ZX" else fields[19]), fields[0]
    return "", ""
