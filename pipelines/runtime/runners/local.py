"""A pool of processes on this machine. A process that dies is replaced, and its block is given to the next one."""

import os
import pickle
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from queue import Empty, Queue

from facepipe.errors import FacepipeError, WorkerError
from facepipe.gallery.commits.parts import PartRecord
from facepipe.sources.blocks import Block, encode_block
from pipelines.runtime.plan import WorkerGroup
from pipelines.runtime.worker import WorkerJob

_BLOCKS_AHEAD = 2
_MAX_STILLBIRTHS = 4  # deaths before a worker is ready; later ones set a mark each, and so come to an end
_POLL_SECONDS = 0.05


class _Child:
    """One worker process and the block it has in hand."""

    def __init__(self, job: bytes, group: WorkerGroup, number: int):
        self.number = number
        self.connection, theirs = Pipe()
        command = [sys.executable, "-m", "pipelines.runtime.runners.child", str(theirs.fileno())]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        environment["OMP_NUM_THREADS"] = str(group.threads)
        if group.gpus:
            given = os.environ.get("CUDA_VISIBLE_DEVICES")
            environment["CUDA_VISIBLE_DEVICES"] = given.split(",")[number].strip() if given else str(number)
        # A session of its own: Ctrl-C goes to the driver, which decides what becomes of the blocks in hand.
        self.process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        self.block: Block | None = None
        self.ready = False
        self._send(job)

    def give(self, block: Block) -> None:
        self.block = block
        self._send(pickle.dumps(encode_block(block)))

    def _send(self, data: bytes) -> None:
        with suppress(OSError):  # where it died, the pool finds out when it reads
            self.connection.send_bytes(data)

    def stop(self) -> None:
        self.connection.close()
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait()


def run(blocks: Callable[[], Iterable[Block]], job: WorkerJob, group: WorkerGroup) -> Iterator[PartRecord]:
    """Records of the blocks as they are finished. Raises what a worker raised; WorkerError when workers only die."""
    pool = _Pool(pickle.dumps(job), group)
    listing = _Ahead(blocks())
    try:
        yield from pool.records(listing)
    finally:
        pool.stop()
        listing.stop()


class _Pool:
    def __init__(self, job: bytes, group: WorkerGroup):
        self._job, self._group = job, group
        self._children: list[_Child] = []
        self._again: deque[Block] = deque()
        self._stillbirths = 0

    def records(self, listing: "_Ahead") -> Iterator[PartRecord]:
        self._children = [_Child(self._job, self._group, n) for n in range(self._group.workers)]
        while True:
            for child in self._children:
                if child.ready and child.block is None and (block := self._next(listing)) is not None:
                    child.give(block)
            busy = any(child.block is not None for child in self._children)
            if listing.exhausted and not self._again and not busy:
                return
            by_connection = {child.connection: child for child in self._children}
            for connection in wait(list(by_connection), None if listing.exhausted else _POLL_SECONDS):
                assert isinstance(connection, Connection)
                record = self._receive(by_connection[connection])
                if record is not None:
                    yield record

    def _next(self, listing: "_Ahead") -> Block | None:
        return self._again.popleft() if self._again else listing.next()

    def _receive(self, child: _Child) -> PartRecord | None:
        try:
            kind, value = pickle.loads(child.connection.recv_bytes())
        except (EOFError, OSError):
            self._replace(child)
            return None
        if kind == "failed":
            if isinstance(value, FacepipeError):
                raise value
            raise WorkerError(f"a worker failed: {value}")
        child.ready = True
        if kind != "record":
            return None
        child.block = None
        return PartRecord.from_json(value)

    def _replace(self, child: _Child) -> None:
        child.stop()
        self._stillbirths = 0 if child.ready else self._stillbirths + 1
        if self._stillbirths >= _MAX_STILLBIRTHS:
            raise WorkerError(
                f"workers die before they are ready (the last with exit code {child.process.returncode}); "
                "is there enough memory? run.workers sets how many there are"
            )
        if child.block is not None:
            self._again.append(child.block)
        self._children[self._children.index(child)] = _Child(self._job, self._group, child.number)

    def stop(self) -> None:
        for child in self._children:
            child.stop()


class _Ahead:
    """Lists in a thread, a few blocks ahead of the workers."""

    def __init__(self, blocks: Iterable[Block]):
        self.exhausted = False
        self._queue: Queue[Block | BaseException | None] = Queue(_BLOCKS_AHEAD)
        self._stopped = False
        self._thread = threading.Thread(target=self._fill, args=(blocks,), name="listing", daemon=True)
        self._thread.start()

    def _fill(self, blocks: Iterable[Block]) -> None:
        try:
            for block in blocks:
                if self._stopped:
                    return
                self._queue.put(block)
            self._queue.put(None)
        except BaseException as error:
            self._queue.put(error)

    def next(self) -> Block | None:
        """The next block, or None where none is ready (yet, or any more: `exhausted`)."""
        try:
            found = self._queue.get_nowait()
        except Empty:
            return None
        if isinstance(found, BaseException):
            raise found
        self.exhausted = found is None
        return found

    def stop(self) -> None:
        """End the thread, or leave it behind (it is a daemon) where the listing itself hangs."""
        self._stopped = True
        with suppress(Empty):
            while True:
                self._queue.get_nowait()
        self._thread.join(1)
