"""The processes that train together, and their communication. A single process needs no process group.

Gradients are averaged in buckets of a fixed layout, so that sums are the same in every run. DistributedDataParallel
does not promise that: its buckets change after the first step.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Numbers per bucket of gradients.
_BUCKET_NUMBERS = 32 << 20


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the training.

    Attributes:
        rank: number of this process, from 0.
        world: number of processes.
        device: device this process computes on.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over all processes, in place."""
        if self.world == 1:
            return
        # One message per bucket: join it, sum it over the ranks, and copy the means back.
        for bucket in _split_into_buckets(tensors):
            flat = torch.cat([t.reshape(-1) for t in bucket])
            dist.all_reduce(flat)
            flat /= self.world
            for tensor, part in zip(bucket, torch.split(flat, [t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def reduce_max(self, values: list[float]) -> list[float]:
        """Return the maximum of each value over all processes; all get the same result."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def broadcast(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the first process's values on all processes."""
        if self.world == 1:
            return values
        box = [values]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            dist.barrier()


def _split_into_buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Group consecutive tensors of one dtype up to the bucket size."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.numel() > _BUCKET_NUMBERS or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
            size = 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
