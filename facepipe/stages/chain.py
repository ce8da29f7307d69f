"""A chain of stages: checked before a worker starts, run in batches, timed by stage."""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, Full, Queue
from threading import Event, Lock, Thread
from typing import Any, ClassVar, Protocol

import pyarrow as pa

from facepipe.errors import ConfigError

# How often a thread that waits for room in the queue looks whether it is to stop.
_POLL_SECONDS = 0.1
DEFAULT_BATCH_BYTES = 64 << 20
"""Bytes that a stage puts out per batch, by default."""


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
    """Stages that run one after the other on batches of rows, so that memory does not grow with the table.

    The first stage may have a method `prepare`, which gets the whole table before its batches.

    A stage whose output may be large has a method `estimate_bytes`, which tells from its input how many bytes each row
    will take. Its batches are cut so that each puts out no more than `batch_bytes`.

    Attributes:
        seconds: seconds of work per stage since the last `clear_figures`, added up over threads.
        bytes: bytes that each stage put out since then.
    """

    def __init__(
        self,
        stages: Sequence[Any],
        batch: int = 16,
        ahead: int = 0,
        parallel: int = 1,
        batch_bytes: int = DEFAULT_BATCH_BYTES,
    ):
        """Make a chain.

        Args:
            stages: the stages, in order.
            batch: maximum number of rows per batch.
            batch_bytes: maximum number of bytes that a stage puts out per batch, as far as it knows them before. A row
                that takes more is a batch of its own.
            ahead: number of first stages that work in a thread, one batch ahead of the others. This pays if the others
                wait for a device.
            parallel: number of batches on which the other stages work at a time, each batch in a thread. While one
                waits for a device, the others keep it busy, and none waits for what another has queued.
        """
        self.stages: tuple[Any, ...] = tuple(stages)
        self.batch = batch
        self.ahead = ahead
        self.parallel = parallel
        self.batch_bytes = batch_bytes
        self.seconds: dict[str, float] = defaultdict(float)
        self.bytes: dict[str, int] = defaultdict(int)
        self._lock = Lock()

    def clear_figures(self) -> None:
        """Begin the figures per stage anew."""
        self.seconds.clear()
        self.bytes.clear()

    def setup(self) -> None:
        """Set every stage up."""
        for stage in self.stages:
            stage.setup()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Run all stages on a table."""
        return pa.concat_tables(self.iterate(table))

    def iterate(self, table: pa.Table) -> Iterator[pa.Table]:
        """Run all stages on a table, and yield the result in batches, in order."""
        if self.stages and hasattr(self.stages[0], "prepare"):
            self.stages[0].prepare(table)
        # An empty table is one batch, so that its result has the columns too.
        batches = [table.slice(start, self.batch) for start in range(0, table.num_rows, self.batch)] or [table]
        early_stages = self.stages[: self.ahead]
        late_stages = self.stages[self.ahead :]
        # Generators: nothing is computed before the last stage asks for a table.
        prepared = self._run_stages(early_stages, batches)
        if not self.ahead:
            yield from self._run_parallel(late_stages, prepared)
            return
        with _Prefetcher(prepared) as prefetched:
            yield from self._run_parallel(late_stages, prefetched)

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

    def _run_table(self, stages: Sequence[Any], table: pa.Table) -> pa.Table:
        """Run stages on one table."""
        return pa.concat_tables(self._run_stages(stages, [table]))

    def _run_stages(self, stages: Sequence[Any], tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Run stages on tables lazily: a table is computed when the caller asks for it."""
        results = iter(tables)
        for stage in stages:
            results = self._run_stage(stage, results)
        return results

    def _run_stage(self, stage: Any, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """Run one stage on tables, and count its time and what it puts out."""
        if hasattr(stage, "estimate_bytes"):
            tables = _cut_by_bytes(tables, stage.estimate_bytes, self.batch_bytes)
        for table in tables:
            start = time.perf_counter()
            result = stage(table)
            del table  # what it holds need not wait for the next one
            with self._lock:
                self.seconds[get_stage_name(stage)] += time.perf_counter() - start
                self.bytes[get_stage_name(stage)] += result.nbytes
            yield result
            del result


def _cut_by_bytes(
    tables: Iterable[pa.Table], estimate_bytes: Callable[[pa.Table], Sequence[int]], max_bytes: int
) -> Iterator[pa.Table]:
    """Cut tables into slices whose estimated bytes do not exceed a maximum, or that have one row."""
    for table in tables:
        start = 0
        total = 0
        for row, size in enumerate(estimate_bytes(table)):
            if row > start and total + size > max_bytes:
                yield table.slice(start, row - start)
                start = row
                total = 0
            total += size
        yield table.slice(start)


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
