"""The models against the programs they come from, and the refusal of weights that were altered."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from facepipe.errors import ModelError, WeightsError
from facepipe.imaging.decode import decode
from facepipe.imaging.header import read_header
from facepipe.models.detectors import retinaface_decode
from facepipe.models.detectors.retinaface_decode import apply_sorted_nms
from facepipe.models.detectors.retinaface_engines import OnnxRetinaFace, TorchRetinaFace
from facepipe.models.dlib.format import FormatError, read_metric_network
from facepipe.models.dlib.layout import fold_layers
from facepipe.models.dlib.resnet import DlibResNet
from facepipe.models.embedders.engines import TorchEmbedder
from facepipe.models.protocols import DetectionLimits
from facepipe.models.runtime.device import resolve_device
from facepipe.models.runtime.preprocess import Input
from facepipe.models.weights import find_package_file, read_bytes_literal, verify_sha256
from facepipe.models.zoo.architectures import ARCHITECTURES
from facepipe.models.zoo.packaged import (
    DLIB_SHA256,
    load_dlib_net,
    load_retinaface_net,
    read_dlib_weights,
    read_retinaface_onnx,
)
from facepipe.models.zoo.registry import CARDS, find_card

LIMITS = DetectionLimits(0.5, 0.4)
DLIB_FILE = "models/dlib_face_recognition_resnet_model_v1.dat"
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def chips(n: int = 9) -> np.ndarray:
    """Chips with structure at all scales."""
    import cv2

    rng = np.random.default_rng(0)
    layers = [cv2.resize(rng.integers(0, 255, (k, k, 3), np.uint8), (150, 150)) for k in (3, 9, 30, 150)]
    return np.stack([np.roll(np.mean(layers, 0), 17 * k, (0, 1)) for k in range(n)]).astype(np.uint8)


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    """What dlib itself makes of the chips."""
    import dlib

    file = find_package_file("face_recognition_models", DLIB_FILE, "face-recognition-models")
    model = dlib.face_recognition_model_v1(str(file))
    return np.array([model.compute_face_descriptor(chip) for chip in chips()])


def test_dlib_on_cpu(reference: np.ndarray) -> None:
    assert np.abs(find_card("dlib-resnet", "embedder").load("cpu", 1).embed(chips()) - reference).max() < 1e-5


def test_dlib_as_torch_module(reference: np.ndarray) -> None:
    net = TorchEmbedder(load_dlib_net(), ARCHITECTURES["dlib-resnet"].input, (150, 150), device="cpu")
    assert np.abs(net.embed(chips()) - reference).max() < 1e-5


@cuda
@pytest.mark.gpu
def test_dlib_on_gpu(reference: np.ndarray) -> None:
    assert np.abs(find_card("dlib-resnet", "embedder").load("cuda", 1).embed(chips()) - reference).max() < 1e-3


def test_dlib_parameters() -> None:
    net = DlibResNet().load_weights(*read_dlib_weights())
    # dlib counts 5,614,592 with its affine layers, of which 2 * filters are folded away in each convolution.
    filters = sum(m.out_channels for m in net.modules() if isinstance(m, torch.nn.Conv2d))
    assert sum(p.numel() for p in net.parameters()) + 2 * filters == 5_614_592


@pytest.fixture(scope="module", params=["portraits", pytest.param("photos", marks=pytest.mark.shared)])
def scenes(request: pytest.FixtureRequest) -> list[np.ndarray]:
    """Real photos, padded to multiples of 32."""
    names = {"portraits": ("one", "two"), "photos": ("couple", "img54", "img27")}[request.param]
    found = []
    for name in names:
        data = (request.getfixturevalue(request.param) / f"{name}.jpg").read_bytes()
        pixels = decode(data, read_header(data), 2)
        h, w = (side // 32 * 32 for side in pixels.shape[:2])
        found.append(np.ascontiguousarray(pixels[:h, :w]))
    return found


def test_retinaface_module_equals_its_graph() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (1, 160, 224, 3), np.uint8)
    x = retinaface_decode.to_bgr_planes(noise)
    expected = x.copy()
    bgr = noise[..., ::-1].astype(np.float32) - np.array([104, 117, 123], np.float32)
    assert np.array_equal(expected, bgr.transpose(0, 3, 1, 2))
    graph = OnnxRetinaFace(read_retinaface_onnx(), LIMITS)._session.run(None, {"input": x})
    with torch.inference_mode():
        boxes, scores, points = (out.numpy() for out in load_retinaface_net()(torch.from_numpy(x)))
    assert np.abs(boxes - graph[0]).max() < 1e-4
    assert np.abs(scores - graph[1][..., 1]).max() < 1e-5
    assert np.abs(points - graph[2]).max() < 1e-4
    assert len(retinaface_decode.build_anchors(160, 224)) == boxes.shape[1]


def test_retinaface_engines_find_the_same_faces(scenes: list[np.ndarray]) -> None:
    onnx, module = OnnxRetinaFace(read_retinaface_onnx(), LIMITS), TorchRetinaFace(load_retinaface_net(), LIMITS, "cpu")
    for scene in scenes:
        (a,), (b,) = onnx.detect(scene[None]), module.detect(scene[None])
        assert len(a.scores) == len(b.scores) > 0
        assert np.abs(a.boxes - b.boxes).max() < 0.01
        assert np.abs(a.landmarks - b.landmarks).max() < 0.01


@cuda
@pytest.mark.gpu
def test_retinaface_on_gpu(scenes: list[np.ndarray]) -> None:
    gpu = TorchRetinaFace(load_retinaface_net(), LIMITS, "cuda")
    for scene in scenes:
        (a,), (b,) = OnnxRetinaFace(read_retinaface_onnx(), LIMITS).detect(scene[None]), gpu.detect(scene[None])
        assert len(a.scores) == len(b.scores)
        assert np.abs(a.landmarks - b.landmarks).max() < 0.5


def test_suppression_keeps_the_best_of_overlapping_boxes() -> None:
    boxes = np.array([[0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30], [0, 0, 9, 10]], np.float32)
    assert apply_sorted_nms(boxes, 0.4).tolist() == [0, 2]
    assert apply_sorted_nms(np.empty((0, 4), np.float32), 0.4).tolist() == []


def test_landmarks_are_where_they_should_be(scenes: list[np.ndarray]) -> None:
    faces = OnnxRetinaFace(read_retinaface_onnx(), LIMITS).detect(scenes[0][None])[0]
    left_eye, right_eye, nose, left_mouth, right_mouth = faces.landmarks[0]
    assert left_eye[0] < right_eye[0]
    assert left_mouth[0] < right_mouth[0]
    assert max(left_eye[1], right_eye[1]) < nose[1] < min(left_mouth[1], right_mouth[1])


def test_altered_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = find_package_file("face_recognition_models", DLIB_FILE, "face-recognition-models").read_bytes()
    with pytest.raises(WeightsError, match="not the registered file"):
        verify_sha256(real[:-1] + b"\x01", DLIB_SHA256, "dlib")
    package = tmp_path / "face_recognition_models"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('weights are found without importing their package')")
    altered = bytearray(real)
    altered[5_000_000] ^= 1
    (package / DLIB_FILE).write_bytes(bytes(altered))
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    read_dlib_weights.cache_clear()
    with pytest.raises(WeightsError, match="SHA-256"):
        read_dlib_weights()
    (package / DLIB_FILE).unlink()
    with pytest.raises(WeightsError, match="pip install face-recognition-models"):
        read_dlib_weights()


def test_foreign_files_are_not_misread() -> None:
    real = find_package_file("face_recognition_models", DLIB_FILE, "face-recognition-models").read_bytes()
    for data in (b"", b"\x01\x01", real[:100_000], real + b"\0", real[:60] + b"\7" + real[61:]):
        with pytest.raises(FormatError):
            fold_layers(read_metric_network(data))


def test_a_literal_is_read_and_nothing_is_run() -> None:
    assert read_bytes_literal(b"import os\nX = b'12'\nos.abort()\n", "X") == b"12"
    with pytest.raises(WeightsError):
        read_bytes_literal(b"X = bytes(3)", "Y")


def test_unknown_models_are_named() -> None:
    with pytest.raises(ModelError, match="registered are: dlib-resnet"):
        find_card("arcface", "embedder")
    with pytest.raises(ModelError):
        find_card("dlib-resnet", "detector")
    assert all(c.licence for c in CARDS.values())


def test_a_size_that_a_network_does_not_take_is_named() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 9), torch.nn.Flatten())
    assert TorchEmbedder(net, Input(), (9, 9), device="cpu").dim == 4
    with pytest.raises(ModelError, match=r"does not take chips of \(9, 8\): .*Kernel size"):
        TorchEmbedder(net, Input(), (9, 8), device="cpu")


def test_devices_are_named_as_torch_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("facepipe.models.runtime.device.count_gpus", lambda: 2)
    assert [resolve_device(d) for d in ("auto", "cpu", "cuda", "cuda:1")] == ["cuda", "cpu", "cuda", "cuda:1"]
    for name in ("gpu", "", "CUDA", "cuda:", "cuda:x", "cuda1", "cpu:0", "mps", "cuda:0\n"):
        with pytest.raises(ModelError, match=r"no device is called .* auto, cpu, cuda and cuda:N"):
            resolve_device(name)
    with pytest.raises(ModelError, match="the last one here is cuda:1"):
        resolve_device("cuda:2")
    monkeypatch.setattr("facepipe.models.runtime.device.count_gpus", lambda: 0)
    assert resolve_device("auto") == "cpu"
    with pytest.raises(ModelError, match="no CUDA device is available"):
        resolve_device("cuda:0")
