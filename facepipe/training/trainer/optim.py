"""The optimiser: its parameter groups, frozen parameters, and its state by parameter name."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn, optim

from facepipe.errors import ConfigError
from facepipe.training.trainer.config import OptimConfig

NET_PREFIX = "net."
HEAD_PREFIX = "head."
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
NamedParameters = dict[str, nn.Parameter]


@dataclass(frozen=True)
class ParameterGroup:
    """What some parameters have in common.

    Attributes:
        scale: factor on the learning rate.
        decay: weight decay.
    """

    scale: float
    decay: float


def name_parameters(net: nn.Module, objective: nn.Module) -> NamedParameters:
    """Collect all parameters by name: the network's under `net.`, the objective's under `head.`."""
    parameters = {NET_PREFIX + name: p for name, p in net.named_parameters()}
    return parameters | {HEAD_PREFIX + name: p for name, p in objective.named_parameters()}


def group_parameters(
    net: nn.Module, objective: nn.Module, config: OptimConfig, layer_decay: float = 1.0
) -> dict[ParameterGroup, NamedParameters]:
    """Group the parameters by learning rate and weight decay.

    Args:
        net: the network.
        objective: the head.
        config: the optimiser's settings.
        layer_decay: factor on the learning rate per layer away from the output.
    """
    # Names without decay, and each parameter's layer counted from the input.
    undecayed = _find_undecayed(net)
    depths = _find_depths(net)
    deepest = max(depths.values(), default=0)
    head_decay = config.weight_decay if config.head_weight_decay is None else config.head_weight_decay
    groups: dict[ParameterGroup, NamedParameters] = {}
    for name, parameter in name_parameters(net, objective).items():
        inner = name.partition(".")[2]
        if name.startswith(HEAD_PREFIX):
            group = ParameterGroup(config.head_lr, head_decay)
        else:
            decay = config.norm_weight_decay if inner in undecayed else config.weight_decay
            group = ParameterGroup(layer_decay ** (deepest - depths[inner]), decay)
        groups.setdefault(group, {})[name] = parameter
    return groups


def _find_undecayed(net: nn.Module) -> set[str]:
    """Find the names of biases and of all parameters of normalisation and PReLU layers."""
    names = {name for name, p in net.named_parameters() if name.endswith("bias")}
    for prefix, module in net.named_modules():
        if isinstance(module, (*_NORMS, nn.PReLU)):
            names |= {f"{prefix}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)}
    return names


def _find_depths(net: nn.Module) -> dict[str, int]:
    """Find each parameter's layer, counted from the input.

    The network's own attribute `depths` (prefixes of names per layer) decides, if it has one. Otherwise layers are the
    network's children, and the children of its sequences.
    """
    # Prefixes of the network's own order of layers come first.
    own_depths: Any = getattr(net, "depths", None)
    if own_depths:
        names = [name for name, _ in net.named_parameters()]
        layers = [
            [name for name in names if name.startswith(tuple(f"{prefix}." for prefix in prefixes))]
            for prefixes in own_depths
        ]
        return {name: depth for depth, layer in enumerate(filter(None, layers)) for name in layer}
    # Else the children are numbered in their order, and those of sequences one by one.
    numbers: dict[str, int] = {}
    depths: dict[str, int] = {}
    for name, _ in net.named_parameters():
        parts = name.split(".")
        layer_name = ""
        if len(parts) > 1:
            child = net.get_submodule(parts[0])
            in_sequence = isinstance(child, nn.Sequential | nn.ModuleList) and len(parts) > 2
            layer_name = ".".join(parts[: 2 if in_sequence else 1])
        depths[name] = numbers.setdefault(layer_name, len(numbers))
    return depths


def build_optimizer(groups: dict[ParameterGroup, NamedParameters], config: OptimConfig) -> optim.Optimizer:
    """Build the optimiser. Each of its groups keeps its `scale`; learning rates are set before every step."""
    # Each group keeps its names and its scale for later steps and checkpoints.
    options: list[dict[str, Any]] = [
        {"params": list(members.values()), "names": list(members), "scale": group.scale, "weight_decay": group.decay}
        for group, members in groups.items()
    ]
    if config.optimizer == "sgd":
        nesterov = config.nesterov and config.momentum > 0
        return optim.SGD(options, lr=config.peak_rate, momentum=config.momentum, nesterov=nesterov)
    kind = optim.Adam if config.optimizer == "adam" else optim.AdamW
    return kind(options, lr=config.peak_rate, betas=(config.beta1, config.beta2), eps=config.eps)


def set_learning_rate(optimizer: optim.Optimizer, lr: float) -> None:
    """Set every group's learning rate from the network's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def get_state_by_name(optimizer: optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Get the optimiser's state by parameter name."""
    return {name: optimizer.state[p] for name, p in _iterate_parameters(optimizer) if p in optimizer.state}


def load_state_by_name(optimizer: optim.Optimizer, state: dict[str, dict[str, Any]]) -> None:
    """Load the state that `get_state_by_name` returned, even if the groups have changed since."""
    # Number the parameters in the present order of the groups; their names find their state.
    numbers = {name: n for n, (name, _) in enumerate(_iterate_parameters(optimizer))}
    groups = optimizer.state_dict()["param_groups"]
    numbered = {numbers[name]: values for name, values in state.items() if name in numbers}
    optimizer.load_state_dict({"state": numbered, "param_groups": groups})


def _iterate_parameters(optimizer: optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"], strict=True)


def find_frozen_names(net: nn.Module, prefixes: Iterable[str]) -> frozenset[str]:
    """Find the names of the network's parameters below one of the prefixes.

    A prefix ends at a dot or at the end of a name: "layer1" does not match "layer10.weight".

    Raises:
        ConfigError: No parameter begins with one of the prefixes.
    """
    names = [name for name, _ in net.named_parameters()]
    frozen: set[str] = set()
    for prefix in prefixes:
        matches = {name for name in names if f"{name}.".startswith(f"{prefix.rstrip('.')}.")}
        if not matches:
            children = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
            raise ConfigError(f"model.freeze: no parameter begins with {prefix!r}; choose from {children}")
        frozen |= matches
    return frozenset(frozen)


def freeze_parameters(net: nn.Module, names: frozenset[str]) -> None:
    """Put the network into training mode, except for the named parameters.

    A module that has only frozen parameters is put into evaluation mode: it keeps its statistics and uses no dropout.
    """
    # Set the whole network to training, then stop the gradients and statistics of frozen parts.
    net.train()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name not in names)
    for prefix, module in net.named_modules():
        inner = [f"{prefix}.{name}".lstrip(".") for name, _ in module.named_parameters()]
        if inner and names.issuperset(inner):
            module.eval()
