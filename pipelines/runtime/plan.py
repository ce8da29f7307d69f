"""How a chain of stages is spread over workers: data that a runner reads, computed from what the machines have."""

import math
import os
from dataclasses import dataclass
from typing import Literal

from facepipe.errors import ConfigError
from facepipe.models.runtime.device import count_gpus

Layout = Literal["fused", "split"]
STAGES = ("read", "decode", "detect", "align", "embed")
_DECODING_STAGES = STAGES[:2]
_MODEL_STAGES = STAGES[2:]


@dataclass(frozen=True)
class Resources:
    """CPUs and GPUs to use, over all machines.

    Attributes:
        cpus: number of CPUs
        gpus: number of GPUs
        cpus_per_gpu: CPUs per GPU on the machine that has the fewest; None if all are on one machine
    """

    cpus: int
    gpus: int = 0
    cpus_per_gpu: int | None = None


@dataclass(frozen=True)
class WorkerGroup:
    """Stages that share a worker, and the workers that run them.

    Attributes:
        stages: names of the stages, in order
        workers: number of workers
        cpus: CPUs per worker
        gpus: GPUs per worker
    """

    stages: tuple[str, ...]
    workers: int
    cpus: float
    gpus: float = 0

    @property
    def threads(self) -> int:
        """Threads that a worker may use."""
        return max(1, int(self.cpus))

    @property
    def devices(self) -> int:
        """GPUs of all workers together."""
        return math.ceil(self.workers * self.gpus)

    @property
    def batch(self) -> int:
        """Images that a worker decodes at a time. On a GPU they fill batches of the common shapes."""
        return 256 if self.gpus else 16

    @property
    def parallel(self) -> int:
        """Batches on which a worker's models work at a time, so that a GPU has work while one of them waits for it."""
        return 4 if self.gpus else 1


@dataclass(frozen=True)
class WorkerPlan:
    """Groups of workers in the order of the chain. Work items enter the first group, and the last group writes.

    Attributes:
        groups: the groups
    """

    groups: tuple[WorkerGroup, ...]

    @property
    def workers(self) -> int:
        """Number of workers of the largest group."""
        return max(group.workers for group in self.groups)

    @property
    def largest_block(self) -> int:
        """Maximum number of images per unit of work."""
        return 4096 if any(group.gpus for group in self.groups) else 512


def make_plan(resources: Resources, workers: int | None = None, layout: Layout = "fused") -> WorkerPlan:
    """Spread the stages over workers.

    Without GPUs, one single-threaded worker per CPU runs the whole chain: work items travel, pixels never do. With
    GPUs, one worker per GPU does, with an equal share of the CPUs for decoding.

    Args:
        resources: what the machines have.
        workers: number of workers; default: one per CPU, or one per GPU.
        layout: `split` gives reading and decoding to CPU workers and the models to GPU workers, for clusters whose CPUs
            are not on the machines with GPUs.

    Raises:
        ConfigError: The layout needs GPUs, and there are none.
    """
    if resources.gpus == 0:
        if layout == "split":
            raise ConfigError("run.layout=split needs GPUs, and there are none: set run.layout=fused")
        return WorkerPlan((WorkerGroup(STAGES, workers or max(1, resources.cpus), 1),))
    if layout == "fused":
        return WorkerPlan((_make_gpu_group(resources, workers),))
    return _make_split_plan(resources, workers)


def _make_gpu_group(resources: Resources, workers: int | None) -> WorkerGroup:
    """Make the group of workers that run all stages, each with a GPU."""
    count = min(workers or resources.gpus, resources.gpus)
    cpus = max(1, resources.cpus // count)
    if resources.cpus_per_gpu is not None:
        # Ray would wait forever for a machine that has more CPUs per GPU than any.
        cpus = min(cpus, resources.cpus_per_gpu)
    return WorkerGroup(STAGES, count, cpus, 1)


def _make_split_plan(resources: Resources, workers: int | None) -> WorkerPlan:
    """Make a group of workers that decode, and one of workers that run the models, each with a GPU."""
    # One CPU per GPU stays free for the process that runs the models.
    decoders = max(1, workers or resources.cpus - resources.gpus)
    # On several machines GPU workers request no CPUs: decoders may have taken all CPUs of a GPU's machine.
    is_one_machine = resources.cpus_per_gpu is None
    cpus = max(0, (resources.cpus - decoders) // resources.gpus) if is_one_machine else 0
    return WorkerPlan((WorkerGroup(_DECODING_STAGES, decoders, 1), WorkerGroup(_MODEL_STAGES, resources.gpus, cpus, 1)))


def detect_local_resources() -> Resources:
    """Count the CPUs that this process may use, and the GPUs that torch sees."""
    # The affinity respects limits that the system sets for this process, which the number of CPUs does not.
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Resources(cpus, count_gpus())
