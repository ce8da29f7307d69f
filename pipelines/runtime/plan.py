"""How a chain of stages is spread over workers: data that a runner reads, computed from what the machines have."""

import math
import os
from dataclasses import dataclass
from typing import Literal

from facepipe.errors import ConfigError
from facepipe.models.runtime.device import count_gpus

Layout = Literal["fused", "split"]
GpuModels = Literal["all", "some", "none"]
"""How many of the models use a GPU."""

STAGES = ("read", "decode", "detect", "align", "embed")
_DECODING_STAGES = STAGES[:2]
_MODEL_STAGES = STAGES[2:]
# Workers that share a GPU if one of the models runs on CPUs. Each holds a context of CUDA on it, some 500 MB.
_MAX_WORKERS_PER_GPU = 8
_BATCH_PER_GPU = 256


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
        return max(16, int(_BATCH_PER_GPU * self.gpus))

    @property
    def parallel(self) -> int:
        """Batches on which a worker's models work at a time, so that a GPU has work while one of them waits for it."""
        if not self.gpus:
            return 1
        return 4 if self.gpus >= 1 else 2


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


def make_plan(
    resources: Resources, workers: int | None = None, layout: Layout = "fused", models: GpuModels = "all"
) -> WorkerPlan:
    """Spread the stages over workers.

    Without GPUs, one single-threaded worker per CPU runs the whole chain: work items travel, pixels never do. With
    GPUs, one worker per GPU does, with an equal share of the CPUs for decoding. GPUs are left alone if no model can use
    them. If one of the two models runs on CPUs, several workers share each GPU, so that all CPUs are at work.

    Args:
        resources: what the machines have.
        workers: number of workers; default: one per CPU, or one per GPU.
        layout: `split` gives reading and decoding to CPU workers and the models to GPU workers, for clusters whose CPUs
            are not on the machines with GPUs.
        models: how many of the models use a GPU.

    Raises:
        ConfigError: The layout needs GPUs, and there are none.
    """
    if resources.gpus == 0 or models == "none":
        if layout == "split" and resources.gpus:
            raise ConfigError("run.layout=split is for models on GPUs, and neither of these can use one: remove it")
        if layout == "split":
            raise ConfigError("run.layout=split needs GPUs, and there are none: set run.layout=fused")
        return WorkerPlan((WorkerGroup(STAGES, workers or max(1, resources.cpus), 1),))
    if layout == "fused":
        return WorkerPlan((_make_gpu_group(resources, workers, is_shared=models == "some"),))
    return _make_split_plan(resources, workers)


def _make_gpu_group(resources: Resources, workers: int | None, *, is_shared: bool) -> WorkerGroup:
    """Make the group of workers that run all stages, each with a GPU or a share of one."""
    # Ray would wait forever for a machine that has more CPUs per GPU than any.
    cpus_per_gpu = resources.cpus // resources.gpus
    if resources.cpus_per_gpu is not None:
        cpus_per_gpu = min(cpus_per_gpu, resources.cpus_per_gpu)
    if is_shared and cpus_per_gpu > 1:
        # Two CPUs per worker: one for the model, one for decoding.
        per_gpu = min(_MAX_WORKERS_PER_GPU, max(1, cpus_per_gpu // 2))
        count = min(workers or resources.gpus * per_gpu, resources.gpus * per_gpu)
        return WorkerGroup(STAGES, count, max(1, cpus_per_gpu // per_gpu), 1 / per_gpu)
    count = min(workers or resources.gpus, resources.gpus)
    cpus = max(1, resources.cpus // count)
    if resources.cpus_per_gpu is not None:
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
