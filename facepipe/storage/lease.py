"""One writer at a time: a lease on a small file, renewed by a heartbeat. Others take it over when the heartbeat stops.

Works on local disks and in object stores alike. No clock of another machine is trusted: a run that finds a lease
watches whether it changes. A lease proves nothing at the moment of a commit. The commit is therefore conditional on the
table's version as well.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from facepipe.errors import ConfigError, GalleryBusyError, GalleryError, StorageError
from facepipe.storage import conditional
from facepipe.storage.attempts import get_attempt
from facepipe.storage.error_text import describe_error
from facepipe.storage.files import get_entry
from facepipe.storage.new_folders import make_new_folders, remove_new_folders
from facepipe.storage.urls import is_remote, join

LEASE_FILE = ".lock"
LEASE_GUARD = ".lock.guard"
# The purpose of an erasure's leases. Other runs wait for them, because an erasure must not make any run fail.
ERASURE = "erasure"

_DEFAULT_SECONDS = 60.0  # without a heartbeat, after which others take a lease over
_MAX_SECONDS = 3600.0
_HEARTBEATS = 4  # in the time of a lease
_TRUST = 0.75  # share of that time for which a holder trusts its own lease without having renewed it
_MAX_POLL_SECONDS = 1.0
_MAX_RENEWALS = 3  # attempts to renew a lease at once, if the store does not answer
_MAX_ERASURE_SECONDS = 4 * 3600.0  # how long a run waits for an erasure to end
_own_leases: set[str] = set()  # ids of the leases that this process holds

OnWait = Callable[[str], None]


@dataclass(frozen=True)
class Holder:
    """The content of a lease file.

    Attributes:
        holder: Random id of the lease.
        host: Name of the machine, for messages.
        machine: Boot id and process namespace, within which `pid` and `began` have a meaning.
        pid: Process id.
        began: When the process began, in ticks of the kernel.
        beat: Number of the last heartbeat.
        seconds: How long the lease lives without a heartbeat.
        released: The holder has finished.
        purpose: `ERASURE`, or empty for any other run.
        settled: No earlier holder can be asleep before its next commit: each has released the lease or ended, or a
            later holder's commit has made its own impossible.
        job: Name of the job that the process is an attempt of; empty if no scheduler has named one.
        attempt: Number of the attempt.
    """

    holder: str
    host: str
    # Without it a process id of another boot or container would be taken for one of this machine.
    machine: str
    pid: int
    began: str
    beat: int = 0
    seconds: float = _DEFAULT_SECONDS
    released: bool = False
    purpose: str = ""
    settled: bool = False
    job: str = ""
    attempt: int = 0

    @classmethod
    def of_this_process(cls, seconds: float, purpose: str = "") -> "Holder":
        """Make a holder with a new id for this process."""
        pid = os.getpid()
        return cls(
            holder=secrets.token_hex(8),
            host=socket.gethostname(),
            machine=_read_machine_id(),
            pid=pid,
            began=_read_process_start(pid),
            seconds=seconds,
            purpose=purpose,
            job=get_attempt().job,
            attempt=get_attempt().number,
        )

    def precedes(self, other: "Holder") -> bool:
        """Tell whether the holder is an earlier attempt of the same job, which its scheduler has given up."""
        return bool(self.job) and self.job == other.job and self.attempt < other.attempt

    def encode(self) -> bytes:
        """Encode the holder for the file."""
        return json.dumps(asdict(self)).encode()

    def has_ended(self) -> bool | None:
        """Tell whether the holder's process has ended.

        Returns:
            None if only the heartbeat can tell: the process is on another machine, stopped, or hidden from this one.
        """
        # Only a process of this machine can be looked up.
        if not self.machine or self.machine != _read_machine_id():
            return None
        if self.pid == os.getpid() and self.began == _read_process_start(self.pid):
            # This process may have failed to take the lease, or to release it.
            return self.holder not in _own_leases
        began, state = _read_process(self.pid)
        # /proc may hide the processes of others. Of such a one only the heartbeat tells whether it is the holder.
        if not state:
            return None if _process_exists(self.pid) else True
        # A process id is used again; the time of its beginning tells two processes apart.
        if began != self.began:
            return True
        # A stopped process may go on later, so its heartbeat decides.
        return None if state in "Tt" else False


def describe_process() -> dict[str, Any]:
    """Describe this process, so that `has_process_ended` can tell later whether it still runs."""
    holder = Holder.of_this_process(0)
    return {"machine": holder.machine, "pid": holder.pid, "began": holder.began}


def has_process_ended(process: Mapping[str, Any]) -> bool | None:
    """Tell whether a process that `describe_process` described has ended; None if nobody can tell from here."""
    try:
        holder = Holder("", "", str(process["machine"]), int(process["pid"]), str(process["began"]))
    except (KeyError, TypeError, ValueError):
        return None
    if holder.machine == _read_machine_id() and holder.pid == os.getpid():
        return holder.began != _read_process_start(holder.pid)
    return holder.has_ended()


class Lease:
    """A lease that this process holds. Call `check` before anything that must not happen without it.

    A process may be paused for hours right after a check: a laptop sleeps, a virtual machine is moved. So a check alone
    allows nothing that another run could not undo. What deletes goes by `renew`, which proves what has happened so far.

    Attributes:
        id: Random id of this lease. What a run writes can name the lease under which it was written.
        taken_at: When it was taken, in seconds since 1970 by the clock that dates the files beside it; 0 if unknown.
    """

    def __init__(self, path: str, kind: str, holder: Holder, tag: str):
        self.id = holder.holder
        self.taken_at = 0.0
        with suppress(StorageError):
            self.taken_at = get_entry(path).modified
        self._path = path
        self._kind = kind
        self._holder = holder
        self._tag = tag
        self._renewed_at = _read_clock()
        self._is_lost = False
        self._write_guard = threading.Lock()  # the heartbeat and `renew` write the same file
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send_heartbeats, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise GalleryBusyError if another run may hold the lease by now."""
        if self._is_lost or _read_clock() - self._renewed_at > _TRUST * self._holder.seconds:
            raise self._make_error()

    def renew(self) -> float:
        """Renew the lease now, which proves that no other run has held it since this one took it.

        So nothing that this run has seen until now was written by a run that took the lease over. That holds however
        long this process is paused afterwards.

        Returns:
            The time of the renewal, in seconds since 1970 by the clock that dates the files beside the lease.

        Raises:
            GalleryBusyError: another run has taken the lease over, or the lease cannot be written.
        """
        attempt = 1
        while True:
            self.check()
            try:
                self._beat()
                return get_entry(self._path).modified
            except conditional.ConflictError as error:
                raise self._make_error() from error
            except StorageError as error:  # the store may answer again before the lease ends
                if attempt == _MAX_RENEWALS:
                    place = f"{self._kind} {os.path.dirname(self._path)!r}"
                    raise GalleryBusyError(
                        f"the lease on the {place} could not be renewed: {error}; what was committed is kept"
                    ) from error
            attempt += 1
            time.sleep(min(_MAX_POLL_SECONDS, self._holder.seconds / 20))

    @property
    def is_settled(self) -> bool:
        """Whether no run that held the lease before can be asleep before a commit that would be accepted."""
        return self._holder.settled

    def settle(self) -> None:
        """Note that commits of earlier holders are no longer accepted. The file says so from the next renewal on."""
        with self._write_guard:
            self._holder = replace(self._holder, settled=True)

    def _make_error(self) -> GalleryBusyError:
        return GalleryBusyError(
            f"the lease on the {self._kind} {os.path.dirname(self._path)!r} was lost: it could not be renewed for "
            f"{self._holder.seconds:g} s, or another run took it over; what was committed is kept"
        )

    def release(self) -> None:
        """Release the lease. If another run holds it by now, it is left alone."""
        self._stop.set()
        self._thread.join()
        try:
            # The heartbeat has ended, so nobody else writes with this tag.
            if not self._is_lost:
                with suppress(StorageError), self._write_guard:  # it expires by itself
                    self._write(replace(self._holder, released=True))
        finally:
            _own_leases.discard(self._holder.holder)

    def _send_heartbeats(self) -> None:
        while not self._stop.wait(self._holder.seconds / _HEARTBEATS):
            try:
                self._beat()
            except conditional.ConflictError:
                return
            except StorageError:  # the store may answer again before the lease ends
                continue

    def _beat(self) -> None:
        """Write the next heartbeat. Raises ConflictError, and marks the lease as lost, if another run has it."""
        with self._write_guard:
            # Count from before the request: the store may have taken it at any moment after.
            began = _read_clock()
            try:
                self._write(replace(self._holder, beat=self._holder.beat + 1))
            except conditional.ConflictError:
                self._is_lost = True
                raise
            self._renewed_at = began

    def _write(self, holder: Holder) -> None:
        try:
            self._tag = conditional.write_if(self._path, holder.encode(), self._tag)
        except conditional.ConflictError:
            # A renewal that seemed to fail may have arrived. The file then holds this lease under another tag.
            content = conditional.read_tagged(self._path)
            current = _decode(content[0]) if content else None
            if content is None or current is None or current.holder != self._holder.holder:
                raise
            self._tag = conditional.write_if(self._path, holder.encode(), content[1])
        self._holder = holder


def get_lease_seconds() -> float:
    """Read from FACEPIPE_LEASE_SECONDS how long a lease lives without a heartbeat; 60 by default."""
    text = os.environ.get("FACEPIPE_LEASE_SECONDS", "")
    try:
        seconds = float(text) if text else _DEFAULT_SECONDS
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < _MAX_SECONDS:
        raise ConfigError(f"FACEPIPE_LEASE_SECONDS is {text!r}: give seconds, such as 60")
    return seconds


@contextmanager
def hold_lease(
    folder: str, kind: str = "gallery", on_wait: OnWait = lambda line: None, *, purpose: str = ""
) -> Iterator[Lease]:
    """Hold the lease of a folder for writing.

    If the folder was empty or absent, and the block fails before it puts anything into it, it is left as it was.

    A lease of a process of this machine that has ended is taken over at once. One of another machine is taken over if
    no heartbeat arrives for its time. A lease that an erasure holds is waited for.

    Args:
        folder: the gallery, or its index, its reports or another folder with one writer; a local one is made.
        kind: what the folder is, for messages.
        on_wait: called with a line if the lease of another machine has to be watched, or an erasure is waited for.
        purpose: `ERASURE` if the holder is an erasure.

    Raises:
        GalleryBusyError: another run holds the lease.
    """
    new_folders = None if is_remote(folder) else _make_folder(folder, kind)
    try:
        lease = _acquire(join(folder, LEASE_FILE), kind, on_wait, purpose)
        try:
            yield lease
        finally:
            lease.release()
    except BaseException:
        if new_folders is not None:
            _remove_unused(folder, new_folders)
        raise


def is_held(folder: str) -> bool:
    """Tell whether a run holds the lease of a folder, as far as one look can tell.

    A run on another machine counts as one that is going on until another takes its lease over.
    """
    content = conditional.read_tagged(join(folder, LEASE_FILE))
    holder = _decode(content[0]) if content else None
    return holder is not None and not holder.released and not holder.has_ended()


def _make_folder(folder: str, kind: str) -> list[str] | None:
    """Make a folder; return what was made for it, the deepest folder first, or None if the folder holds something."""
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ConfigError(f"the {kind} {folder!r} is a file; name a folder")
    try:
        folders = make_new_folders(folder)
        return None if os.listdir(folder) else folders
    except OSError as error:
        raise GalleryError(f"cannot write to the {kind} {folder!r}: {describe_error(error)}") from error


def _remove_unused(folder: str, new_folders: list[str]) -> None:
    """Remove the lease from a folder that was empty and holds nothing else, and the folders that were made for it."""
    with suppress(OSError, StorageError):
        if set(os.listdir(folder)) - {LEASE_FILE, LEASE_GUARD}:
            return
        content = conditional.read_tagged(join(folder, LEASE_FILE))
        if content:
            # Another run may have taken the lease since, and then the folder is its own.
            current = _decode(content[0])
            if current is None or not current.released:
                return
            conditional.delete_if(join(folder, LEASE_FILE), content[1])
        remove_new_folders(new_folders)


def _acquire(path: str, kind: str, on_wait: OnWait, purpose: str) -> Lease:
    """Take the lease as soon as it is free; raise GalleryBusyError if its holder is alive and no erasure."""
    own = Holder.of_this_process(get_lease_seconds(), purpose)
    folder = os.path.dirname(path)
    while True:
        try:
            # Read the lease, wait if somebody holds it, and take it on the condition that it is still the same.
            content = conditional.read_tagged(path)
            current = _decode(content[0]) if content else None
            # A released lease still says who had it last.
            if current is not None and own.precedes(current):
                raise GalleryBusyError(
                    f"a later attempt of this job has taken over the {kind} {folder!r}: this one is over"
                )
            if current is not None and not current.released and current.precedes(own):
                on_wait(f"taking over the {kind} from an earlier attempt of this job, on {current.host}")
            elif current is not None and not current.released:
                # Two erasures do not wait for each other: each does what it can.
                if current.purpose == ERASURE and not purpose:
                    _wait_for_erasure(path, kind, current, on_wait)
                else:
                    _wait_for_end(path, kind, current, on_wait)
            own = replace(own, settled=current is not None and _is_settled(path, current))
            return _take(path, kind, own, content[1] if content else None)
        except conditional.ConflictError:
            continue  # another run was faster: look at what it wrote
        except StorageError as error:
            raise GalleryError(f"cannot write to the {kind} {folder!r}: {error}") from error


def _is_settled(path: str, previous: Holder) -> bool:
    """Tell whether the last holder and all before it are known to write no more."""
    # A request to a store may arrive after its process has ended.
    has_ended = previous.released or (not is_remote(path) and bool(previous.has_ended()))
    return previous.settled and has_ended


def _take(path: str, kind: str, own: Holder, tag: str | None) -> Lease:
    # First, because another thread of this process may read the lease as soon as it is written.
    _own_leases.add(own.holder)
    try:
        return Lease(path, kind, own, conditional.write_if(path, own.encode(), tag))
    except BaseException:
        _own_leases.discard(own.holder)
        raise


def _wait_for_end(path: str, kind: str, holder: Holder, on_wait: OnWait) -> None:
    """Return once a holder is known to have ended; raise GalleryBusyError once it is seen to be running."""
    has_ended = holder.has_ended()
    if has_ended is None:
        on_wait(f"the {kind} is held by a run on {holder.host}: watching it for up to {holder.seconds:g} s")
        has_ended = _watch(path, holder)
    if not has_ended:
        raise GalleryBusyError(
            f"another run (process {holder.pid} on {holder.host}) is writing to the {kind} {os.path.dirname(path)!r}; "
            "wait for it to end"
        )


def _wait_for_erasure(path: str, kind: str, holder: Holder, on_wait: OnWait) -> None:
    """Return once an erasure no longer holds the lease; raise GalleryBusyError if it takes hours."""
    began = _read_clock()
    last_beat = began
    on_wait(f"an erasure is at work on the {kind}: waiting for it to end")
    while _read_clock() - began < _MAX_ERASURE_SECONDS:
        if holder.has_ended() or _read_clock() - last_beat > holder.seconds:
            return
        time.sleep(min(_MAX_POLL_SECONDS, holder.seconds / 20))
        content = conditional.read_tagged(path)
        current = _decode(content[0]) if content else None
        if current is None or current.released or current.holder != holder.holder:
            return
        if current.beat != holder.beat:
            last_beat = _read_clock()
            holder = current
    raise GalleryBusyError(f"an erasure has held the {kind} {os.path.dirname(path)!r} for hours: wait for it to end")


def _watch(path: str, holder: Holder) -> bool:
    """Watch a lease file for the lease's time; tell whether no heartbeat arrived, or the lease was released."""
    # Wait for the whole time of the lease; any change of the file is a heartbeat.
    deadline = _read_clock() + holder.seconds
    while _read_clock() < deadline:
        time.sleep(min(_MAX_POLL_SECONDS, holder.seconds / 20))
        content = conditional.read_tagged(path)
        current = _decode(content[0]) if content else None
        if current is None or current.released:
            return True
        if current != holder:
            return False
    return True


def _decode(data: bytes) -> Holder | None:
    """Decode a lease file; None for one without meaning: it is damaged, or an older version left it."""
    try:
        holder = TypeAdapter(Holder).validate_json(data, strict=True)
    except ValueError:
        return None
    return holder if 0 < holder.seconds < _MAX_SECONDS else None


def _read_clock() -> float:
    """Read seconds that go on while the machine sleeps, and that no setting of the clock changes."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _read_machine_id() -> str:
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _process_exists(pid: int) -> bool:
    """Tell whether there is a process, hidden or not. Only the kernel's word counts that there is none."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _read_process_start(pid: int) -> str:
    """Read when a process began, in ticks of the kernel; empty if there is none. A zombie counts as none."""
    return _read_process(pid)[0]


def _read_process(pid: int) -> tuple[str, str]:
    """Read (when a process began, the letter of its state)."""
    with suppress(OSError, IndexError):
        # The name before the last bracket may hold blanks and brackets; state and start come after it.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()
        return ("" if fields[0] in "ZX" else fields[19]), fields[0]
    return "", ""
