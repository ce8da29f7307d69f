"""Runs that fall asleep: a command is stopped at a chosen step, as a laptop's lid or a paused virtual machine stops it.

python tests/pauses.py    # forks commands of one process that has loaded everything; see Sleepers
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What changes files, names what may be deleted, or proves that it may: a run is stopped just before such a call.
STEPS = (
    "os.unlink",
    "os.rename",
    "os.replace",
    "os.rmdir",
    "shutil.rmtree",
    "obstore.put",
    "obstore.delete",
    "deltalake.DeltaTable.create_write_transaction",
    "deltalake.DeltaTable.create_checkpoint",
    "facepipe.storage.list_files",
    "facepipe.storage.files.list_files",
    "facepipe.storage.store.list_files",
    "facepipe.storage.store.list_prefix",
    "facepipe.storage.owned.list_prefix",
    "facepipe.storage.owned.walk_files",
    "facepipe.storage.lease.Lease.check",
    "facepipe.storage.lease.Lease.renew",
)


# What is written or listed under a file lock: whoever stops then stops all others, which has a test of its own.
_GUARDED = re.compile(r"\.lock|manifest\.json|hidden\.list|erased|.*\.(pending|state|indexed)(\.new)?")


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: Exit code; 70 for an exception that was not expected.
        said: What it printed.
        steps: How many steps it came to.
        at: The step at which it slept, if it did.
    """

    code: int
    said: str
    steps: int
    at: str


class Sleeper:
    """A command that is asleep, or has ended without coming to the step."""

    def __init__(self, server: "Sleepers", pid: int, folder: Path, ended: Ended | None):
        self.pid = pid
        self.ended = ended
        self._server = server
        self._folder = folder

    @property
    def at(self) -> str:
        """The step at which it sleeps."""
        return (self._folder / "at").read_text()

    @property
    def is_leased(self) -> bool:
        """Whether it held a lease when it fell asleep."""
        return (self._folder / "leased").exists()

    def wake(self) -> Ended:
        """Let it go on to its end."""
        if self.ended is None:
            self.ended = self._server._finish(self.pid, self._folder)
        return self.ended


class Sleepers:
    """Starts commands of facepipe that fall asleep."""

    def __init__(self, process: "subprocess.Popen[str]", folder: Path):
        self._process = process
        self._folder = folder
        self._count = 0
        self._awake: dict[int, Sleeper] = {}

    def start(self, *words: str | Path, step: int, jumps: bool = False, only: tuple[str, ...] = STEPS) -> Sleeper:
        """Start a command and wait until it sleeps, or has ended.

        Args:
            words: the words of the command line after `facepipe`.
            step: number of the step before which it sleeps, from 1; 0 for never.
            jumps: its clock shows afterwards that it has slept. The clock of a virtual machine that was paused does not.
            only: names of what counts as a step.
        """
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        job = {"words": [str(word) for word in words], "step": step, "jumps": jumps, "only": only}
        answer = self._ask({**job, "folder": str(folder), "env": dict(os.environ)})
        ended = None if answer["stopped"] else _read_end(folder, answer["code"])
        sleeper = Sleeper(self, answer["pid"], folder, ended)
        self._awake[answer["pid"]] = sleeper
        return sleeper

    def _finish(self, pid: int, folder: Path) -> Ended:
        return _read_end(folder, self._ask({"wake": pid})["code"])

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        """End those that still sleep."""
        for sleeper in self._awake.values():
            if sleeper.ended is None:
                with suppress(ProcessLookupError):
                    os.kill(sleeper.pid, signal.SIGKILL)


def _read_end(folder: Path, code: int) -> Ended:
    at = (folder / "at").read_text() if (folder / "at").exists() else ""
    steps = int((folder / "steps").read_text()) if (folder / "steps").exists() else 0
    return Ended(code, " ".join((folder / "said").read_text().split()), steps, at)


@contextmanager
def open_sleepers() -> Iterator[Sleepers]:
    """Start the process whose forks the commands are."""
    command = [sys.executable, __file__]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,
    ):
        sleepers = Sleepers(process, Path(folder))
        try:
            yield sleepers
        finally:
            sleepers.close()
            assert process.stdin is not None
            process.stdin.close()
            process.kill()


# --- in the other process ----------------------------------------------------------------------------------------------


class _Steps:
    """Counts the steps of this process, and stops it before one."""

    def __init__(self, job: dict[str, Any]):
        self._stop_at = job["step"]
        self._jumps = job["jumps"]
        self._folder = Path(job["folder"])
        self._main = threading.current_thread()
        self.count = 0
        for name in job["only"]:
            self._hook(name)

    def _hook(self, name: str) -> None:
        owner_name, _, attribute = name.rpartition(".")
        owner = _resolve(owner_name)
        real = getattr(owner, attribute)
        hooked = self._wrap_listing(name, real) if attribute.startswith(("list_", "walk_")) else self._wrap(name, real)
        setattr(owner, attribute, hooked)

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def hooked(*args: Any, **options: Any) -> Any:
            if not any(_GUARDED.fullmatch(os.path.basename(str(arg))) for arg in args):
                self._pass(name)
            return real(*args, **options)

        return hooked

    def _wrap_listing(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def hooked(*args: Any, **options: Any) -> Iterator[Any]:
            is_guarded = any(_GUARDED.fullmatch(os.path.basename(str(arg))) for arg in args)
            if not is_guarded:
                self._pass(name)
            for n, entry in enumerate(real(*args, **options)):
                yield entry
                if n == 0 and not is_guarded:
                    self._pass(f"{name}, in the middle")

        return hooked

    def _pass(self, name: str) -> None:
        if threading.current_thread() is not self._main:
            return  # the heartbeat
        self.count += 1
        if self.count == self._stop_at:
            from facepipe.storage import lease

            (self._folder / "at").write_text(name)
            if lease._own_leases:
                (self._folder / "leased").touch()
            os.kill(os.getpid(), signal.SIGSTOP)
            if self._jumps:
                real = lease._read_clock
                lease._read_clock = lambda: real() + 86_400


def _resolve(name: str) -> Any:
    import importlib

    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        with suppress(ImportError):
            owner = importlib.import_module(".".join(parts[:length]))
            for part in parts[length:]:
                owner = getattr(owner, part)
            return owner
    raise LookupError(name)


def _work(job: dict[str, Any]) -> int:
    from jobs.cli import app

    os.environ.clear()
    os.environ.update(job["env"])
    steps = _Steps(job)
    try:
        app(job["words"])
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 70
    finally:
        Path(job["folder"], "steps").write_text(str(steps.count))
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _serve() -> None:
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # beside this file lies a folder called facepipe as well
    import obstore  # noqa: F401

    import pipelines.nightly.pipeline  # noqa: F401
    from jobs.cli import app  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        if "wake" in job:
            os.kill(job["wake"], signal.SIGCONT)
            _, status = os.waitpid(job["wake"], 0)
            print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)
            continue
        pid = os.fork()
        if not pid:
            descriptor = os.open(f"{job['folder']}/said", os.O_CREAT | os.O_WRONLY)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os._exit(_work(job))
        _, status = os.waitpid(pid, os.WUNTRACED)
        stopped = os.WIFSTOPPED(status)
        code = None if stopped else os.waitstatus_to_exitcode(status)
        print(json.dumps({"pid": pid, "stopped": stopped, "code": code}), flush=True)


if __name__ == "__main__":
    _serve()
