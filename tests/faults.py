"""Things that go wrong, made to order: a faulty proxy before an S3 server, a small disk, a small memory, a wild clock.

python tests/faults.py http://127.0.0.1:5000    # a proxy; prints its port. PUT /-/faults sets what it does wrong
python tests/faults.py -                        # runs commands at the same instant, each in a process of its own
"""

import http.client
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, tzinfo
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_CONTROL = "/-/faults"
# Conditions that a store accepts and ignores, by fault.
_DROPPED = {
    "no-if-match": ("if-match",),
    "no-if-none-match": ("if-none-match",),
    "unconditional": ("if-match", "if-none-match"),
}
_MEMORY = Path("/sys/fs/cgroup/memory")


# --- a store -----------------------------------------------------------------------------------------------------------


class _Faults:
    """What goes wrong, drawn at random: {"503": 0.1, "lost": 0.1}; `only`: methods concerned; `after`: requests first."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self.set({})

    def set(self, asked: dict[str, Any]) -> None:
        with self._guard:
            self._rng = random.Random(asked.get("seed", 0))
            self._rates, self._only, self._left = asked.get("rates", {}), asked.get("only", []), asked.get("after", 0)
            self.counts: dict[str, int] = {}

    def draw(self, method: str) -> str:
        with self._guard:
            self._left -= 1
            found, at = "", self._rng.random()
            if self._left < 0 and (not self._only or method in self._only):
                for name, rate in self._rates.items():
                    at -= rate
                    if at < 0:
                        found = name
                        break
            self.counts[found] = self.counts.get(found, 0) + 1
            return found


class _Proxy(BaseHTTPRequestHandler):
    """Hands requests on. 500, 503, 429: refused; reset: hung up on; slow: answered late; lost: done, and then answered
    with 500; truncated: the body breaks off; short: so does a range's, but the length says that this is all;
    unconditional: without its conditions; no-if-match, no-if-none-match: without one of them."""

    protocol_version = "HTTP/1.1"
    upstream: str
    faults = _Faults()

    def _serve(self) -> None:
        data = self._body()
        if self.path == _CONTROL:
            if self.command == "PUT":
                self.faults.set(json.loads(data))
            self._answer(200, json.dumps(self.faults.counts).encode())
            return
        fault = self.faults.draw(self.command)
        if fault.isdigit():
            self._answer(int(fault), b"<Error><Code>SlowDown</Code></Error>")
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
        else:
            if fault == "slow":
                time.sleep(0.4)
            self._hand_on(data, fault)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            data = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _hand_on(self, data: bytes, fault: str) -> None:
        host, port = self.upstream.split("//")[1].split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        try:
            dropped = ("transfer-encoding", "connection", *_DROPPED.get(fault, ()))
            headers = {k: v for k, v in self.headers.items() if k.lower() not in dropped}
            headers["Content-Length"] = str(len(data))
            connection.request(self.command, self.path, data, headers)
            response = connection.getresponse()
            body = response.read()
            given = {k: v for k, v in response.getheaders() if k.lower() not in ("transfer-encoding", "connection")}
        finally:
            connection.close()
        if fault == "short" and response.status != 206:
            fault = ""  # nobody can tell
        if fault == "lost":
            self._answer(500, b"")
        elif fault in ("truncated", "short") and self.command == "GET" and len(body) > 1 and response.status < 300:
            self._answer(response.status, body, given, len(body) // 2, hide=fault == "short")
        else:
            self._answer(response.status, body, given)

    def _answer(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        sent: int | None = None,
        hide: bool = False,
    ) -> None:
        self.send_response_only(status)
        for name, value in (headers or {}).items():
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(sent if hide else len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if sent is None else body[:sent])
        self.close_connection = self.close_connection or (sent is not None and not hide)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


class Proxy:
    """The proxy as its user sees it."""

    def __init__(self, endpoint: str):
        self.endpoint = endpoint
        self.given: Counter[str] = Counter()  # all faults so far; "" for none

    def set(self, seed: int = 0, only: tuple[str, ...] = (), after: int = 0, **rates: float) -> None:
        """What goes wrong from now on: `status_503=0.1`, `lost=0.1`; nothing without rates."""
        self.given.update(self.counts())
        names = {name.removeprefix("status_"): rate for name, rate in rates.items()}
        names = {name.replace("_", "-"): rate for name, rate in names.items()}
        self._ask("PUT", json.dumps({"seed": seed, "only": only, "after": after, "rates": names}).encode())

    def counts(self) -> dict[str, int]:
        """How often each fault was given since `set`."""
        return json.loads(self._ask("GET"))

    def _ask(self, method: str, data: bytes | None = None) -> bytes:
        with urllib.request.urlopen(urllib.request.Request(self.endpoint + _CONTROL, data, method=method)) as answer:
            return answer.read()


@contextmanager
def proxy(upstream: str) -> Iterator[Proxy]:
    """A faulty proxy in a process of its own: some calls of clients hold the interpreter."""
    command = [sys.executable, __file__, upstream]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            yield Proxy(f"http://127.0.0.1:{int(process.stdout.readline())}")
        finally:
            process.kill()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        pass  # clients hang up


def _serve(upstream: str) -> None:
    _Proxy.upstream = upstream
    server = _Server(("127.0.0.1", 0), _Proxy)
    print(server.server_address[1], flush=True)
    server.serve_forever()


# --- several at once ---------------------------------------------------------------------------------------------------


class Start:
    """Starts commands of facepipe at the same instant: forks of one process that has loaded everything."""

    def __init__(self, process: "subprocess.Popen[str]"):
        self._process = process

    def __call__(self, *commands: list[str]) -> list[tuple[int, str]]:
        """(exit code, stderr) of each."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(commands) + "\n")
        self._process.stdin.flush()
        return [(code, said) for code, said in json.loads(self._process.stdout.readline())]


@contextmanager
def start() -> Iterator[Start]:
    command = [sys.executable, __file__, "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Start(process)


def _code(app: Callable[[list[str]], object], words: list[str]) -> int:
    try:
        app(words)
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _fork() -> None:
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # beside this file lies a folder called facepipe as well
    import pipelines.nightly.pipeline  # noqa: F401
    from jobs.cli import app

    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            pids, gate = [], os.pipe()
            for n, words in enumerate(json.loads(line)):
                if not (pid := os.fork()):
                    os.close(gate[1])
                    os.dup2(os.open(f"{folder}/{n}", os.O_CREAT | os.O_WRONLY), 2)
                    os.dup2(2, 1)
                    os.read(gate[0], 1)  # all at once, when the other end is closed
                    os._exit(_code(app, words))
                pids.append(pid)
            time.sleep(0.05)
            os.close(gate[1])
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
            os.close(gate[0])
            print(json.dumps([(code, Path(folder, str(n)).read_text()) for n, code in enumerate(codes)]), flush=True)


# --- a disk ------------------------------------------------------------------------------------------------------------


class Disk:
    """A small file system in memory."""

    def __init__(self, path: Path):
        self.path = path

    def resize(self, size: int) -> bool:
        """Make it larger or smaller, though never smaller than what is in it."""
        return not subprocess.run(
            ["mount", "-o", f"remount,size={max(4096, size)}", str(self.path)], capture_output=True
        ).returncode

    def used(self) -> int:
        found = os.statvfs(self.path)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    def size(self) -> int:
        found = os.statvfs(self.path)
        return found.f_blocks * found.f_frsize


@contextmanager
def disk(path: Path, size: int) -> Iterator[Disk | None]:
    """A disk of so many bytes at a path; None where this system lets nobody mount one."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)]
    try:
        mounted = not subprocess.run(command, capture_output=True).returncode
    except OSError:
        mounted = False
    try:
        yield Disk(path) if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(path)], check=True)


# --- a memory ----------------------------------------------------------------------------------------------------------


@contextmanager
def memory(size: int) -> Iterator[Callable[[], None] | None]:
    """What moves a new process (preexec_fn) and all its children into so much memory; None where that cannot be had."""
    group = _MEMORY / f"facepipe-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(size))
    except OSError:
        with suppress(OSError):
            group.rmdir()
        yield None
        return

    def enter() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    try:
        yield enter
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            with suppress(OSError):
                os.kill(int(pid), signal.SIGKILL)
        for _ in range(100):
            with suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.02)


# --- a clock -----------------------------------------------------------------------------------------------------------


@contextmanager
def wild_clock(seed: int, chance: float = 0.2) -> Iterator[None]:
    """The wall clock of this process jumps by up to thirty years, forward and back, whenever somebody looks at it."""
    rng, real, offset = random.Random(seed), time.time, 0.0

    def now() -> float:
        nonlocal offset
        if rng.random() < chance:
            offset = rng.uniform(-9.5e8, 9.5e8)
        return real() + offset

    class Kind(type):
        def __instancecheck__(cls, thing: object) -> bool:
            return isinstance(thing, datetime)

    class Wild(datetime, metaclass=Kind):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.fromtimestamp(0, tz) + timedelta(seconds=now())

    users = [
        module
        for name, module in list(sys.modules.items())
        if name.split(".")[0] in ("facepipe", "pipelines", "jobs") and getattr(module, "datetime", None) is datetime
    ]
    time.time = now
    for module in users:
        module.datetime = Wild  # type: ignore[attr-defined]
    try:
        yield
    finally:
        time.time = real
        for module in users:
            module.datetime = datetime  # type: ignore[attr-defined]


if __name__ == "__main__":
    if sys.argv[1] == "-":
        _fork()
    else:
        _serve(sys.argv[1])
