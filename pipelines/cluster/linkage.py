"""Where the tasks of average linkage run: in this process, or on Ray if a step falls into several."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice

from facepipe.curation.graph.linkage import LinkageResult, LinkageTask, RunTasks, run_linkage_task, run_tasks_here
from pipelines.runtime.runners import ray


@contextmanager
def open_linkage_runner(on_ray: bool, cpus: float) -> Iterator[RunTasks]:
    """Open what runs the tasks of a step. They travel with the sums of their clusters, and need no shared folder.

    Args:
        on_ray: whether tasks may run on Ray, which is started for the first step of several tasks.
        cpus: CPUs per Ray task.
    """
    if not on_ray:
        yield run_tasks_here
        return
    is_started = False

    def run_tasks(tasks: Iterable[LinkageTask]) -> Iterable[LinkageResult]:
        nonlocal is_started
        waiting = iter(tasks)
        first = list(islice(waiting, 2))
        if len(first) < 2:
            yield from run_tasks_here(first)
            return
        if not is_started:
            ray.start()
            is_started = True
        for _, result in ray.run_tasks(run_linkage_task, chain(first, waiting), cpus):
            yield result

    try:
        yield run_tasks
    finally:
        if is_started:
            ray.stop()
