"""What the network starts from: its architecture, its size and its initial weights."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from facepipe.errors import ConfigError, WeightsError
from facepipe.models.checkpoint import State, load_state, read_state
from facepipe.models.runtime.preprocess import Input
from facepipe.models.zoo.architectures import ARCHITECTURES, Architecture
from facepipe.models.zoo.card_file import CardFile, is_onnx, read_card, resolve_chip_layout, resolve_input
from facepipe.models.zoo.loading import rename_keys, verify_weights
from facepipe.training.config import ModelConfig
from facepipe.training.trainer import checkpointing

Role = Literal["embedder", "detector"]
_DEFAULT_DIM = 128


@dataclass(frozen=True)
class NetworkStart:
    """What a network is built from. Small, except for `state`.

    Attributes:
        architecture: the network.
        dim: length of an embedding.
        chips: name that finds the layout of its chips (`facepipe.models.zoo.registry.find_chip_layout`).
        card: the model's card.
        state: initial weights, under our names; None: random weights.
        origin: where the weights come from, for reports.
        sha256: digest of the file of the weights.
    """

    architecture: Architecture
    dim: int
    chips: str
    card: CardFile
    state: State | None = field(default=None, repr=False)
    origin: str = "random weights"
    sha256: str = ""

    @property
    def input(self) -> Input:
        """What the network takes: channels, mean and scale."""
        return resolve_input(self.card)

    @property
    def licence(self) -> str:
        """Licence of the initial weights. Whether it holds for the trained weights is a question for lawyers."""
        return self.card.licence if self.state is not None else "that of the training data"

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the network's chips."""
        return resolve_chip_layout(self.card).size if self.card.role == "embedder" else (0, 0)

    def build(self, seed: int, dropout: float | None = None) -> nn.Module:
        """Build the network, in training mode.

        Args:
            seed: random seed of the layers that the initial weights do not cover.
            dropout: probability of the network's dropout layers; default: that of the architecture.

        Raises:
            WeightsError: The weights do not fit the network. The message names the tensors.
        """
        # The seed covers the layers that no weights fill.
        torch.manual_seed(seed)
        net = self.architecture.build(self.dim, self.size)
        if self.state is not None:
            # Tensors whose size depends on the length of the embedding keep their random start.
            random_state = net.state_dict()
            resized = {name: random_state[name] for name in self.list_resized()}
            try:
                load_state(net, {**self.state, **resized}, self.origin)
            except WeightsError as error:
                raise WeightsError(f"{error}. {_suggest_architecture(self)}") from error
        if dropout is not None:
            for module in net.modules():
                if isinstance(module, nn.modules.dropout._DropoutNd):
                    module.p = dropout
        return net.requires_grad_(True).train()

    def list_resized(self) -> list[str]:
        """List the tensors that start at random: the weights have another `dim`, or are a trunk without this layer."""
        if self.state is None:
            return []
        axes = find_output_axes(self.architecture, self.dim, self.size)
        # Weights of ImageNet have a classifier instead of the embedding layer.
        if axes and not axes.keys() & self.state.keys():
            return list(axes)
        # Nothing is resized if the weights have the same length already.
        if _infer_dim(self.state, self.architecture, self.size) == self.dim:
            return []
        shapes = {name: tensor.shape for name, tensor in self._build_blank().state_dict().items()}
        return [
            name
            for name, axis in axes.items()
            if name in self.state and _differs_only_in(self.state[name].shape, shapes[name], axis)
        ]

    def list_frozen_prefixes(self, config: ModelConfig) -> tuple[str, ...]:
        """List the prefixes of parameter names that `model.freeze` stands for."""
        if config.freeze != "trunk":
            return config.freeze
        if self.architecture.role == "detector":
            return ("trunk",)
        output = find_output_axes(self.architecture, self.dim, self.size)
        net = self._build_blank()
        return tuple(name for name, _ in net.named_parameters() if name not in output)

    def _build_blank(self) -> nn.Module:
        return _build_blank(self.architecture, self.dim, self.size)


def find_output_axes(architecture: Architecture, dim: int, size: tuple[int, int]) -> dict[str, int]:
    """Find the tensors whose shape depends on the length of the embedding.

    Returns:
        The axis that depends on the length, by tensor name.
    """
    # Build the network for two lengths, and see which shapes differ.
    state = _build_blank(architecture, dim, size).state_dict()
    longer_state = _build_blank(architecture, dim + 1, size).state_dict()
    axes: dict[str, int] = {}
    for name, tensor in state.items():
        pairs = zip(tensor.shape, longer_state[name].shape, strict=True)
        changed = [axis for axis, (length, longer) in enumerate(pairs) if length != longer]
        if changed:
            axes[name] = changed[0]
    return axes


def _differs_only_in(one: Sequence[int], other: Sequence[int], axis: int) -> bool:
    """Check that two shapes differ in this axis and in no other. `fit` reports any other mismatch."""
    if len(one) != len(other):
        return False
    return all((a != b) == (n == axis) for n, (a, b) in enumerate(zip(one, other, strict=True)))


def _build_blank(architecture: Architecture, dim: int, size: tuple[int, int]) -> nn.Module:
    """Build the network without memory for its weights."""
    with torch.device("meta"):
        return architecture.build(dim, size)


def resolve_start(config: ModelConfig, role: Role = "embedder") -> NetworkStart:
    """Find the architecture and the initial weights that `[model]` names.

    Args:
        config: the settings of the network.
        role: embedder or detector.

    Raises:
        ConfigError: The config names nothing that can be trained.
        WeightsError: The weights cannot be read.
    """
    # The start is a model's card, random weights, a registered model, or a file of weights, in this order.
    if config.start.endswith(".toml"):
        return _load_card(config, Path(config.start), role)
    name = config.architecture or (config.start if config.start in ARCHITECTURES else "")
    architecture = _get_architecture(name, role)
    card = CardFile(name, "", role, name, dim=config.dim or _DEFAULT_DIM)
    start = NetworkStart(architecture, card.dim, name, card)
    if not config.start:
        return start
    if config.start in ARCHITECTURES:
        return _load_registered(start, config)
    path = Path(config.start)
    # A file is a checkpoint of our own, or weights with names of another project.
    state = _read_own_checkpoint(path) or rename_keys(read_state(path), architecture)
    dim = config.dim or _infer_dim(state, architecture, start.size)
    card = replace(card, dim=dim)
    return replace(start, dim=dim, card=card, state=state, origin=str(path), sha256=_hash_file(path))


def _suggest_architecture(start: NetworkStart) -> str:
    """Say of which other network the weights of a file are, as far as names and shapes tell."""
    state = read_state(start.origin) if Path(start.origin).is_file() else {}
    role = start.card.role
    fitting = [one.name for one in ARCHITECTURES.values() if one.role == role and _fits(state, one)]
    if fitting:
        return f"It fits {' and '.join(fitting)}: set model.architecture={fitting[0]}"
    return (
        f"Neither {start.architecture.name} nor another network here has its tensors: "
        "`facepipe models --architectures` lists them"
    )


def _fits(state: State, architecture: Architecture) -> bool:
    """Tell whether weights fill exactly the layers of a network, but those of the embedding's length."""
    named = rename_keys(state, architecture)
    size = architecture.layout.size
    ends = find_output_axes(architecture, _DEFAULT_DIM, size)
    blank = _build_blank(architecture, _DEFAULT_DIM, size).state_dict()
    expected = {name: tensor.shape for name, tensor in blank.items() if not _is_free(name, ends)}
    given = {name: tensor.shape for name, tensor in named.items() if not _is_free(name, ends)}
    return expected == given


def _is_free(name: str, ends: dict[str, int]) -> bool:
    """Tell whether a network may lack a tensor, or have it in another length."""
    return name in ends or name.endswith("num_batches_tracked")


def _read_own_checkpoint(path: Path) -> State | None:
    """Read the network of a checkpoint that our training wrote, or return None for other files."""
    if not checkpointing.is_checkpoint(path):
        return None
    try:
        return dict(checkpointing.read_checkpoint(path)["net"])
    except checkpointing.DamagedCheckpointError as error:
        raise WeightsError(f"the checkpoint {str(path)!r} is damaged: {error}") from error


def _get_architecture(name: str, role: Role) -> Architecture:
    known = sorted(a.name for a in ARCHITECTURES.values() if a.role == role)
    if not name:
        raise ConfigError(
            f"model.architecture is missing: set it to one of {', '.join(known)}, or set model.start to a model's TOML "
            "file"
        )
    if name not in known:
        raise ConfigError(f"model.architecture: no {role} is named {name!r}; choose from {', '.join(known)}")
    return ARCHITECTURES[name]


def _load_card(config: ModelConfig, path: Path, role: Role) -> NetworkStart:
    """Start from a model's TOML file."""
    card = read_card(path)
    if card.role != role:
        raise ConfigError(f"model.start: {path} is a {card.role}; expected a {role}")
    if is_onnx(card) or not card.architecture:
        raise ConfigError(f"model.start: {path} is an ONNX graph, which cannot be trained; start from a checkpoint")
    if config.architecture and config.architecture != card.architecture:
        raise ConfigError(
            f"model.start is a {card.architecture}, but model.architecture={config.architecture}: leave one out"
        )
    architecture = ARCHITECTURES[card.architecture]
    weights = path.parent / card.weights
    # Check the digest before anything is read from the file.
    sha256 = verify_weights(weights, card.sha256)
    state = rename_keys(read_state(weights), architecture, card.keys)
    dim = config.dim or card.dim
    return NetworkStart(architecture, dim, str(path), replace(card, dim=dim), state, str(weights), sha256)


def _load_registered(start: NetworkStart, config: ModelConfig) -> NetworkStart:
    """Start from the weights of a registered model. Only dlib's can be trained."""
    from facepipe.models.zoo.packaged import DLIB_SHA256, load_dlib_net
    from facepipe.models.zoo.registry import CARDS

    if config.start != "dlib-resnet":
        raise ConfigError(
            f"model.start: {config.start} has no trainable weights; set it as model.architecture, and set model.start "
            "to a checkpoint or a model's TOML file"
        )
    card = replace(start.card, licence=CARDS[config.start].licence)
    state = load_dlib_net().state_dict()
    return replace(start, card=card, state=state, origin=config.start, sha256=DLIB_SHA256)


def _infer_dim(state: State, architecture: Architecture, size: tuple[int, int]) -> int:
    """Infer the length of the embedding: the most frequent length of the axes that depend on it."""
    axes = find_output_axes(architecture, _DEFAULT_DIM, size)
    lengths = Counter(
        state[name].shape[axis] for name, axis in axes.items() if name in state and axis < len(state[name].shape)
    )
    return lengths.most_common(1)[0][0] if lengths else _DEFAULT_DIM


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build_card(start: NetworkStart, name: str, figures: dict[str, float]) -> CardFile:
    """Build the card of a trained model.

    An embedder's card spells out its input, so that a later change of the architecture's defaults does not affect it.

    Args:
        start: what the training started from.
        name: name of the model.
        figures: its scores; "threshold" becomes the threshold for one person.
    """
    card_input = start.card.input
    size = card_input.size or start.architecture.layout.size
    full_input = replace(card_input, mean=start.input.mean, scale=start.input.scale, size=size)
    return CardFile(
        name=name,
        weights="",
        role=start.card.role,
        architecture=start.architecture.name,
        dim=start.dim,
        licence=start.licence,
        same_person=figures.get("threshold"),
        source=f"trained by facepipe from {start.origin}",
        figures=figures,
        input=full_input if start.card.role == "embedder" else card_input,
    )
