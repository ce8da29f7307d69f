"""A Ray cluster on this machine: each node is a raylet of its own with its own workers and object store.

Nodes can be kept apart: by a memory of their own, and by folders of the driver that they do not see.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from pipelines.runtime.runners import ray as ray_runner

STORE = 100_000_000  # bytes; Ray takes no less than some 75 MiB
_QUIET = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
# A node that is gone is noticed as in a real cluster, by its heartbeat, only much sooner.
_SOON = {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "4"}
_PATIENCE = 100  # seconds for a node to start on a busy machine
_TRIES = 3  # to start it: sometimes a daemon of Ray waits for another one that has ended
# Ray gives its own daemon 30 seconds, and there is no setting for that.
_START = f"""
import time
from ray._private import services
from ray.scripts.scripts import main

find_node = services.get_node

def wait_for_node(*arguments, **named):
    deadline = time.monotonic() + {_PATIENCE}
    while True:
        try:
            return find_node(*arguments, **named)
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)

services.get_node = wait_for_node
main()
"""
_RAY = [sys.executable, "-c", _START, "start", "--block"]
_MEMORY = Path("/sys/fs/cgroup/memory")
# Mounts an empty folder over each of some folders, for this process and its children alone, and becomes the command.
_HIDE = 'while [ "$1" != -- ]; do mount -t tmpfs none "$1" || exit 1; shift; done; shift; exec "$@"'


@dataclass
class Node:
    """One node: the process of `ray start`, whose descendants are the node's daemons and workers."""

    process: subprocess.Popen[bytes]
    log: Path
    launch: Callable[[], "Node"]
    group: Path | None = None
    raylet: psutil.Process | None = None

    @property
    def alive(self) -> bool:
        """Whether it has not been killed."""
        return self.process.poll() is None

    def family(self) -> list[psutil.Process]:
        """All processes of the node."""
        roots = [p for p in (_alive(self.process.pid), self.raylet) if p]
        found: dict[int, psutil.Process] = {}
        for root in roots:
            with suppress(psutil.NoSuchProcess):
                found |= {p.pid: p for p in [root, *root.children(recursive=True)]}
        return list(found.values())

    def count_held(self) -> int:
        """Bytes that the node's processes and its object store hold, without the page cache; 0 without a cgroup."""
        if self.group is None:
            return 0
        lines = (self.group / "memory.stat").read_text().splitlines()
        figures = {name: int(value) for name, value in (line.split() for line in lines)}
        return figures["total_rss"] + figures["total_shmem"]

    def workers(self) -> list[tuple[psutil.Process, str]]:
        """The node's Ray workers and their titles: `ray::NAME`, and `ray::NAME.METHOD` while one is at work."""
        return [(p, title.strip()) for p in self.family() if (title := _title(p)).startswith("ray::")]

    def kill(self) -> None:
        """SIGKILL, as where a machine loses its power: daemons and workers, all at once."""
        family = self.family()
        for process in family:  # stopped first: none may see another die and act on it
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        for process in {p.pid: p for p in [*family, *self.family()]}.values():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=20)
        self.process.wait(20)


@dataclass
class Cluster:
    """Nodes[0] is the head, to which drivers connect. `cpus`: of the head and of each worker node.

    `gpus`: as many GPUs as each node says that it has. Nothing looks for them. `memory`: bytes of each node, its object
    store and its part of the page cache included, if this process may make memory cgroups (version 1). `hidden`: folders
    that all nodes but the head see empty, which needs `can_hide_folders`.
    """

    cpus: tuple[int, ...] = (1, 1, 1)
    gpus: int = 0
    memory: int | None = None
    hidden: tuple[str, ...] = ()
    nodes: list[Node] = field(default_factory=list)
    port: int = 0
    folder: str = ""
    _started: list[psutil.Process] = field(default_factory=list)
    _launched: int = 0

    @property
    def address(self) -> str:
        """For RAY_ADDRESS."""
        return f"127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """For a driver that is to use the cluster."""
        return {**os.environ, **_QUIET, "RAY_ADDRESS": self.address}

    def start(self) -> None:
        """All nodes; returns when each has registered."""
        self.folder = tempfile.mkdtemp(prefix="fpn", dir="/tmp")  # sockets below it: their paths must be short
        (self.port,) = _free_ports(1)
        head = ["--head", f"--port={self.port}", "--include-dashboard=false"]
        self._start(head, self.cpus[0])
        for cpus in self.cpus[1:]:
            self.add(cpus, wait=False)
        for node in self.nodes:
            self._wait(node)

    def add(self, cpus: int = 1, *, wait: bool = True) -> Node:
        """One more worker node."""
        if not self.nodes[0].raylet:
            self._wait(self.nodes[0])
        node = self._start([f"--address={self.address}"], cpus)
        if wait:
            self._wait(node)
        return node

    def refill(self) -> None:
        """New nodes for those that were killed."""
        for _ in range(len(self.cpus) - sum(node.alive for node in self.nodes)):
            self.add(self.cpus[-1])

    def stop(self) -> None:
        """End every process that was started, and wait until each is gone."""
        for node in self.nodes:
            self._started += node.family()
        for process in self._started:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for node in self.nodes:
            node.process.wait(20)
        left = [p for p in psutil.wait_procs(self._started, timeout=20)[1] if p.status() != psutil.STATUS_ZOMBIE]
        shutil.rmtree(self.folder, ignore_errors=True)
        for node in self.nodes:
            _delete_group(node.group)
        assert not left, f"still there: {left}"

    def processes(self) -> list[psutil.Process]:
        """All that belong to the cluster, found by its folder: also what lost its parent."""
        return [p for p in psutil.process_iter() if self.folder in _title(p) and p.pid != os.getpid()]

    def _start(self, arguments: list[str], cpus: int) -> Node:
        node = self._launch(arguments, cpus, is_head=not self.nodes)
        self.nodes.append(node)
        return node

    def _launch(self, arguments: list[str], cpus: int, *, is_head: bool) -> Node:
        self._launched += 1
        log = Path(self.folder) / f"node-{self._launched}.log"
        command = [*_RAY, *arguments, f"--num-cpus={cpus}", f"--object-store-memory={STORE}"]
        command += ["--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"]
        command += [f"--num-gpus={self.gpus}"]
        command += [f"--dashboard-agent-listen-port={_free_ports(1)[0]}"]
        # A folder each: nodes that start at the same time would choose the same names for their sockets.
        command += [f"--temp-dir={self.folder}/{self._launched}"]
        if self.memory:
            command += [f"--memory={self.memory - STORE}"]
        if self.hidden and not is_head:
            command = [*_UNSHARE, "sh", "-c", _HIDE, "sh", *self.hidden, "--", *command]
        group = _make_group(self.memory)
        with log.open("wb") as out:
            process = subprocess.Popen(
                command,
                stdout=out,
                stderr=out,
                env={**os.environ, **_QUIET, **_SOON},
                start_new_session=True,
                preexec_fn=(lambda: _enter(group)) if group else None,
            )
        return Node(process, log, lambda: self._launch(arguments, cpus, is_head=is_head), group)

    def _wait(self, node: Node) -> None:
        for _ in range(_TRIES):
            deadline = time.monotonic() + _PATIENCE
            while time.monotonic() < deadline and node.process.poll() is None:
                if "Ray runtime started" in node.log.read_text():
                    node.raylet = next(p for p in node.family() if "raylet/raylet" in _title(p))
                    self._started += node.family()
                    return
                time.sleep(0.1)
            node.kill()
            again = node.launch()
            _delete_group(node.group)
            node.process = again.process
            node.log = again.log
            node.group = again.group
        raise RuntimeError(f"a node did not start: {node.log.read_text()[-2000:]}")


@contextmanager
def cluster(cpus: tuple[int, ...] = (1, 1, 1), gpus: int = 0, hidden: tuple[str, ...] = ()) -> Iterator[Cluster]:
    """A cluster that is gone afterwards."""
    made = Cluster(cpus, gpus, hidden=hidden)
    try:
        made.start()
        yield made
    finally:
        made.stop()


@contextmanager
def connect(nodes: Cluster) -> Iterator[Cluster]:
    """Connect this process to a cluster."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in nodes.environment.items():
            patch.setenv(name, value)
        ray_runner.start()
        try:
            yield nodes
        finally:
            ray_runner.stop()


_UNSHARE = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]


def can_hide_folders() -> bool:
    """Whether nodes can be kept from seeing a folder of the driver. It needs `unshare`, and a kernel that allows it."""
    with tempfile.TemporaryDirectory() as folder, suppress(OSError):
        return subprocess.run([*_UNSHARE, "sh", "-c", _HIDE, "sh", folder, "--", "true"], check=False).returncode == 0
    return False


def _make_group(memory: int | None) -> Path | None:
    """Make a memory cgroup; None if there is nothing to limit, or if that is not allowed."""
    if memory is None:
        return None
    group = _MEMORY / f"facepipe-node-{os.getpid()}-{time.monotonic_ns()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(memory))
    except OSError:
        _delete_group(group)
        return None
    return group


def _enter(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


def _delete_group(group: Path | None) -> None:
    for _ in range(50):
        if group is None or not group.is_dir():
            return
        with suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.1)


def _alive(pid: int) -> psutil.Process | None:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid)
    return None


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return ""


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()
