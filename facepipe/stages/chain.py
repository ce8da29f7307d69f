"""A chain of stages: checked before any worker starts, run in batches, timed."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any, ClassVar, Protocol

import pyarrow as pa

from facepipe.errors import ConfigError

_POLL_SECONDS = 0.1


class Stage(Protocol):
    """A frozen dataclass that is its own config; it names the columns it needs and adds."""

    needs: ClassVar[tuple[str, ...]]
    adds: ClassVar[tuple[str, ...]]

    def setup(self) -> None:
        """Load what the stage works with, once per worker."""

    def __call__(self, table: pa.Table) -> pa.Table: ...


class Chain:
    """Stages one after the other, `batch` rows at a time, so that memory does not grow with the table.

    ahead: so many of the first stages work in a thread, one batch ahead of the others, where these wait for a device. A
    stage with `stream` (tables -> tables, in order) is given the batches through it, and may have several in hand
    """

    def __init__(self, stages: Sequence[Any], batch: int = 16, ahead: int = 0):
        self.stages: tuple[Any, ...] = tuple(stages)
        self.batch, self.ahead = batch, ahead
        self.seconds: dict[str, float] = defaultdict(float)

    def setup(self) -> None:
        """Set every stage up."""
        for stage in self.stages:
            stage.setup()

    def __call__(self, table: pa.Table) -> pa.Table:
        tables = [table.slice(at, self.batch) for at in range(0, table.num_rows, self.batch)] or [table]
        begun = self._through(self.stages[: self.ahead], tables)
        if not self.ahead or len(tables) == 1:
            return pa.concat_tables(self._through(self.stages[self.ahead :], begun))
        with _Ahead(begun) as made:
            return pa.concat_tables(self._through(self.stages[self.ahead :], made))

    def _through(self, stages: Sequence[Any], tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """The tables after the stages, each made when it is asked for."""
        found = iter(tables)
        for stage in stages:
            found = self._timed(stage, found)
        return found

    def _timed(self, stage: Any, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """The tables after one stage, whose time is what passes here and not in making the tables it is given."""
        given = _Timed(tables)
        results = _Timed(stage.stream(given) if hasattr(stage, "stream") else map(stage, given))
        before = 0.0
        for table in results:
            spent = results.seconds - given.seconds
            self.seconds[get_stage_name(stage)] += spent - before
            before = spent
            yield table


class _Timed:
    """An iterator that counts the seconds it is waited for."""

    def __init__(self, items: Iterator[pa.Table]):
        self._items, self.seconds = items, 0.0

    def __iter__(self) -> Iterator[pa.Table]:
        return self

    def __next__(self) -> pa.Table:
        began = time.perf_counter()
        try:
            return next(self._items)
        finally:
            self.seconds += time.perf_counter() - began


class _Ahead:
    """Items that a thread makes: one is made while one waits. What is raised there is raised where it is asked for."""

    def __init__(self, items: Iterator[pa.Table]):
        self._queue: Queue[tuple[pa.Table | None, BaseException | None]] = Queue(1)
        self._stopped = Event()
        self._thread = Thread(target=self._fill, args=(items,), name="ahead", daemon=True)

    def __enter__(self) -> Iterator[pa.Table]:
        self._thread.start()
        return self._taken()

    def __exit__(self, *_: object) -> None:
        """The stages are not left while they work: the next call may use them."""
        self._stopped.set()
        with suppress(Empty):
            self._queue.get_nowait()
        self._thread.join()

    def _taken(self) -> Iterator[pa.Table]:
        while True:
            item, error = self._queue.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item

    def _fill(self, items: Iterator[pa.Table]) -> None:
        try:
            for item in items:
                if not self._put(item, None):
                    return
            self._put(None, None)
        except BaseException as error:
            self._put(None, error)

    def _put(self, item: pa.Table | None, error: BaseException | None) -> bool:
        """Whether there was still somebody to take it."""
        while not self._stopped.is_set():
            with suppress(Full):
                self._queue.put((item, error), timeout=_POLL_SECONDS)
                return True
        return False


def get_stage_name(stage: Any) -> str:
    """Return the name under which a stage's time is recorded: its `stage_name`, or its class name in lower case."""
    return str(getattr(stage, "stage_name", type(stage).__name__.lower()))


def check_chain(stages: Iterable[Any], columns: Iterable[str]) -> None:
    """Raise ConfigError where a stage needs a column that neither the input nor a stage before it has."""
    have = set(columns)
    for stage in stages:
        missing = [name for name in stage.needs if name not in have]
        if missing:
            raise ConfigError(
                f"the stage {type(stage).__name__} needs {', '.join(missing)}, which no stage before it adds"
            )
        have |= set(stage.adds)
