"""Detectors from their TOML files."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from facepipe.errors import ModelError
from facepipe.models.card_file import CardFile, fed_of, is_graph, read_card
from facepipe.models.loading import load_net

if TYPE_CHECKING:
    from facepipe.models.detectors.retinaface import Channels
    from facepipe.models.protocols import Detector

Limits = tuple[float, float]


def load_detector(path: Path, device: str, threads: int, limits: Limits) -> "Detector":
    """The detector of a TOML file: a RetinaFace checkpoint, or a YuNet or SCRFD graph."""
    file = read_card(path)
    if is_graph(file):
        return _graph(file, path.parent / file.weights, threads, limits)
    from facepipe.models.detectors.retinaface_onnx import graph
    from facepipe.models.engines import OnnxRetinaFace, TorchRetinaFace

    net: Any = load_net(path)[0]
    fed = fed_of(file)
    if fed.channels not in ("rgb", "bgr"):
        raise ModelError(f"{path}: channels are rgb or bgr")
    channels: Channels = "rgb" if fed.channels == "rgb" else "bgr"
    if device == "cpu":
        return OnnxRetinaFace(graph(net), limits, threads, channels)
    return TorchRetinaFace(net, limits, device, channels)


def _graph(file: CardFile, weights: Path, threads: int, limits: Limits) -> "Detector":
    graph = weights.read_bytes()
    if file.architecture == "yunet":
        from facepipe.models.detectors.yunet import YuNet

        return YuNet(graph, limits, threads)
    if file.architecture == "scrfd":
        from facepipe.models.detectors.scrfd import Scrfd

        return Scrfd(graph, limits, threads)
    raise ModelError(f"{file.name}: a detector's ONNX graph is that of yunet or scrfd, not of {file.architecture}")
