"""Which models are torch modules that the device-resident path can run, and their modules with weights."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from facepipe.models.runtime.preprocess import Input
from facepipe.models.zoo.architectures import ARCHITECTURES
from facepipe.types import Float32

if TYPE_CHECKING:
    from facepipe.models.detectors.retinaface import Channels
    from facepipe.models.zoo.card_file import CardFile

_DETECTOR = "retinaface-mnet025"
_DLIB = ("dlib-resnet", "face-recognition")


@dataclass(frozen=True)
class EmbedderNet:
    """A network (n, 3, h, w) -> (n, d), what it is fed, its chips' (width, height), and the projection (d, 128)."""

    net: Any
    fed: Input
    size: tuple[int, int]
    projection: Float32 | None = None


def can_run_resident(detector: str, embedder: str) -> bool:
    """Whether both run as torch modules: RetinaFace, and an embedder that is no ONNX graph. Reads no weights."""
    return _is_module(detector, (_DETECTOR,), "retinaface-") and _is_module(embedder, _DLIB, "")


def _is_module(name: str, known: tuple[str, ...], architecture: str) -> bool:
    if name in known:
        return True
    from facepipe.models.zoo.card_file import is_onnx

    file = _file(name)
    return file is not None and not is_onnx(file) and file.architecture.startswith(architecture or file.architecture)


def load_detector_net(name: str) -> "tuple[Any, Channels]":
    """RetinaFace with the weights of a model for which `resident` holds, and the order of its channels: bgr or rgb."""
    if name == _DETECTOR:
        from facepipe.models.zoo.registry import load_retinaface_net

        return load_retinaface_net(), "bgr"
    from facepipe.models.zoo.card_file import resolve_input
    from facepipe.models.zoo.loading import load_net

    net, file = load_net(_path(name))
    return net, "rgb" if resolve_input(file).channels == "rgb" else "bgr"


def load_embedder_net(name: str) -> EmbedderNet:
    """The network of a model for which `resident` holds."""
    if name in _DLIB:
        from facepipe.models.zoo.registry import load_dlib_net

        return EmbedderNet(load_dlib_net(), ARCHITECTURES["dlib-resnet"].input, (150, 150))
    from facepipe.models import projection
    from facepipe.models.zoo.card_file import resolve_chip_layout, resolve_input
    from facepipe.models.zoo.loading import fingerprint_without_projection, load_net

    path = _path(name)
    net, file = load_net(path)
    matrix = None
    if file.projection:
        matrix = projection.read_projection(
            path.parent / file.projection, file.dim, fingerprint_without_projection(path, file)
        )
    return EmbedderNet(net, resolve_input(file), resolve_chip_layout(file).size, matrix)


def _path(name: str) -> Any:
    from facepipe.models.zoo.registry import find_card_file

    return find_card_file(name)


def _file(name: str) -> "CardFile | None":
    from facepipe.models.zoo.card_file import read_card

    path = _path(name)
    return read_card(path) if path else None
