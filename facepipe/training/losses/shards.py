"""Class centres sharded over the ranks of torch.distributed: rank r of w holds classes [c*r//w, c*(r+1)//w).

The loss is the mean over the faces of all ranks, and the same number on all. The batches of all ranks must have one
size.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from facepipe.errors import ConfigError

State = dict[str, Tensor]


class ClassShard(NamedTuple):
    """The classes that a rank holds.

    Attributes:
        classes: number of all classes.
        rank: number of the rank.
        world: number of ranks.
    """

    classes: int
    rank: int = 0
    world: int = 1

    @property
    def start(self) -> int:
        """The first class."""
        return self.classes * self.rank // self.world

    @property
    def size(self) -> int:
        """The number of classes."""
        return self.classes * (self.rank + 1) // self.world - self.start


def get_own_shard(classes: int, sharded: bool) -> ClassShard:
    """Get this rank's classes: all of them if nothing is sharded or there is no process group.

    Raises:
        ConfigError: There are fewer classes than ranks.
    """
    if not (sharded and dist.is_available() and dist.is_initialized()):
        return ClassShard(classes)
    world = dist.get_world_size()
    if classes < world:
        raise ConfigError(f"{classes} classes cannot be sharded over {world} ranks: set loss.sharded=false")
    return ClassShard(classes, dist.get_rank(), world)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        return gather_ranks(own)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # Every rank has the part of the gradient that went through its own classes. The trainer will divide gradients
        # by the number of ranks, as if each rank had its own loss. This loss is one for all, so multiply by it here.
        total = grads[0].contiguous()
        dist.all_reduce(total)
        # The sum has the faces of all ranks; each rank takes the rows of its own.
        return total.chunk(dist.get_world_size())[dist.get_rank()] * dist.get_world_size()


def gather_ranks(own: Tensor) -> Tensor:
    """Concatenate the tensors (n, ...) of all ranks to (n * world, ...), without a gradient."""
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own.contiguous())
    return torch.cat(parts)


def gather_ranks_with_gradient(own: Tensor) -> Tensor:
    """Concatenate the tensors of all ranks, with a gradient: the sum over the ranks, times the number of ranks.

    The factor makes up for averaging the network's gradients over the ranks.
    """
    out: Tensor = _Gather.apply(own)  # type: ignore[no-untyped-call]
    return out


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, positions: Tensor) -> Tensor:
        # The largest logit over all ranks keeps the exponentials finite.
        top = logits.amax(1)
        dist.all_reduce(top, dist.ReduceOp.MAX)
        exponentials = (logits - top[:, None]).exp_()
        total = exponentials.sum(1)
        dist.all_reduce(total)
        # One rank has the own logit of each face, the others add 0.
        own = get_own_entries(logits, positions)
        dist.all_reduce(own)
        ctx.save_for_backward(exponentials.div_(total[:, None]), positions)
        return (total.log() + top - own).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        probabilities, positions = ctx.saved_tensors
        # The gradient of cross-entropy: probabilities, less 1 at the own class.
        share = grads[0] / len(positions)
        hits = (positions >= 0).to(probabilities.dtype) * -share
        return (probabilities * share).scatter_add_(1, positions.clamp(min=0)[:, None], hits[:, None]), None


def compute_sharded_cross_entropy(logits: Tensor, positions: Tensor) -> Tensor:
    """Compute the mean cross-entropy over the classes of all ranks.

    Args:
        logits: logits of this rank's classes, (n, own classes).
        positions: column of each face's own class, (n,); -1 if another rank holds it.
    """
    out: Tensor = _CrossEntropy.apply(logits, positions)  # type: ignore[no-untyped-call]
    return out


def get_own_entries(logits: Tensor, positions: Tensor) -> Tensor:
    """Get the logits at the positions, (n,); 0 where a position is -1."""
    # For the backward pass indexing keeps sizes only. gather would keep the logits, which a margin may overwrite.
    own = logits[torch.arange(len(logits), device=logits.device), positions.clamp(min=0)]
    return torch.where(positions >= 0, own, torch.zeros_like(own))


def gather_rows(shard: ClassShard, own: Tensor) -> Tensor:
    """Gather the rows of all ranks, (classes, ...), of a tensor with a row per class, such as centres or momentum.

    All ranks must call it, and all get the whole tensor.
    """
    if shard.world == 1:
        return own
    # Shards differ by one row at most; gathering needs equal sizes, so short ones are padded.
    padded = own.new_zeros((-(-shard.classes // shard.world), *own.shape[1:]))
    padded[: len(own)] = own
    parts = gather_ranks(padded).chunk(shard.world)
    sizes = [ClassShard(shard.classes, rank, shard.world).size for rank in range(len(parts))]
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def slice_own_rows(shard: ClassShard, full: Tensor) -> Tensor:
    """Slice this rank's rows from a tensor with a row per class."""
    return full[shard.start : shard.start + shard.size]


def gather_state(head: nn.Module) -> State:
    """Gather an objective's state as an unsharded one would have it. It can be loaded on any number of ranks.

    All ranks must call it.
    """
    shards = _find_sharded_names(head)
    return {key: gather_rows(shards[key], v) if key in shards else v for key, v in head.state_dict().items()}


def load_gathered_state(head: nn.Module, state: State) -> None:
    """Load this rank's part of a state that `gather_state` returned.

    Raises:
        RuntimeError: The state does not fit the objective.
    """
    shards = _find_sharded_names(head)
    for key, shard in shards.items():
        if key in state and len(state[key]) != shard.classes:
            raise RuntimeError(f"{key} has {len(state[key])} classes, but this objective has {shard.classes}")
    own = {key: slice_own_rows(shards[key], v) if key in shards else v for key, v in state.items()}
    head.load_state_dict(own)


def _find_sharded_names(head: nn.Module) -> dict[str, ClassShard]:
    """Find the names in the state that have a row per class."""
    # A module with a shard holds a row per class in each of its own parameters.
    shards: dict[str, ClassShard] = {}
    for name, module in head.named_modules():
        shard = getattr(module, "shard", None)
        if isinstance(shard, ClassShard):
            prefix = f"{name}." if name else ""
            shards |= {prefix + key: shard for key, _ in module.named_parameters(recurse=False)}
    return shards
