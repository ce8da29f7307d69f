"""How a chain of stages is laid out over workers: data that a runner reads, computed from what the machines have."""

import os
from dataclasses import dataclass
from typing import Literal

from facepipe.errors import ConfigError
from facepipe.models.runtime.device import count_gpus

Layout = Literal["fused", "split"]
ALL = ("read", "decode", "detect", "align", "embed")


@dataclass(frozen=True)
class Resources:
    """CPUs and GPUs to be used, over all machines.

    beside: CPUs to each GPU on the machine where they are fewest; None: all are on one machine
    """

    cpus: int
    gpus: int = 0
    beside: int | None = None


@dataclass(frozen=True)
class Group:
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
class Plan:
    """Groups in the order of the chain; work items enter the first, the last writes."""

    groups: tuple[Group, ...]

    @property
    def workers(self) -> int:
        """Workers of the widest group."""
        return max(group.workers for group in self.groups)

    @property
    def block(self) -> int:
        """Images of one unit of work at most."""
        return 4096 if any(group.gpus for group in self.groups) else 512


def make_plan(resources: Resources, workers: int | None = None, layout: Layout = "fused") -> Plan:
    """Without a GPU one single-threaded worker a CPU runs the whole chain: work items travel, pixels never do.

    With GPUs one worker a GPU does, with an equal share of the CPUs for decoding. `split` instead gives reading and
    decoding to CPU workers and the models to GPU workers, for machines whose CPUs are elsewhere than their GPUs.
    """
    cpus, devices = resources.cpus, resources.gpus
    if devices == 0:
        if layout == "split":
            raise ConfigError("run.layout=split puts the models on GPUs, and there is none")
        return Plan((Group(ALL, workers or max(1, cpus), 1),))
    if layout == "fused":
        count = min(workers or devices, devices)
        each = max(1, cpus // count)
        # A worker that asks for more CPUs than its GPU's machine has would be waited for in vain.
        return Plan((Group(ALL, count, each if resources.beside is None else min(each, resources.beside), 1),))
    decoders = max(1, workers or cpus - devices)
    # The same, where decoders have taken the CPUs of a GPU's machine: on several machines GPU workers ask for none.
    left = max(0, (cpus - decoders) // devices) if resources.beside is None else 0
    return Plan((Group(ALL[:2], decoders, 1), Group(ALL[2:], devices, left, 1)))


def local_resources() -> Resources:
    """CPUs this process may use, and GPUs that torch sees."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Resources(cpus, count_gpus())
