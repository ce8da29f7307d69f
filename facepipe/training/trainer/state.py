"""The state of a training, as checkpoints hold it. Data is not part of it: batches are functions of the step."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from facepipe.errors import TrainingError
from facepipe.training.losses.shards import ClassShard, gather_rows, gather_state, load_gathered_state, slice_own_rows
from facepipe.training.trainer import optim
from facepipe.training.trainer.schedule import ValidationHistory
from facepipe.training.trainer.task import EpochTask, TrainingTask

Content = dict[str, Any]


def find_sharded_parameters(objective: nn.Module) -> dict[str, ClassShard]:
    """Find the parameters of which every rank has its own rows, by the names that the optimiser uses."""
    shards: dict[str, ClassShard] = {}
    for prefix, module in objective.named_modules():
        shard = getattr(module, "shard", None)
        if isinstance(shard, ClassShard) and shard.world > 1:
            names = (name for name, _ in module.named_parameters(prefix, recurse=False))
            shards |= {optim.HEAD_PREFIX + name: shard for name in names}
    return shards


def build_state_dict(task: TrainingTask, optimizer: Optimizer, scaler: torch.amp.GradScaler) -> Content:
    """Build the state of network, head, optimiser, loss scaling and the current epoch.

    Every rank calls it. All get the same state, with sharded tensors gathered.
    """
    state = optim.get_state_by_name(optimizer)
    # Rows of sharded tensors are gathered, so that any number of ranks can resume.
    for name, shard in find_sharded_parameters(task.objective).items():
        values = state.get(name, {})
        state[name] = {key: gather_rows(shard, v) if _has_rows(v) else v for key, v in values.items()}
    return {
        "net": task.net.state_dict(),
        "head": gather_state(task.objective),
        "optimizer": state,
        "scaler": scaler.state_dict(),
        "prepared": task.get_epoch_state() if isinstance(task, EpochTask) else {},
    }


def load_state_dict(content: Content, task: TrainingTask, optimizer: Optimizer, scaler: torch.amp.GradScaler) -> None:
    """Load what `build_state_dict` returned; each rank loads its own rows of sharded tensors.

    Raises:
        TrainingError: The state is of another network.
    """
    try:
        task.net.load_state_dict(content["net"])
        load_gathered_state(task.objective, content["head"])
    except RuntimeError as error:
        raise TrainingError(f"the checkpoint does not fit the network: {str(error).splitlines()[0]}") from error
    # Each rank keeps its own rows of the gathered tensors.
    state = content["optimizer"]
    for name, shard in find_sharded_parameters(task.objective).items():
        values = state.get(name, {})
        state[name] = {key: slice_own_rows(shard, v) if _has_rows(v) else v for key, v in values.items()}
    optim.load_state_by_name(optimizer, state)
    scaler.load_state_dict(content["scaler"])
    if isinstance(task, EpochTask):
        task.load_epoch_state(content["prepared"])


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def load_validation_history(content: Content) -> ValidationHistory:
    """Load the validation history of a checkpoint."""
    return ValidationHistory(**content["standing"])


def has_finite_state(*modules: nn.Module) -> bool:
    """Check that all parameters and buffers of the modules are finite."""
    # Collect the checks first, so that the device is waited for once.
    tensors = [t for module in modules for t in module.state_dict().values() if t.is_floating_point()]
    checks: list[Tensor] = [torch.isfinite(t).all() for t in tensors]
    return not checks or bool(torch.stack(checks).all())
