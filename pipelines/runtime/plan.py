"""How a chain of stages is laid out over workers: data that a runner reads, computed from what the machines have."""

import os
from dataclasses import dataclass
from typing import Literal

from facepipe.errors import ConfigError
from facepipe.models.runtime.device import count_gpus

Layout = Literal["fused", "split"]
STAGES = ("read", "decode", "detect", "align", "embed")


@dataclass(frozen=True)
class Resources:
    """CPUs and GPUs to be used, over all machines.

    cpus_per_gpu: CPUs to each GPU on the machine where they are fewest; None: all are on one machine
    """

    cpus: int
    gpus: int = 0
    cpus_per_gpu: int | None = None


@dataclass(frozen=True)
class WorkerGroup:
    """Stages that share a worker, how many such workers there are, and what each occupies."""

    stages: tuple[str, ...]
    workers: int
    cpus: float
    gpus: float = 0

    @property
    def threads(self) -> int:
        """Threads a worker may use."""
        return max(1, int(self.cpus))

    @property
    def batch(self) -> int:
        """Images a worker holds decoded at a time: on a GPU enough of each common shape to fill a batch there."""
        return 256 if self.gpus else 16


@dataclass(frozen=True)
class WorkerPlan:
    """Groups in the order of the chain; work items enter the first, the last writes."""

    groups: tuple[WorkerGroup, ...]

    @property
    def workers(self) -> int:
        """Workers of the widest group."""
        return max(group.workers for group in self.groups)

    @property
    def largest_block(self) -> int:
        """Images of one unit of work at most."""
        return 4096 if any(group.gpus for group in self.groups) else 512


def make_plan(resources: Resources, workers: int | None = None, layout: Layout = "fused") -> WorkerPlan:
    """Without a GPU one single-threaded worker a CPU runs the whole chain: work items travel, pixels never do.

    With GPUs one worker a GPU does, with an equal share of the CPUs for decoding. `split` instead gives reading and
    decoding to CPU workers and the models to GPU workers, for machines whose CPUs are elsewhere than their GPUs.
    """
    cpus, devices = resources.cpus, resources.gpus
    if devices == 0:
        if layout == "split":
            raise ConfigError("run.layout=split puts the models on GPUs, and there is none")
        return WorkerPlan((WorkerGroup(STAGES, workers or max(1, cpus), 1),))
    if layout == "fused":
        count = min(workers or devices, devices)
        each = max(1, cpus // count)
        # A worker that asks for more CPUs than its GPU's machine has would be waited for in vain.
        return WorkerPlan(
            (
                WorkerGroup(
                    STAGES, count, each if resources.cpus_per_gpu is None else min(each, resources.cpus_per_gpu), 1
                ),
            )
        )
    decoders = max(1, workers or cpus - devices)
    # The same, where decoders have taken the CPUs of a GPU's machine: on several machines GPU workers ask for none.
    left = max(0, (cpus - decoders) // devices) if resources.cpus_per_gpu is None else 0
    return WorkerPlan((WorkerGroup(STAGES[:2], decoders, 1), WorkerGroup(STAGES[2:], devices, left, 1)))


def detect_local_resources() -> Resources:
    """CPUs this process may use, and GPUs that torch sees."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Resources(cpus, count_gpus())
