"""A chain of stages: checked before a worker starts, run in batches, timed by stage."""

import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, Full, Queue
from threading import Event, Lock, Thread
from typing import Any, ClassVar, Protocol

import pyarrow as pa

from facepipe.errors import ConfigError

# How often a thread that waits for room in the queue looks whether it is to stop.
_POLL_SECONDS = 0.1


class Stage(Protocol):
    """A step of the chain: a frozen dataclass that is its own config.

    Attributes:
        needs: columns that its input must have
        adds: columns that it adds
    """

    needs: ClassVar[tuple[str, ...]]
    adds: ClassVar[tuple[str, ...]]

    def setup(self) -> None:
        """Load what the stage works with, once per worker."""

    def __call__(self, table: pa.Table) -> pa.Table:
        """Turn a table into the table that the next stage takes."""


class Chain:
    """Stages that run one after the other on batches of rows, so that memory does not grow with the table."""

    def __init__(self, stages: Sequence[Any], batch: int = 16, ahead: int = 0, parallel: int = 1):
        """Make a chain.

        Args:
            stages: the stages, in order.
            batch: rows per batch.
            ahead: number of first stages that work in a thread, one batch ahead of the others. This pays if the others
                wait for a device.
            parallel: number of batches on which the other stages work at a time, each batch in a thread. While one
                waits for a device, the others keep it busy, and none waits for what another has queued.
        """
        self.stages: tuple[Any, ...] = tuple(stages)
        self.batch = batch
        self.ahead = ahead
        self.parallel = parallel
        # Seconds of work by stage, added up over threads.
        self.seconds: dict[str, float] = defaultdict(float)
        self._lock = Lock()

    def setup(self) -> None:
        """Set every stage up."""
        for stage in self.stages:
            stage.setup()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Run all stages on a table."""
        # An empty table is one batch, so that its result has the columns too.
        batches = [table.slice(start, self.batch) for start in range(0, table.num_rows, self.batch)] or [table]
        early_stages = self.stages[: self.ahead]
        late_stages = self.stages[self.ahead :]
        # Generators: nothing is computed before the last stage asks for a table.
        prepared = self._run_stages(early_stages, batches)
        if not self.ahead or len(batches) == 1:
            return pa.concat_tables(self._run_parallel(late_stages, prepared))
        with _Prefetcher(prepared) as prefetched:
            return pa.concat_tables(self._run_parallel(late_stages, prefetched))

    def _run_parallel(self, stages: Sequence[Any], tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Run stages on several tables at a time, and yield the results in order."""
        if self.parallel <= 1:
            yield from self._run_stages(stages, tables)
            return
        pending: deque[Future[pa.Table]] = deque()
        with ThreadPoolExecutor(self.parallel, "tables") as pool:
            try:
                for table in tables:
                    pending.append(pool.submit(self._run_table, stages, table))
                    if len(pending) == self.parallel:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                # After an error the tables that no thread has begun are left out.
                for future in pending:
                    future.cancel()

    def _run_stages(self, stages: Sequence[Any], tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Run stages on tables lazily: a table is computed when the caller asks for it."""
        for table in tables:
            yield self._run_table(stages, table)

    def _run_table(self, stages: Sequence[Any], table: pa.Table) -> pa.Table:
        """Run stages on one table, and count their time."""
        for stage in stages:
            start = time.perf_counter()
            table = stage(table)
            with self._lock:
                self.seconds[get_stage_name(stage)] += time.perf_counter() - start
        return table


class _Prefetcher:
    """Tables that a thread computes: it works on one while another waits.

    An error in the thread is raised again where the table is asked for.
    """

    def __init__(self, items: Iterator[pa.Table]):
        self._queue: Queue[tuple[pa.Table | None, BaseException | None]] = Queue(1)
        self._stopped = Event()
        self._thread = Thread(target=self._fill, args=(items,), name="ahead", daemon=True)

    def __enter__(self) -> Iterator[pa.Table]:
        self._thread.start()
        return self._iterate()

    def __exit__(self, *_: object) -> None:
        """Wait for the thread: the next call reuses the stages."""
        self._stopped.set()
        # Make room in the queue: a thread that waits to put a table goes on at once.
        with suppress(Empty):
            self._queue.get_nowait()
        self._thread.join()

    def _iterate(self) -> Iterator[pa.Table]:
        while True:
            table, error = self._queue.get()
            if error is not None:
                raise error
            if table is None:
                return
            yield table

    def _fill(self, items: Iterator[pa.Table]) -> None:
        """Queue all tables, then None; or the error that ended them."""
        try:
            for table in items:
                if not self._put(table, None):
                    return
            self._put(None, None)
        except BaseException as error:
            self._put(None, error)

    def _put(self, table: pa.Table | None, error: BaseException | None) -> bool:
        """Queue a table or an error; return False if the prefetcher was stopped instead."""
        while not self._stopped.is_set():
            with suppress(Full):
                self._queue.put((table, error), timeout=_POLL_SECONDS)
                return True
        return False


def get_stage_name(stage: Any) -> str:
    """Return the name under which a stage's time is recorded: its `stage_name`, or its class name in lower case."""
    return str(getattr(stage, "stage_name", type(stage).__name__.lower()))


def check_chain(stages: Iterable[Any], columns: Iterable[str]) -> None:
    """Check that every stage finds its columns.

    Args:
        stages: the stages, in order.
        columns: columns of the first stage's input.

    Raises:
        ConfigError: A stage needs a column that neither the input nor an earlier stage has.
    """
    # Columns that are known before each stage: those of the input and of all stages before.
    known = set(columns)
    for stage in stages:
        missing = [name for name in stage.needs if name not in known]
        if missing:
            raise ConfigError(
                f"the stage {type(stage).__name__} needs {', '.join(missing)}, which no stage before it adds"
            )
        known |= set(stage.adds)
