"""Where the tasks of a step run: in this process, or on Ray if a step falls into several.

Everything that a task needs travels with it, and what it makes comes back, so that nodes need no folder in common. If a
node fails, its tasks are run again elsewhere.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

from facepipe.curation.graph.linkage import LinkageResult, LinkageTask, run_linkage_task
from facepipe.storage.partitions import Tables, TableTask
from pipelines.runtime.runners import ray


class StepRunner:
    """Runs the tasks of steps: of average linkage, and over tables."""

    def __init__(self, *, on_ray: bool, cpus: float):
        """Make a runner. Ray is started for the first step of several tasks.

        Args:
            on_ray: whether tasks may run on Ray.
            cpus: CPUs per Ray task.
        """
        self._on_ray = on_ray
        self._cpus = cpus
        self._is_started = False

    def run_linkage(self, tasks: Iterable[LinkageTask]) -> Iterator[LinkageResult]:
        """Run tasks of average linkage."""
        for _, result in self._run(run_linkage_task, tasks):
            yield result

    def run_tables(
        self, function: Callable[[TableTask, Any], Tables], tasks: Iterable[TableTask], shared: Any
    ) -> Iterator[tuple[int, Tables]]:
        """Run a function on tables."""
        for task, result in self._run(function, tasks, shared):
            yield task.number, result

    def _run(self, function: Callable[..., Any], tasks: Iterable[Any], *shared: Any) -> Iterator[tuple[Any, Any]]:
        """Yield each task and its result, in the order in which they finish."""
        waiting = iter(tasks)
        first = list(islice(waiting, 2)) if self._on_ray else []
        if len(first) < 2:
            for task in chain(first, waiting):
                yield task, function(task, *shared)
            return
        if not self._is_started:
            ray.start()
            self._is_started = True
        yield from ray.run_tasks(function, chain(first, waiting), self._cpus, shared=shared[0] if shared else None)

    def stop(self) -> None:
        """Disconnect from Ray."""
        if self._is_started:
            ray.stop()
            self._is_started = False


@contextmanager
def open_step_runner(*, on_ray: bool, cpus: float) -> Iterator[StepRunner]:
    """Open a runner, which is stopped in the end."""
    runner = StepRunner(on_ray=on_ray, cpus=cpus)
    try:
        yield runner
    finally:
        runner.stop()
