"""The processes that train together, and what passes between them. One process alone needs no process group.

Gradients are averaged in buckets of a fixed layout: sums come out the same in every run, which DistributedDataParallel,
whose buckets change after the first step, does not promise.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_BUCKET = 32 << 20  # numbers


@dataclass(frozen=True)
class Ranks:
    """This process among all."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def mean(self, gradients: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over all processes."""
        if self.world == 1:
            return
        for bucket in _buckets(gradients):
            flat = torch.cat([t.reshape(-1) for t in bucket])
            dist.all_reduce(flat)
            flat /= self.world
            for tensor, part in zip(bucket, torch.split(flat, [t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def most(self, values: list[float]) -> list[float]:
        """The largest of each value over all processes; all get the same answer."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def from_first(self, values: dict[str, Any]) -> dict[str, Any]:
        """What the first process has."""
        if self.world == 1:
            return values
        box = [values]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def wait(self) -> None:
        """Go on when all are here."""
        if self.world > 1:
            dist.barrier()


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    bucket, size = list[Tensor](), 0
    for tensor in tensors:
        if bucket and (size + tensor.numel() > _BUCKET or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
