"""How a chain of stages is spread over workers: data that a runner reads, computed from what the machines have."""

import math
import os
from dataclasses import dataclass, replace
from typing import Literal

from facepipe.models.runtime.device import count_gpus

Layout = Literal["auto", "fused", "split"]
GpuModels = Literal["all", "some", "none"]
"""How many of the models use a GPU."""

STAGES = ("read", "decode", "detect", "align", "embed")
_DECODING_STAGES = STAGES[:2]
_MODEL_STAGES = STAGES[2:]
# Workers that share a GPU if one of the models runs on CPUs. Each holds a context of CUDA on it, some 500 MB.
_MAX_WORKERS_PER_GPU = 8
_BATCH_PER_GPU = 256
# Bytes of decoded images per batch. A worker without a GPU has three batches in work at a time, one with a GPU seven.
_BATCH_BYTES = 64 << 20
_BATCH_BYTES_PER_GPU = 256 << 20


@dataclass(frozen=True)
class Resources:
    """CPUs and GPUs to use, over all machines.

    Attributes:
        cpus: number of CPUs
        gpus: number of GPUs
        cpus_per_gpu: CPUs per GPU on the machine that has the fewest; None if all are on one machine
        cpus_elsewhere: CPUs of machines without a GPU
    """

    cpus: int
    gpus: int = 0
    cpus_per_gpu: int | None = None
    cpus_elsewhere: int = 0


@dataclass(frozen=True)
class WorkerGroup:
    """Stages that share a worker, and the workers that run them.

    Attributes:
        stages: names of the stages, in order
        workers: number of workers
        cpus: CPUs per worker
        gpus: GPUs per worker, one or a part of one
        min_workers: number of workers that are kept on Ray if there is less work
        max_workers: number of workers on Ray if more nodes come; None: as many as they have room for
    """

    stages: tuple[str, ...]
    workers: int
    cpus: float
    gpus: float = 0
    min_workers: int = 1
    max_workers: int | None = None

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
    def batch_bytes(self) -> int:
        """Bytes of decoded images per batch, at most."""
        return max(_BATCH_BYTES, int(_BATCH_BYTES_PER_GPU * self.gpus))

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

    def limit_workers(self, fewest: int, most: int | None) -> "WorkerPlan":
        """Set how far each group of workers shrinks and grows on Ray."""
        groups = [
            replace(
                group,
                min_workers=min(fewest, group.workers),
                max_workers=None if most is None else max(most, group.workers),
            )
            for group in self.groups
        ]
        return WorkerPlan(tuple(groups))

    @property
    def largest_block(self) -> int:
        """Maximum number of images per unit of work."""
        return 4096 if any(group.gpus for group in self.groups) else 512


def make_plan(
    resources: Resources,
    workers: int | None = None,
    layout: Layout = "auto",
    models: GpuModels = "all",
    gpus_per_worker: float | None = None,
) -> WorkerPlan:
    """Spread the stages over workers.

    Without GPUs, one single-threaded worker per CPU runs the whole chain: work items travel, pixels never do. With
    GPUs, one worker per GPU does, with an equal share of the CPUs for decoding. GPUs are left alone if no model can use
    them. If one of the two models runs on CPUs, several workers share each GPU, so that all CPUs are at work. If most
    CPUs are on machines without a GPU, workers there read and decode for those with GPUs.

    Args:
        resources: what the machines have.
        workers: number of workers; default: one per CPU, or one per GPU.
        layout: `fused` gives all stages to each worker; `split` gives reading and decoding to CPU workers, and the
            models to others; `auto` chooses by what the machines have.
        models: how many of the models use a GPU.
        gpus_per_worker: GPUs per worker that runs models, at most 1; default: what the models can use.
    """
    if models == "none":
        resources = replace(resources, gpus=0)
    if layout == "auto":
        # Pixels travel only if otherwise most of what can decode had nothing to do.
        is_worth_it = resources.gpus > 0 and resources.cpus_elsewhere > resources.cpus / 2
        layout = "split" if is_worth_it else "fused"
    if layout == "split":
        return _make_split_plan(resources, workers, gpus_per_worker or 1)
    if resources.gpus == 0:
        return WorkerPlan((WorkerGroup(STAGES, workers or max(1, resources.cpus), 1),))
    return WorkerPlan((_make_gpu_group(resources, workers, gpus_per_worker, is_shared=models == "some"),))


def _make_gpu_group(
    resources: Resources, workers: int | None, gpus_per_worker: float | None, *, is_shared: bool
) -> WorkerGroup:
    """Make the group of workers that run all stages, each with a GPU or a share of one."""
    # Ray would wait forever for a machine that has more CPUs per GPU than any.
    cpus_per_gpu = resources.cpus // resources.gpus
    if resources.cpus_per_gpu is not None:
        cpus_per_gpu = min(cpus_per_gpu, resources.cpus_per_gpu)
    if gpus_per_worker is not None:
        per_gpu = max(1, int(1 / gpus_per_worker))
    elif is_shared and cpus_per_gpu > 1:
        # Two CPUs per worker: one for the model, one for decoding.
        per_gpu = min(_MAX_WORKERS_PER_GPU, max(1, cpus_per_gpu // 2))
    else:
        per_gpu = 1
    if per_gpu > 1:
        count = min(workers or resources.gpus * per_gpu, resources.gpus * per_gpu)
        return WorkerGroup(STAGES, count, max(1, cpus_per_gpu // per_gpu), 1 / per_gpu)
    count = min(workers or resources.gpus, resources.gpus)
    cpus = max(1, resources.cpus // count)
    if resources.cpus_per_gpu is not None:
        cpus = min(cpus, resources.cpus_per_gpu)
    return WorkerGroup(STAGES, count, cpus, 1)


def _make_split_plan(resources: Resources, workers: int | None, gpus_per_worker: float) -> WorkerPlan:
    """Make a group of workers that decode, and one of workers that run the models, each with a GPU if there are any."""
    if resources.gpus == 0:
        # Decoding takes about a quarter of the time. Even a single CPU runs both groups: each worker needs half of it.
        decoders = workers or max(1, resources.cpus // 4)
        others = max(1, resources.cpus - decoders)
        cpus = 1 if decoders + others <= resources.cpus else 0.5
        return WorkerPlan((WorkerGroup(_DECODING_STAGES, decoders, cpus), WorkerGroup(_MODEL_STAGES, others, cpus)))
    # One CPU per GPU stays free for the process that runs the models.
    decoders = max(1, workers or resources.cpus - resources.gpus)
    per_gpu = max(1, int(1 / gpus_per_worker))
    count = resources.gpus * per_gpu
    # On several machines GPU workers request no CPUs: decoders may have taken all CPUs of a GPU's machine.
    is_one_machine = resources.cpus_per_gpu is None
    gpu_cpus = max(0, (resources.cpus - decoders) // count) if is_one_machine else 0
    return WorkerPlan(
        (
            WorkerGroup(_DECODING_STAGES, decoders, 1),
            WorkerGroup(_MODEL_STAGES, count, gpu_cpus, 1 / per_gpu),
        )
    )


def detect_local_resources() -> Resources:
    """Count the CPUs that this process may use, and the GPUs that torch sees."""
    # The affinity respects limits that the system sets for this process, which the number of CPUs does not.
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Resources(cpus, count_gpus())
