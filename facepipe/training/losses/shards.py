"""Class centres sliced over the ranks of torch.distributed: rank r of w keeps classes [c*r//w, c*(r+1)//w).

The loss is the mean over the faces of all ranks and the same number on all. Ranks must bring batches of one size.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from facepipe.errors import ConfigError

State = dict[str, Tensor]


class ClassShard(NamedTuple):
    """Which classes this rank keeps."""

    classes: int
    rank: int = 0
    world: int = 1

    @property
    def start(self) -> int:
        return self.classes * self.rank // self.world

    @property
    def size(self) -> int:
        return self.classes * (self.rank + 1) // self.world - self.start


def get_own_shard(classes: int, sharded: bool) -> ClassShard:
    """This rank's slice: all classes where nothing is to be sharded or no process group is up."""
    if not (sharded and dist.is_available() and dist.is_initialized()):
        return ClassShard(classes)
    world = dist.get_world_size()
    if classes < world:
        raise ConfigError(f"{classes} classes cannot be sliced over {world} ranks: set loss.sharded = false")
    return ClassShard(classes, dist.get_rank(), world)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor) -> Tensor:
        return gather_ranks(mine)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # Every rank has the part of the gradient that went through its own classes. DistributedDataParallel will divide
        # by the number of ranks, as if each had its own loss: this loss is one for all.
        total = grads[0].contiguous()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()] * dist.get_world_size()


def gather_ranks(mine: Tensor) -> Tensor:
    """The ranks' tensors (n, ...), one after the other: (n * world, ...). No gradient."""
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine.contiguous())
    return torch.cat(parts)


def gather_ranks_with_gradient(mine: Tensor) -> Tensor:
    """`gathered`, whose gradient is the sum over the ranks, times their number (for a network under DDP's averages)."""
    out: Tensor = _Gather.apply(mine)  # type: ignore[no-untyped-call]
    return out


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, positions: Tensor) -> Tensor:
        top = logits.amax(1)
        dist.all_reduce(top, dist.ReduceOp.MAX)
        exponentials = (logits - top[:, None]).exp_()
        total = exponentials.sum(1)
        dist.all_reduce(total)
        own = get_own_entries(logits, positions)
        dist.all_reduce(own)
        ctx.save_for_backward(exponentials.div_(total[:, None]), positions)
        return (total.log() + top - own).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        probabilities, positions = ctx.saved_tensors
        share = grads[0] / len(positions)
        hits = (positions >= 0).to(probabilities.dtype) * -share
        return (probabilities * share).scatter_add_(1, positions.clamp(min=0)[:, None], hits[:, None]), None


def compute_sharded_cross_entropy(logits: Tensor, positions: Tensor) -> Tensor:
    """Mean cross-entropy of logits (n, own classes); positions (n,) are the faces' columns, -1 on the other ranks."""
    out: Tensor = _CrossEntropy.apply(logits, positions)  # type: ignore[no-untyped-call]
    return out


def get_own_entries(logits: Tensor, positions: Tensor) -> Tensor:
    """(n,) logits at the positions; 0 where a position is -1."""
    # Indexing keeps sizes for the way back where gather keeps the logits, which a margin may be written over.
    own = logits[torch.arange(len(logits), device=logits.device), positions.clamp(min=0)]
    return torch.where(positions >= 0, own, torch.zeros_like(own))


def gather_rows(shard: ClassShard, mine: Tensor) -> Tensor:
    """All ranks' rows (classes, ...) of a tensor with a row per class, such as centres or their momentum.

    A collective call: every rank makes it, and every rank gets the whole.
    """
    if shard.world == 1:
        return mine
    padded = mine.new_zeros((-(-shard.classes // shard.world), *mine.shape[1:]))
    padded[: len(mine)] = mine
    parts = gather_ranks(padded).chunk(shard.world)
    return torch.cat([part[: ClassShard(shard.classes, r, shard.world).size] for r, part in enumerate(parts)])


def slice_own_rows(shard: ClassShard, full: Tensor) -> Tensor:
    """This rank's rows of a tensor with a row per class."""
    return full[shard.start : shard.start + shard.size]


def gather_state(head: nn.Module) -> State:
    """An objective's state as an unsharded one would have it, fit to be loaded on any number of ranks. Collective."""
    rows = _find_sharded_names(head)
    return {k: gather_rows(rows[k], v) if k in rows else v for k, v in head.state_dict().items()}


def load_gathered_state(head: nn.Module, state: State) -> None:
    """Take what belongs to this rank of a state that `gather_state` gave; RuntimeError where it does not fit."""
    rows = _find_sharded_names(head)
    for key, shard in rows.items():
        if key in state and len(state[key]) != shard.classes:
            raise RuntimeError(f"{key} is of {len(state[key])} classes, this objective has {shard.classes}")
    head.load_state_dict({k: slice_own_rows(rows[k], v) if k in rows else v for k, v in state.items()})


def _find_sharded_names(head: nn.Module) -> dict[str, ClassShard]:
    """Names in the state of what has a row per class."""
    found: dict[str, ClassShard] = {}
    for name, module in head.named_modules():
        if isinstance(shard := getattr(module, "shard", None), ClassShard):
            prefix = f"{name}." if name else ""
            found |= {prefix + key: shard for key, _ in module.named_parameters(recurse=False)}
    return found
