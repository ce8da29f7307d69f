"""Models as torch modules, for the stages that keep everything on one GPU."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from facepipe.errors import ModelError
from facepipe.models.projection import read_projection
from facepipe.models.runtime.preprocess import Input
from facepipe.models.zoo.architectures import ARCHITECTURES
from facepipe.models.zoo.card_file import CardFile, is_onnx, read_card, resolve_chip_layout, resolve_input
from facepipe.models.zoo.loading import hash_without_projection, load_net
from facepipe.models.zoo.packaged import load_dlib_net, load_retinaface_net
from facepipe.models.zoo.registry import find_card_file
from facepipe.types import Float32

if TYPE_CHECKING:
    from facepipe.models.detectors.retinaface import Channels

_DETECTOR = "retinaface-mnet025"
_DLIB = ("dlib-resnet", "face-recognition")


@dataclass(frozen=True)
class EmbedderNet:
    """An embedder as a torch module.

    Attributes:
        net: The network (n, 3, h, w) -> (n, d).
        input: Channel order, mean and scale.
        size: (width, height) of its chips.
        projection: (d, 128), if it has one.
    """

    net: Any
    input: Input
    size: tuple[int, int]
    projection: Float32 | None = None


def can_run_resident(detector: str, embedder: str) -> bool:
    """Return whether both models run as torch modules.

    That is RetinaFace, and any embedder that is not an ONNX graph. No weights are read.
    """
    return _is_torch_detector(detector) and _is_torch_embedder(embedder)


def _is_torch_detector(name: str) -> bool:
    if name == _DETECTOR:
        return True
    file = _read_card(name)
    return file is not None and not is_onnx(file) and file.architecture.startswith("retinaface-")


def _is_torch_embedder(name: str) -> bool:
    if name in _DLIB:
        return True
    file = _read_card(name)
    return file is not None and not is_onnx(file)


def load_detector_net(name: str) -> "tuple[Any, Channels]":
    """Load RetinaFace with its weights.

    Args:
        name: A detector for which `can_run_resident` holds.

    Returns:
        The network, and the channel order in which it was trained.
    """
    if name == _DETECTOR:
        return load_retinaface_net(), "bgr"
    net, file = load_net(_find_path(name))
    return net, "rgb" if resolve_input(file).channels == "rgb" else "bgr"


def load_embedder_net(name: str) -> EmbedderNet:
    """Load the network of an embedder for which `can_run_resident` holds."""
    if name in _DLIB:
        return EmbedderNet(load_dlib_net(), ARCHITECTURES["dlib-resnet"].input, (150, 150))
    path = _find_path(name)
    net, file = load_net(path)
    projection = None
    if file.projection:
        sha256 = hash_without_projection(path, file)
        projection = read_projection(path.parent / file.projection, file.dim, sha256)
    return EmbedderNet(net, resolve_input(file), resolve_chip_layout(file).size, projection)


def _find_path(name: str) -> Path:
    path = find_card_file(name)
    if path is None:
        raise ModelError(f"{name} has no TOML file")
    return path


def _read_card(name: str) -> CardFile | None:
    path = find_card_file(name)
    return read_card(path) if path else None
