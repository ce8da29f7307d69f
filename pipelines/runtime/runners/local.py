"""Run a pool of processes on this machine. If a process crashes, a new one replaces it, and its block is retried."""

import os
import pickle
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from queue import Empty, SimpleQueue

from facepipe.errors import FacepipeError, WorkerError
from facepipe.gallery.commits.parts import PartRecord
from facepipe.sources.blocks import Block, encode_block
from pipelines.runtime.plan import WorkerGroup
from pipelines.runtime.worker import DEVICE_FAULT_CODE, WorkerJob

# Listed blocks that wait for a worker: enough that no worker waits for the listing, and few in memory.
# Work items that are listed ahead of the workers: of 300 bytes each, some 200,000.
_AHEAD_BYTES = 64 << 20
# Crashes in a row before a worker is ready. Later crashes leave a mark each, so that they come to an end.
_MAX_FAILED_STARTS = 4
# Time between two looks at the listing, as long as it goes on.
_POLL_SECONDS = 0.05


class _ChildProcess:
    """A worker process, and the block that it works on."""

    def __init__(self, job: bytes, group: WorkerGroup, number: int):
        self.number = number
        self.connection, child_end = Pipe()
        command = [sys.executable, "-m", "pipelines.runtime.runners.child", str(child_end.fileno())]
        # Ctrl-C goes to the driver, which decides what happens to the blocks: the process has a session of its own.
        self.process = subprocess.Popen(
            command,
            pass_fds=[child_end.fileno()],
            env=_build_environment(group, number),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        child_end.close()
        self.block: Block | None = None
        self.is_ready = False
        self._send(job)

    def send_block(self, block: Block) -> None:
        """Send the next block."""
        self.block = block
        self._send(pickle.dumps(encode_block(block)))

    def _send(self, data: bytes) -> None:
        # If the process has crashed, the pool notices when it reads.
        with suppress(OSError):
            self.connection.send_bytes(data)

    def stop(self) -> None:
        """End the process, and wait for its end."""
        self.connection.close()
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait()


def _build_environment(group: WorkerGroup, number: int) -> dict[str, str]:
    """Build the environment of a worker process: this one's imports, its threads, and one GPU."""
    # Threads are limited by variables because libraries read them when they are loaded.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment["OMP_NUM_THREADS"] = str(group.threads)
    if group.gpus:
        # Workers take the GPUs that this process may use in turn; several may share one.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpu = number % group.devices
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu].strip() if visible else str(gpu)
    return environment


def run(blocks: Callable[[], Iterable[Block]], job: WorkerJob, group: WorkerGroup) -> Iterator[PartRecord]:
    """Yield the records of blocks as workers finish them.

    Args:
        blocks: lists the blocks.
        job: what each worker runs.
        group: number of workers, and what each uses.

    Raises:
        FacepipeError: A worker raised it.
        WorkerError: A worker failed in another way, or workers crash before they are ready.
    """
    pool = _ProcessPool(pickle.dumps(job), group)
    listing = _ListingThread(blocks())
    try:
        yield from pool.run_blocks(listing)
    finally:
        pool.stop()
        listing.stop()


class _ProcessPool:
    """The worker processes, and the blocks to retry."""

    def __init__(self, job: bytes, group: WorkerGroup):
        self._job = job
        self._group = group
        self._children: list[_ChildProcess] = []
        self._retries: deque[Block] = deque()
        self._failed_starts = 0

    def run_blocks(self, listing: "_ListingThread") -> Iterator[PartRecord]:
        """Send blocks to idle workers, and yield records as they come, until all blocks are finished."""
        # Give each idle worker a block: one to retry first, then the next of the listing.
        self._children = [_ChildProcess(self._job, self._group, n) for n in range(self._group.workers)]
        while True:
            for child in self._children:
                if child.is_ready and child.block is None:
                    block = self._get_next_block(listing)
                    if block is not None:
                        child.send_block(block)
            # The work is finished if nothing is listed, to be retried or in work any more.
            is_busy = any(child.block is not None for child in self._children)
            if listing.exhausted and not self._retries and not is_busy:
                return
            # While the source is being listed, look for new blocks again soon.
            timeout = None if listing.exhausted else _POLL_SECONDS
            child_by_connection = {child.connection: child for child in self._children}
            for connection in wait(list(child_by_connection), timeout):
                assert isinstance(connection, Connection)
                record = self._receive(child_by_connection[connection])
                if record is not None:
                    yield record

    def _get_next_block(self, listing: "_ListingThread") -> Block | None:
        return self._retries.popleft() if self._retries else listing.get_next()

    def _receive(self, child: _ChildProcess) -> PartRecord | None:
        """Receive a message of a worker; return the record if it is one."""
        try:
            # A connection that ends without a message means that the process has crashed.
            kind, value = pickle.loads(child.connection.recv_bytes())
        except (EOFError, OSError):
            self._replace(child)
            return None
        if kind == "failed":
            if isinstance(value, FacepipeError):
                raise value
            raise WorkerError(f"a worker failed: {value}")
        child.is_ready = True
        if kind != "record":
            return None
        child.block = None
        return PartRecord.from_json(value)

    def _replace(self, child: _ChildProcess) -> None:
        """Replace a crashed worker, and retry its block."""
        child.stop()
        # Faults of GPUs are counted per GPU, by the workers themselves.
        if child.process.returncode != DEVICE_FAULT_CODE:
            self._failed_starts = 0 if child.is_ready else self._failed_starts + 1
        if self._failed_starts >= _MAX_FAILED_STARTS:
            raise WorkerError(
                f"workers crash before they are ready (the last with exit code {child.process.returncode}). If memory "
                "is short, set a smaller run.workers"
            )
        if child.block is not None:
            self._retries.append(child.block)
        self._children[self._children.index(child)] = _ChildProcess(self._job, self._group, child.number)

    def stop(self) -> None:
        """End all workers."""
        for child in self._children:
            child.stop()


class _ListingThread:
    """A thread that lists blocks ahead of the workers.

    It lists as far ahead as a budget of bytes allows. Of most sources that is to their end, and the number of their
    images is then known soon.
    """

    def __init__(self, blocks: Iterable[Block], budget_bytes: int = _AHEAD_BYTES):
        self.exhausted = False
        self._queue: SimpleQueue[Block | BaseException | None] = SimpleQueue()
        self._budget_bytes = budget_bytes
        self._queued_bytes = 0
        self._has_changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._fill, args=(blocks,), name="listing", daemon=True)
        self._thread.start()

    def _fill(self, blocks: Iterable[Block]) -> None:
        """Queue all blocks, then None; or the error that ended the listing."""
        try:
            for block in blocks:
                self._wait_for_room()
                if self._stopped:
                    return
                with self._has_changed:
                    self._queued_bytes += block.items.nbytes
                self._queue.put(block)
            self._queue.put(None)
        except BaseException as error:
            self._queue.put(error)

    def _wait_for_room(self) -> None:
        """Wait until less than the budget is queued, so that a block of any size fits into an empty queue."""
        with self._has_changed:
            self._has_changed.wait_for(lambda: self._stopped or self._queued_bytes < self._budget_bytes)

    def get_next(self) -> Block | None:
        """Return the next block. None: there is none yet, or no more (`exhausted`)."""
        try:
            block = self._queue.get_nowait()
        except Empty:
            return None
        if isinstance(block, BaseException):
            raise block
        if block is None:
            self.exhausted = True
            return None
        with self._has_changed:
            self._queued_bytes -= block.items.nbytes
            self._has_changed.notify()
        return block

    def stop(self) -> None:
        """End the thread. If the listing itself hangs, leave the thread behind: it is a daemon."""
        with self._has_changed:
            self._stopped = True
            self._has_changed.notify()
        self._thread.join(1)
