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


def resident(detector: str, embedder: str) -> bool:
    """Whether both run as torch modules: RetinaFace, and an embedder that is no ONNX graph. Reads no weights."""
    return _is_module(detector, (_DETECTOR,), "retinaface-") and _is_module(embedder, _DLIB, "")


def _is_module(name: str, known: tuple[str, ...], architecture: str) -> bool:
    if name in known:
        return True
    from facepipe.models.zoo.card_file import is_graph

    file = _file(name)
    return file is not None and not is_graph(file) and file.architecture.startswith(architecture or file.architecture)


def detector_net(name: str) -> "tuple[Any, Channels]":
    """RetinaFace with the weights of a model for which `resident` holds, and the order of its channels: bgr or rgb."""
    if name == _DETECTOR:
        from facepipe.models.zoo.registry import retinaface_net

        return retinaface_net(), "bgr"
    from facepipe.models.zoo.card_file import fed_of
    from facepipe.models.zoo.loading import load_net

    net, file = load_net(_path(name))
    return net, "rgb" if fed_of(file).channels == "rgb" else "bgr"


def embedder_net(name: str) -> EmbedderNet:
    """The network of a model for which `resident` holds."""
    if name in _DLIB:
        from facepipe.models.zoo.registry import dlib_net

        return EmbedderNet(dlib_net(), ARCHITECTURES["dlib-resnet"].input, (150, 150))
    from facepipe.models import projection
    from facepipe.models.zoo.card_file import chips_of, fed_of
    from facepipe.models.zoo.loading import load_net, unprojected

    path = _path(name)
    net, file = load_net(path)
    matrix = None
    if file.projection:
        matrix = projection.read(path.parent / file.projection, file.dim, unprojected(path, file))
    return EmbedderNet(net, fed_of(file), chips_of(file).size, matrix)


def _path(name: str) -> Any:
    from facepipe.models.zoo.registry import file_of

    return file_of(name)


def _file(name: str) -> "CardFile | None":
    from facepipe.models.zoo.card_file import read_card

    path = _path(name)
    return read_card(path) if path else None
