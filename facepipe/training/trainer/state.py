"""What a checkpoint holds: the whole state of a training but for its data, which are functions of the step."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from facepipe.errors import TrainingError
from facepipe.training.losses.shards import Shard, full_rows, full_state, load_full_state, own_rows
from facepipe.training.trainer import optim
from facepipe.training.trainer.schedule import Standing
from facepipe.training.trainer.task import Renewed, Task

Content = dict[str, Any]


def sliced(objective: nn.Module) -> dict[str, Shard]:
    """Names, as the optimiser knows them, of parameters of which every rank has its own rows."""
    found: dict[str, Shard] = {}
    for prefix, module in objective.named_modules():
        shard = getattr(module, "shard", None)
        if isinstance(shard, Shard) and shard.world > 1:
            names = (name for name, _ in module.named_parameters(prefix, recurse=False))
            found |= {optim.HEAD + name: shard for name in names}
    return found


def take(task: Task, optimizer: Optimizer, scaler: torch.amp.GradScaler) -> Content:
    """The tensors of network, head, optimiser and loss scaling, whole, and what the epoch was prepared with.

    Every rank calls it, and gets the same.
    """
    shards = sliced(task.objective)
    state = optim.state_of(optimizer)
    for name, shard in shards.items():
        state[name] = {k: full_rows(shard, v) if _by_row(v) else v for k, v in state.get(name, {}).items()}
    return {
        "net": task.net.state_dict(),
        "head": full_state(task.objective),
        "optimizer": state,
        "scaler": scaler.state_dict(),
        "prepared": task.prepared() if isinstance(task, Renewed) else {},
    }


def give(content: Content, task: Task, optimizer: Optimizer, scaler: torch.amp.GradScaler) -> None:
    """Put them back, each rank its own part. Raises TrainingError where they are of another network."""
    try:
        task.net.load_state_dict(content["net"])
        load_full_state(task.objective, content["head"])
    except RuntimeError as error:
        raise TrainingError(f"the checkpoint does not fit the network: {str(error).splitlines()[0]}") from error
    state = content["optimizer"]
    for name, shard in sliced(task.objective).items():
        state[name] = {k: own_rows(shard, v) if _by_row(v) else v for k, v in state.get(name, {}).items()}
    optim.restore(optimizer, state)
    scaler.load_state_dict(content["scaler"])
    if isinstance(task, Renewed):
        task.take_up(content["prepared"])


def _by_row(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def standing(content: Content) -> Standing:
    """How validations stood."""
    return Standing(**content["standing"])


def finite(*modules: nn.Module) -> bool:
    """Whether all that the modules hold is finite."""
    tensors = [t for module in modules for t in module.state_dict().values() if t.is_floating_point()]
    checks: list[Tensor] = [torch.isfinite(t).all() for t in tensors]
    return not checks or bool(torch.stack(checks).all())
