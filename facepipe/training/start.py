"""The network that is trained: its architecture, its size, and the weights it starts from."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from facepipe.errors import ConfigError, WeightsError
from facepipe.models.checkpoint import State, fit, read_state
from facepipe.models.runtime.preprocess import Input
from facepipe.models.zoo.architectures import ARCHITECTURES, Architecture
from facepipe.models.zoo.card_file import CardFile, chips_of, fed_of, is_graph, read_card
from facepipe.models.zoo.loading import checked, renamed
from facepipe.training.config import ModelConfig
from facepipe.training.trainer import checkpointing

_DIM = 128


@dataclass(frozen=True)
class Start:
    """What a network is built from; small, but for `state`.

    chips: the name that chips for it are asked for by (`facepipe.models.chip_layout`)
    state: weights to start from, under our names; None: random ones. source, licence, sha256: of these
    """

    architecture: Architecture
    dim: int
    chips: str
    card: CardFile
    state: State | None = field(default=None, repr=False)
    where: str = "random weights"
    sha256: str = ""

    @property
    def input(self) -> Input:
        """What the network is fed."""
        return fed_of(self.card)

    @property
    def licence(self) -> str:
        """Of the weights that training starts from; whether it holds for what comes out is for lawyers to say."""
        return self.card.licence if self.state is not None else "that of the training data"

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of its chips."""
        return chips_of(self.card).size if self.card.role == "embedder" else (0, 0)

    def build(self, seed: int, dropout: float | None = None) -> nn.Module:
        """The network, in training mode. What the weights do not bring is random, and depends on the seed alone.

        Raises WeightsError that names what of the weights does not fit.
        """
        torch.manual_seed(seed)
        net = self.architecture.build(self.dim, self.size)
        if self.state is not None:
            fresh = net.state_dict()
            kept = {k: fresh[k] for k in self._resized(self.state)}
            fit(net, {**self.state, **kept}, self.where)
        if dropout is not None:
            for module in net.modules():
                if isinstance(module, nn.modules.dropout._DropoutNd):
                    module.p = dropout
        return net.requires_grad_(True).train()

    def resized(self) -> list[str]:
        """Names of the layers that start at random because the weights are of another `dim`."""
        return self._resized(self.state) if self.state is not None else []

    def _resized(self, state: State) -> list[str]:
        axes = output_axes(self.architecture, self.dim, self.size)
        if _dim_of(state, self.architecture, self.size) == self.dim:
            return []
        wanted = self._blank(self.dim).state_dict()
        return [k for k, axis in axes.items() if k in state and _differ_in(state[k].shape, wanted[k].shape, axis)]

    def frozen(self, config: ModelConfig) -> tuple[str, ...]:
        """The beginnings of names that `model.freeze` stands for."""
        if config.freeze != "trunk":
            return config.freeze
        if self.architecture.role == "detector":
            return ("trunk",)
        output = output_axes(self.architecture, self.dim, self.size)
        net = self._blank(self.dim)
        return tuple(name for name, _ in net.named_parameters() if name not in output)

    def _blank(self, dim: int) -> nn.Module:
        return _blank(self.architecture, dim, self.size)


def output_axes(architecture: Architecture, dim: int, size: tuple[int, int]) -> dict[str, int]:
    """Tensors that make the embedding: those whose shape depends on its length, and the axis that does."""
    one, other = (_blank(architecture, d, size).state_dict() for d in (dim, dim + 1))
    found = dict[str, int]()
    for name, tensor in one.items():
        differs = [n for n, (a, b) in enumerate(zip(tensor.shape, other[name].shape, strict=True)) if a != b]
        found |= {name: differs[0]} if differs else {}
    return found


def _differ_in(one: Sequence[int], other: Sequence[int], axis: int) -> bool:
    """Whether that axis alone tells two shapes apart; what else does not fit is for `fit` to name."""
    same = len(one) == len(other) and all(n == axis or a == b for n, (a, b) in enumerate(zip(one, other, strict=True)))
    return same and one[axis] != other[axis]


def _blank(architecture: Architecture, dim: int, size: tuple[int, int]) -> nn.Module:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return architecture.build(dim, size)


def find(config: ModelConfig, role: Any = "embedder") -> Start:
    """What `model` asks for. Raises ConfigError where it names nothing that can be trained, WeightsError for weights
    that cannot be read."""
    if config.start.endswith(".toml"):
        return _from_card(config, Path(config.start), role)
    name = config.architecture or (config.start if config.start in ARCHITECTURES else "")
    made = _architecture(name, role)
    card = CardFile(name, "", role, name, dim=config.dim or _DIM)
    start = Start(made, card.dim, name, card)
    if not config.start:
        return start
    if config.start in ARCHITECTURES:
        return _registered(start, config)
    path = Path(config.start)
    state = _trained(path) or renamed(read_state(path), made)
    dim = config.dim or _dim_of(state, made, start.size)
    read = {"state": state, "where": str(path), "sha256": _digest(path)}
    return replace(start, dim=dim, card=replace(card, dim=dim), **read)  # type: ignore[arg-type]


def _trained(path: Path) -> State | None:
    """The network of a checkpoint that a training of ours left; None for other files. Raises WeightsError."""
    if not checkpointing.is_ours(path):
        return None
    try:
        return dict(checkpointing.read(path)["net"])
    except checkpointing.DamagedError as error:
        raise WeightsError(f"the checkpoint {str(path)!r} is damaged: {error}") from error


def _architecture(name: str, role: str) -> Architecture:
    known = sorted(a.name for a in ARCHITECTURES.values() if a.role == role)
    if not name:
        raise ConfigError(f"model.architecture is missing: one of {', '.join(known)}; or model.start, a model's TOML")
    if name not in known:
        raise ConfigError(f"model.architecture: no {role} is called {name!r}; there are {', '.join(known)}")
    return ARCHITECTURES[name]


def _from_card(config: ModelConfig, path: Path, role: str) -> Start:
    card = read_card(path)
    if card.role != role:
        raise ConfigError(f"model.start: {path} is a {card.role}, and a {role} is to be trained")
    if is_graph(card) or not card.architecture:
        raise ConfigError(f"model.start: {path} is an ONNX graph, which cannot be trained; start from a checkpoint")
    if config.architecture and config.architecture != card.architecture:
        raise ConfigError(f"model.start is of {card.architecture}, and model.architecture says {config.architecture}")
    made, weights = ARCHITECTURES[card.architecture], path.parent / card.weights
    sha256 = checked(weights, card.sha256)
    state = renamed(read_state(weights), made, card.keys)
    dim = config.dim or card.dim
    return Start(made, dim, str(path), replace(card, dim=dim), state, str(weights), sha256)


def _registered(start: Start, config: ModelConfig) -> Start:
    from facepipe.models.zoo import registry

    if config.start != "dlib-resnet":
        raise ConfigError(
            f"model.start: {config.start} has no weights that can be trained on; give it as model.architecture, "
            "and a checkpoint or a model's TOML file as model.start"
        )
    card = replace(start.card, licence=registry.CARDS[config.start].licence)
    state = registry.dlib_net().state_dict()
    return replace(start, card=card, state=state, where=config.start, sha256=registry.DLIB_SHA256)


def _dim_of(state: State, architecture: Architecture, size: tuple[int, int]) -> int:
    axes = output_axes(architecture, _DIM, size)
    found = (state[k].shape[axis] for k, axis in axes.items() if k in state and axis < len(state[k].shape))
    counts = Counter(found)
    return counts.most_common(1)[0][0] if counts else _DIM


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def written(start: Start, name: str, figures: dict[str, float]) -> CardFile:
    """The card of what was trained. What it was fed is spelt out, where it is an embedder."""
    given, fed = start.card.input, start.input
    spelt = replace(given, mean=fed.mean, scale=fed.scale, size=given.size or start.architecture.layout.size)
    source = f"trained by facepipe from {start.where}"
    return CardFile(
        name=name,
        weights="",
        role=start.card.role,
        architecture=start.architecture.name,
        dim=start.dim,
        licence=start.licence,
        same_person=figures.get("threshold"),
        source=source,
        figures=figures,
        input=spelt if start.card.role == "embedder" else given,
    )
