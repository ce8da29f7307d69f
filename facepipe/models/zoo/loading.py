"""Load models from their TOML files: weights of ours, a public checkpoint, or any ONNX graph.

The SHA-256 in a gallery's contract covers the weights, the input and the projection: whatever changes a vector.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from facepipe.errors import ConfigError, ModelError, WeightsError
from facepipe.extras import require_module
from facepipe.imaging.dlib_chip import BoxToSquare
from facepipe.models.card import Card
from facepipe.models.checkpoint import State, load_state, read_state
from facepipe.models.projection import ProjectedEmbedder, read_projected_dim
from facepipe.models.protocols import DetectionLimits, Detector, Embedder, QualityModel
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


# Limits of copies, and the figures of a TOML file that hold them.
_COPY_FIGURES = {"near": "copies_near", "close_near": "copies_close_near", "same_shot": "copies_same_shot"}


def load_card(path: Path) -> Card:
    """Load the card of a model with a TOML file, after reading and checking its weights."""
    file = read_card(path)
    weights_path = path.parent / file.weights
    square = _find_square(file)
    return Card(
        name=file.name,
        role=file.role,
        summary=_describe_architecture(file),
        weights=file.source or str(weights_path),
        licence=file.licence,
        sha256=_hash_card(path, file, verify_weights(weights_path, file.sha256)),
        input=_describe_input(file),
        load=_LOADERS[file.role](str(path)),
        layout=None if file.role == "detector" else resolve_chip_layout(file),
        dim=read_projected_dim(path.parent / file.projection) if file.projection else file.dim,
        metric="euclidean on unit vectors",
        same_person=to_euclidean_threshold(file),
        copy_limits={key: file.figures[figure] for key, figure in _COPY_FIGURES.items() if figure in file.figures}
        or None,
        square=square,
        square_known=square is not None,
        turn_model=(file.architecture or "other") if file.role == "detector" else None,
    )


def _find_square(file: CardFile) -> BoxToSquare | None:
    architecture = ARCHITECTURES.get(file.architecture)
    return architecture.square if architecture else None


@dataclass(frozen=True)
class _EmbedderLoader:
    """A card's `load`; it can be pickled."""

    path: str

    def __call__(self, device: str, threads: int) -> Embedder:
        return load_embedder(Path(self.path), device, threads)


@dataclass(frozen=True)
class _DetectorLoader:
    """A card's `load`; it can be pickled."""

    path: str

    def __call__(self, device: str, threads: int, limits: DetectionLimits) -> Detector:
        return load_detector(Path(self.path), device, threads, limits)


@dataclass(frozen=True)
class _QualityLoader:
    """A card's `load`; it can be pickled."""

    path: str

    def __call__(self, device: str, threads: int) -> QualityModel:
        return load_quality_model(Path(self.path), device, threads)


_LOADERS: dict[str, Callable[[str], Callable[..., Any]]] = {
    "embedder": _EmbedderLoader,
    "detector": _DetectorLoader,
    "quality": _QualityLoader,
}


def load_quality_model(path: Path, device: str, threads: int) -> QualityModel:
    """Load the quality model of a TOML file.

    Raises:
        ModelError: The graph does not give one number per chip.
    """
    from facepipe.models.quality_model import OnnxQuality

    file = read_card(path)
    graph = (path.parent / file.weights).read_bytes()
    size = resolve_chip_layout(file).size
    return OnnxQuality(graph, resolve_input(file), size, device=device, threads=threads)


def load_embedder(path: Path, device: str, threads: int, *, raw: bool = False) -> Embedder:
    """Load the embedder of a TOML file.

    Args:
        path: The TOML file.
        device: A torch device.
        threads: Threads on a CPU.
        raw: Whether to leave its projection out.

    Raises:
        ModelError: Its vectors have another length than the file says.
    """
    from facepipe.models.embedders.engines import OnnxEmbedder, TorchEmbedder

    file = read_card(path)
    size = resolve_chip_layout(file).size
    model_input = resolve_input(file)
    embedder: Embedder
    # Run a graph as it is, and a checkpoint in our module.
    if is_onnx(file):
        graph = (path.parent / file.weights).read_bytes()
        embedder = OnnxEmbedder(graph, model_input, size, device=device, threads=threads)
    else:
        embedder = TorchEmbedder(load_net(path)[0], model_input, size, device=device, threads=threads)
    if embedder.dim != file.dim:
        raise ModelError(f"{path}: the model gives {embedder.dim} numbers per face, but the file says dim = {file.dim}")
    if raw:
        return embedder
    if file.projection:
        sha256 = hash_without_projection(path, file)
        return ProjectedEmbedder.from_file(embedder, path.parent / file.projection, sha256)
    return embedder


def load_detector(path: Path, device: str, threads: int, limits: DetectionLimits) -> Detector:
    """Load the detector of a TOML file: a RetinaFace checkpoint, or a YuNet or SCRFD graph.

    Raises:
        ModelError: It is another model.
    """
    file = read_card(path)
    if is_onnx(file):
        return _load_onnx_detector(file, path.parent / file.weights, threads, limits)
    from facepipe.models.detectors.retinaface_engines import OnnxRetinaFace, TorchRetinaFace
    from facepipe.models.detectors.retinaface_onnx import build_retinaface_onnx

    net: Any = load_net(path)[0]
    channels: Channels = "rgb" if resolve_input(file).channels == "rgb" else "bgr"
    if device == "cpu":
        return OnnxRetinaFace(build_retinaface_onnx(net), limits, threads=threads, channels=channels)
    return TorchRetinaFace(net, limits, device, channels)


def _load_onnx_detector(file: CardFile, weights_path: Path, threads: int, limits: DetectionLimits) -> Detector:
    graph = weights_path.read_bytes()
    if file.architecture == "yunet":
        from facepipe.models.detectors.yunet import YuNet

        return YuNet(graph, limits, threads)
    if file.architecture.startswith("retinaface"):
        from facepipe.models.detectors.retinaface_engines import OnnxRetinaFace

        channels: Channels = "rgb" if file.input.channels == "rgb" else "bgr"
        return OnnxRetinaFace(graph, limits, threads=threads, channels=channels)
    if file.architecture == "scrfd":
        from facepipe.models.detectors.scrfd import Scrfd

        return Scrfd(graph, limits, threads)
    raise ModelError(
        f"{file.name}: a detector's ONNX graph is that of retinaface, yunet or scrfd, not of {file.architecture}"
    )


def load_net(path: Path) -> "tuple[nn.Module, CardFile]":
    """Load the torch module of a TOML file with its weights, in evaluation mode.

    Raises:
        ModelError: The weights are an ONNX graph.
        MissingPackageError: torch is not installed.
        WeightsError: The weights do not fit the architecture.
    """
    file = read_card(path)
    if not file.architecture or is_onnx(file):
        raise ModelError(f"{path}: an ONNX graph runs unchanged; a torch module needs a checkpoint")
    require_module("torch", f"{file.name}, a model from a checkpoint,")
    architecture = ARCHITECTURES[file.architecture]
    weights_path = path.parent / file.weights
    net = architecture.build(file.dim, resolve_chip_layout(file).size)
    # Check the input by the checkpoint's lineage before its tensors are renamed.
    state = read_state(weights_path)
    lineage = architecture.find_lineage(file.keys) if file.keys else architecture.detect_lineage(state)
    _check_input_is_set(path, file, lineage)
    load_state(net, rename_keys(state, architecture, file.keys), str(weights_path))
    return net.eval(), file


def _check_input_is_set(path: Path, file: CardFile, lineage: Lineage | None) -> None:
    """Check that the input is set if the lineage was trained on another one than the architecture's."""
    values = file.input
    if lineage is None or lineage.input is None or None not in (values.channels, values.mean, values.scale):
        return
    trained_on = lineage.input
    raise ConfigError(
        f"{path}: checkpoints of {lineage.name} do not take the default input of {file.architecture}: set "
        f'input.channels, mean and scale; theirs are channels = "{trained_on.channels}", '
        f"mean = {trained_on.mean[0]:g}, scale = {trained_on.scale[0]:g}"
    )


def rename_keys(state: State, architecture: Architecture, keys: str = "") -> State:
    """Rename the tensors of a checkpoint to our names.

    Args:
        state: Tensors by name.
        architecture: The network.
        keys: Name of the key map; detected if empty.

    Raises:
        ConfigError: The architecture has no such key map.
    """
    key_maps = architecture.load_key_maps()
    if keys:
        if keys not in key_maps:
            known = ", ".join(key_maps) or "none"
            raise ConfigError(f"{architecture.name} has no key map {keys!r}; there are {known}")
        return key_maps[keys](state)
    lineage = architecture.detect_lineage(state)
    return key_maps[lineage.name](state) if lineage else state


def verify_weights(path: Path, sha256: str) -> str:
    """Hash a file of weights and compare it with the hash in the TOML file.

    Args:
        path: The file.
        sha256: The expected hash; empty if the TOML file has none.

    Returns:
        The SHA-256.

    Raises:
        WeightsError: The file is missing, or has another hash.
    """
    if not path.is_file():
        raise WeightsError(f"the weights {str(path)!r} are missing")
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 and actual != sha256:
        raise WeightsError(f"{str(path)!r} has SHA-256 {actual}, and its TOML file says {sha256}: not this file")
    return actual


def hash_without_projection(path: Path, card: CardFile) -> str:
    """Compute the fingerprint that the model has without its projection."""
    weights_sha256 = verify_weights(path.parent / card.weights, card.sha256)
    return _hash_card(path, replace(card, projection=""), weights_sha256)


def _hash_card(path: Path, card: CardFile, weights_sha256: str) -> str:
    """Hash everything that a vector depends on."""
    parts: dict[str, Any] = {
        "weights": weights_sha256,
        "input": asdict(resolve_input(card)),
        "architecture": card.architecture,
    }
    if card.projection:
        parts["projection"] = verify_weights(path.parent / card.projection, "")
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _describe_architecture(file: CardFile) -> str:
    architecture = ARCHITECTURES.get(file.architecture)
    return architecture.summary if architecture else "ONNX graph"


def _describe_input(file: CardFile) -> str:
    model_input = resolve_input(file)
    size = "x".join(map(str, resolve_chip_layout(file).size)) if file.role != "detector" else "any size"
    mean = _format_values(model_input.mean)
    scale = _format_values(model_input.scale)
    return f"{model_input.channels.upper()} {size}, (x - {mean}) / {scale}"


def _format_values(values: tuple[float, float, float]) -> str:
    return f"{values[0]:g}" if len(set(values)) == 1 else "(" + ", ".join(f"{v:g}" for v in values) + ")"
