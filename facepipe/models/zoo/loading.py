"""Models from their TOML files: weights of ours, a public checkpoint, or any ONNX graph.

The SHA-256 that a gallery's contract holds covers the weights, the input and the projection: whatever moves a vector.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from facepipe.errors import ConfigError, ModelError, WeightsError
from facepipe.models.card import Card
from facepipe.models.checkpoint import State, load_state, read_state
from facepipe.models.zoo.architectures import ARCHITECTURES, Architecture, Lineage
from facepipe.models.zoo.card_file import (
    CardFile,
    is_onnx,
    read_card,
    resolve_chip_layout,
    resolve_input,
    to_euclidean_threshold,
)

if TYPE_CHECKING:
    from torch import nn

    from facepipe.models.detectors.retinaface import Channels
    from facepipe.models.protocols import Detector, Embedder


def load_card(path: Path) -> Card:
    """The card that the registry would have had; weights are read and checked here, loaded by `load`."""
    file = read_card(path)
    weights = path.parent / file.weights
    sha256 = _fingerprint(path, file, verify_weights(weights, file.sha256))
    return Card(
        name=file.name,
        role=file.role,
        summary=_summary(file),
        weights=file.source or str(weights),
        licence=file.licence,
        sha256=sha256,
        input=_described(file),
        load=_LoadDetector(str(path)) if file.role == "detector" else _LoadEmbedder(str(path)),
        layout=resolve_chip_layout(file) if file.role == "embedder" else None,
        dim=128 if file.projection else file.dim,
        metric="euclidean on unit vectors",
        same_person=to_euclidean_threshold(file),
        square=_square(file),
        square_known=_square(file) is not None,
    )


def _square(card: CardFile) -> tuple[float, float, float] | None:
    made = ARCHITECTURES.get(card.architecture)
    return made.square if made else None


@dataclass(frozen=True)
class _LoadEmbedder:
    path: str

    def __call__(self, device: str, threads: int) -> "Embedder":
        return load_embedder(Path(self.path), device, threads)


@dataclass(frozen=True)
class _LoadDetector:
    path: str

    def __call__(self, device: str, threads: int, limits: tuple[float, float]) -> "Detector":
        return load_detector(Path(self.path), device, threads, limits)


def load_embedder(path: Path, device: str, threads: int, raw: bool = False) -> "Embedder":
    """The embedder of a TOML file. raw: without its projection. Raises ModelError where it gives no 128-D vectors."""
    from facepipe.models.engines import OnnxEmbedder, TorchEmbedder

    file = read_card(path)
    size = resolve_chip_layout(file).size
    if is_onnx(file):
        graph = (path.parent / file.weights).read_bytes()
        made: Embedder = OnnxEmbedder(graph, resolve_input(file), size, device, threads)
    else:
        made = TorchEmbedder(load_net(path)[0], resolve_input(file), size, device, threads)
    if made.dim != file.dim:
        raise ModelError(f"{path}: the model gives {made.dim} numbers a face, and the file says dim = {file.dim}")
    if raw:
        return made
    if file.projection:
        from facepipe.models.projection import ProjectedEmbedder

        return ProjectedEmbedder.from_file(
            made, path.parent / file.projection, fingerprint_without_projection(path, file)
        )
    if file.dim != 128:
        raise ModelError(
            f"{file.name} gives {file.dim}-D vectors, and a gallery holds 128-D ones: fit a projection with "
            f"`facepipe models project {path} GALLERY`"
        )
    return made


def load_detector(path: Path, device: str, threads: int, limits: tuple[float, float]) -> "Detector":
    """The detector of a TOML file: a RetinaFace checkpoint, or a YuNet or SCRFD graph."""
    file = read_card(path)
    if is_onnx(file):
        return _graph(file, path.parent / file.weights, threads, limits)
    from facepipe.models.detectors.retinaface_onnx import build_retinaface_onnx
    from facepipe.models.engines import OnnxRetinaFace, TorchRetinaFace

    net: Any = load_net(path)[0]
    fed = resolve_input(file)
    if fed.channels not in ("rgb", "bgr"):
        raise ModelError(f"{path}: channels are rgb or bgr")
    channels: Channels = "rgb" if fed.channels == "rgb" else "bgr"
    if device == "cpu":
        return OnnxRetinaFace(build_retinaface_onnx(net), limits, threads, channels)
    return TorchRetinaFace(net, limits, device, channels)


def _graph(file: CardFile, weights: Path, threads: int, limits: tuple[float, float]) -> "Detector":
    graph = weights.read_bytes()
    if file.architecture == "yunet":
        from facepipe.models.detectors.yunet import YuNet

        return YuNet(graph, limits, threads)
    if file.architecture == "scrfd":
        from facepipe.models.detectors.scrfd import Scrfd

        return Scrfd(graph, limits, threads)
    raise ModelError(f"{file.name}: a detector's ONNX graph is that of yunet or scrfd, not of {file.architecture}")


def load_net(path: Path) -> "tuple[nn.Module, CardFile]":
    """The torch module of a TOML file with its weights, in evaluation mode."""
    file = read_card(path)
    if not file.architecture or is_onnx(file):
        raise ModelError(f"{path}: an ONNX graph is run as it is; as a torch module it needs a checkpoint")
    made = ARCHITECTURES[file.architecture]
    weights = path.parent / file.weights
    net = made.build(file.dim, resolve_chip_layout(file).size)
    state = read_state(weights)
    _check_fed(path, file, made.lineage(file.keys or made.lineage_of(state)))
    load_state(net, rename_keys(state, made, file.keys), str(weights))
    return net.eval(), file


def _check_fed(path: Path, file: CardFile, lineage: Lineage | None) -> None:
    """A lineage that was trained on another input than the architecture's has to have it spelt out."""
    given = file.input
    if lineage is None or lineage.input is None or None not in (given.channels, given.mean, given.scale):
        return
    usual = lineage.input
    raise ConfigError(
        f"{path}: checkpoints of {lineage.name} are not fed as {file.architecture} is here: give input.channels, mean "
        f'and scale; theirs are channels = "{usual.channels}", mean = {usual.mean[0]:g}, scale = {usual.scale[0]:g}'
    )


def rename_keys(state: State, architecture: Architecture, keys: str = "") -> State:
    """A checkpoint's tensors under our names: by the key map that is named, else by the one that fits."""
    maps = architecture.key_maps()
    if keys:
        if keys not in maps:
            raise ConfigError(f"{architecture.name} has no key map {keys!r}; there are {', '.join(maps) or 'none'}")
        return maps[keys](state)
    found = architecture.lineage_of(state)
    return maps[found](state) if found else state


def verify_weights(weights: Path, sha256: str) -> str:
    """SHA-256 of a file of weights. Raises WeightsError where it is missing, or not the one that is given."""
    if not weights.is_file():
        raise WeightsError(f"the weights {str(weights)!r} are missing")
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 and found != sha256:
        raise WeightsError(f"{str(weights)!r} has SHA-256 {found}, and its TOML file says {sha256}: not this file")
    return found


def fingerprint_without_projection(path: Path, card: CardFile) -> str:
    """The fingerprint that the model has without its projection."""
    return _fingerprint(path, replace(card, projection=""), verify_weights(path.parent / card.weights, card.sha256))


def _fingerprint(path: Path, card: CardFile, weights: str) -> str:
    what: dict[str, Any] = {"weights": weights, "input": asdict(resolve_input(card)), "architecture": card.architecture}
    if card.projection:
        what["projection"] = verify_weights(path.parent / card.projection, "")
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _summary(card: CardFile) -> str:
    made = ARCHITECTURES.get(card.architecture)
    return made.summary if made else "ONNX graph"


def _described(card: CardFile) -> str:
    fed = resolve_input(card)
    size = "x".join(map(str, resolve_chip_layout(card).size)) if card.role == "embedder" else "any size"
    return f"{fed.channels.upper()} {size}, (x - {_short(fed.mean)}) / {_short(fed.scale)}"


def _short(values: tuple[float, float, float]) -> str:
    return f"{values[0]:g}" if len(set(values)) == 1 else "(" + ", ".join(f"{v:g}" for v in values) + ")"
