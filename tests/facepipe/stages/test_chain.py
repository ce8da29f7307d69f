"""Stages that work ahead or side by side: the same tables in the same order, errors where they were, time as it was."""

import threading
import time
from dataclasses import dataclass
from queue import Queue
from typing import Any, ClassVar

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.errors import SourceError
from facepipe.stages import Chain


@dataclass(frozen=True)
class Host:
    """Adds 1; fails at `bad`."""

    bad: int | None = None
    pause: float = 0.0

    needs: ClassVar = ("x",)
    adds: ClassVar = ("x",)

    def setup(self) -> None:
        pass

    def __call__(self, table: pa.Table) -> pa.Table:
        time.sleep(self.pause)
        if self.bad in table["x"].to_pylist():
            raise SourceError(f"{self.bad} is bad")
        return pa.table({"x": pa.array([x + 1 for x in table["x"].to_pylist()], pa.int64())})


@dataclass(frozen=True)
class Device(Host):
    """Doubles."""

    def __call__(self, table: pa.Table) -> pa.Table:
        time.sleep(self.pause)
        if self.bad in table["x"].to_pylist():
            raise RuntimeError(f"{self.bad} is bad")
        return pa.table({"x": pa.array([2 * x for x in table["x"].to_pylist()], pa.int64())})


def numbers(n: int) -> pa.Table:
    return pa.table({"x": pa.array(range(n), pa.int64())})


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 30), st.integers(1, 9), st.integers(0, 3), st.integers(1, 5))
def test_what_comes_out_does_not_depend_on_who_works_ahead(n: int, batch: int, ahead: int, parallel: int) -> None:
    chain = Chain((Host(), Host(), Device()), batch, ahead, parallel)
    assert chain(numbers(n))["x"].to_pylist() == [2 * (x + 2) for x in range(n)]
    assert set(chain.seconds) == {"host", "device"}


@pytest.mark.parametrize(("ahead", "parallel"), [(0, 1), (1, 1), (0, 3), (1, 3)])
def test_errors_are_raised_and_the_chain_goes_on_afterwards(ahead: int, parallel: int) -> None:
    threads = threading.active_count()
    for stages, kind in (((Host(bad=7), Device()), SourceError), ((Host(), Device(bad=7)), RuntimeError)):
        chain = Chain(stages, 2, ahead, parallel)
        for _ in range(3):
            with pytest.raises(kind, match="7 is bad"):
                chain(numbers(40))
        assert chain(numbers(4))["x"].to_pylist() == [2, 4, 6, 8]
        assert threading.active_count() == threads, "no thread is left behind"


def test_host_and_device_work_at_the_same_time() -> None:
    """While the device has a batch, the host begins the next one. One after the other, the device would wait for ever."""
    begun = {n: threading.Event() for n in range(13)}
    begun[12].set()  # there is no batch after the last

    @dataclass(frozen=True)
    class Reading(Host):
        def __call__(self, table: pa.Table) -> pa.Table:
            begun[table["x"][0].as_py()].set()
            return table

    @dataclass(frozen=True)
    class Computing(Host):
        def __call__(self, table: pa.Table) -> pa.Table:
            assert begun[table["x"][0].as_py() + 1].wait(60), "the host works on no batch meanwhile"
            return table

    assert Chain((Reading(), Computing()), 1, 1)(numbers(12)).num_rows == 12


def test_each_stage_is_timed_and_no_wait_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread has a clock of its own here, which the work of its stages moves, and waiting for the other thread."""
    clock = threading.local()

    def work(seconds: float) -> None:
        clock.now = now() + seconds

    def now() -> float:
        return getattr(clock, "now", 0.0)

    class SlowQueue(Queue[Any]):
        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            work(100)
            return super().get(block, timeout)

        def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
            work(100)
            super().put(item, block, timeout)

    monkeypatch.setattr("facepipe.stages.chain.Queue", SlowQueue)
    monkeypatch.setattr(time, "sleep", work)
    monkeypatch.setattr(time, "perf_counter", now)
    for ahead in (0, 1):
        chain = Chain((Host(pause=0.25), Device(pause=0.5)), 1, ahead)
        chain(numbers(12))
        assert chain.seconds == {"host": 12 * 0.25, "device": 12 * 0.5}


def test_one_batch_is_ahead_and_no_more() -> None:
    made: list[int] = []

    @dataclass(frozen=True)
    class Noting(Host):
        def __call__(self, table: pa.Table) -> pa.Table:
            made.append(table["x"][0].as_py())
            return table

    @dataclass(frozen=True)
    class Slow(Host):
        def __call__(self, table: pa.Table) -> pa.Table:
            time.sleep(0.05)
            assert len(made) <= table["x"][0].as_py() + 3, "this one, one that waits and one that is being made"
            return table

    Chain((Noting(), Slow()), 1, 1)(numbers(8))
    assert made == list(range(8))


def test_tables_are_worked_on_side_by_side() -> None:
    """Each waits until another one has come to the device; one after the other they would wait for ever."""
    arrived = threading.Barrier(3)

    @dataclass(frozen=True)
    class Computing(Host):
        def __call__(self, table: pa.Table) -> pa.Table:
            arrived.wait(60)
            return table

    assert Chain((Host(), Computing()), 1, 1, parallel=3)(numbers(9)).num_rows == 9


def test_no_more_tables_are_in_work_than_asked_for() -> None:
    made: list[int] = []

    @dataclass(frozen=True)
    class Noting(Host):
        def __call__(self, table: pa.Table) -> pa.Table:
            made.append(table["x"][0].as_py())
            return table

    @dataclass(frozen=True)
    class Computing(Host):
        def __call__(self, table: pa.Table) -> pa.Table:
            assert len(made) <= table["x"][0].as_py() + 3 + 2, (
                "three in work, one that waits and one that is being made"
            )
            return table

    Chain((Noting(), Computing()), 1, 1, parallel=3)(numbers(12))
