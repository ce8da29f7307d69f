"""The optimiser: its groups of parameters, what is frozen, and its state by the parameters' names."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn, optim

from facepipe.errors import ConfigError
from facepipe.training.trainer.config import OptimConfig

NET, HEAD = "net.", "head."
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
Named = dict[str, nn.Parameter]


@dataclass(frozen=True)
class Group:
    """What is common to some parameters: the factor on the learning rate, and the weight decay."""

    scale: float
    decay: float


def named(net: nn.Module, objective: nn.Module) -> Named:
    """All parameters: the network's under `net.`, the objective's under `head.`."""
    found = {NET + name: p for name, p in net.named_parameters()}
    return found | {HEAD + name: p for name, p in objective.named_parameters()}


def groups(net: nn.Module, objective: nn.Module, config: OptimConfig, layer_decay: float = 1.0) -> dict[Group, Named]:
    """The parameters by group. layer_decay: factor for each layer further from the output."""
    plain, found = _undecayed(net), dict[Group, Named]()
    depth = _depths(net)
    last = max(depth.values(), default=0)
    head = config.weight_decay if config.head_weight_decay is None else config.head_weight_decay
    for name, parameter in named(net, objective).items():
        inner = name.partition(".")[2]
        if name.startswith(HEAD):
            group = Group(config.head_lr, head)
        else:
            decay = config.norm_weight_decay if inner in plain else config.weight_decay
            group = Group(layer_decay ** (last - depth[inner]), decay)
        found.setdefault(group, {})[name] = parameter
    return found


def _undecayed(net: nn.Module) -> set[str]:
    """Names of biases and of all that normalisation and PReLU layers learn."""
    found = {name for name, p in net.named_parameters() if name.endswith("bias")}
    for prefix, module in net.named_modules():
        if isinstance(module, (*_NORMS, nn.PReLU)):
            found |= {f"{prefix}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)}
    return found


def _depths(net: nn.Module) -> dict[str, int]:
    """The layer each parameter belongs to, counted from the input: what the network says itself (`depths`), or children
    of the network, and of its sequences."""
    given: Any = getattr(net, "depths", None)
    if given:
        names = [name for name, _ in net.named_parameters()]
        there = [[name for name in names if name.startswith(tuple(f"{p}." for p in prefixes))] for prefixes in given]
        return {name: depth for depth, layer in enumerate(filter(None, there)) for name in layer}
    layers, found = dict[str, int](), dict[str, int]()
    for name, _ in net.named_parameters():
        parts = name.split(".")
        child = net.get_submodule(parts[0]) if len(parts) > 1 else net
        listed = isinstance(child, nn.Sequential | nn.ModuleList) and len(parts) > 2
        layer = ".".join(parts[: 2 if listed else 1]) if len(parts) > 1 else ""
        found[name] = layers.setdefault(layer, len(layers))
    return found


def make(grouped: dict[Group, Named], config: OptimConfig) -> optim.Optimizer:
    """The optimiser, with a group's `scale` beside its parameters; learning rates are set before every step."""
    given: list[dict[str, Any]] = [
        {"params": list(members.values()), "names": list(members), "scale": group.scale, "weight_decay": group.decay}
        for group, members in grouped.items()
    ]
    if config.optimizer == "sgd":
        nesterov = config.nesterov and config.momentum > 0
        return optim.SGD(given, lr=config.lr, momentum=config.momentum, nesterov=nesterov)
    kind = optim.Adam if config.optimizer == "adam" else optim.AdamW
    return kind(given, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


def set_rate(optimizer: optim.Optimizer, lr: float) -> None:
    """Set every group's learning rate from the rate of the whole."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def state_of(optimizer: optim.Optimizer) -> dict[str, dict[str, Any]]:
    """The optimiser's state by the parameters' names."""
    return {name: optimizer.state[p] for name, p in _members(optimizer) if p in optimizer.state}


def restore(optimizer: optim.Optimizer, state: dict[str, dict[str, Any]]) -> None:
    """Give the optimiser a state by names back, however its groups are cut now."""
    numbers = {name: n for n, (name, _) in enumerate(_members(optimizer))}
    current = optimizer.state_dict()["param_groups"]
    given = {numbers[name]: values for name, values in state.items() if name in numbers}
    optimizer.load_state_dict({"state": given, "param_groups": current})


def _members(optimizer: optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"], strict=True)


def frozen_names(net: nn.Module, prefixes: Iterable[str]) -> frozenset[str]:
    """Names of the network's parameters that begin with one of the prefixes, at the border of a part of the name.

    Raises ConfigError for a prefix that no parameter has.
    """
    names, found = [name for name, _ in net.named_parameters()], set[str]()
    for prefix in prefixes:
        under = {name for name in names if f"{name}.".startswith(f"{prefix.rstrip('.')}.")}
        if not under:
            tops = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
            raise ConfigError(f"model.freeze names {prefix!r}, and no parameter begins so; there are {tops}")
        found |= under
    return frozenset(found)


def freeze(net: nn.Module, names: frozenset[str]) -> None:
    """Put the network into training mode, but for the named parameters and the modules that have no others.

    A frozen module is in evaluation mode: its statistics stay, its dropout is off.
    """
    net.train()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name not in names)
    for prefix, module in net.named_modules():
        inner = [f"{prefix}.{name}".lstrip(".") for name, _ in module.named_parameters()]
        if inner and names.issuperset(inner):
            module.eval()
