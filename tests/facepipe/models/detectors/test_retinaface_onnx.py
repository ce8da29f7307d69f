"""RetinaFace's graph for ONNX Runtime against the torch module that it is written from."""

import numpy as np
import pytest
import torch

from facepipe.models.detectors.retinaface import Channels, RetinaFaceNet, Trunk, normalise_pixels
from facepipe.models.detectors.retinaface_engines import OnnxRetinaFace, TorchRetinaFace
from facepipe.models.detectors.retinaface_onnx import build_retinaface_onnx
from facepipe.models.parity import make_scene_chips
from facepipe.models.protocols import DetectionLimits
from facepipe.models.zoo.packaged import load_retinaface_net, read_retinaface_onnx


def trained_like(trunk: Trunk, norms: bool) -> RetinaFaceNet:
    """Random weights whose activations neither die nor grow, with batch norms that have seen something."""
    torch.manual_seed(0)
    net = RetinaFaceNet(trunk, norms)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
    return net.eval()


@pytest.mark.parametrize(
    ("trunk", "norms", "channels"),
    [("mobilenet025", True, "rgb"), ("mobilenet025", False, "bgr"), ("resnet50", True, "bgr")],
)
def test_the_graph_gives_the_modules_outputs(trunk: Trunk, norms: bool, channels: Channels) -> None:
    net = trained_like(trunk, norms)
    images = make_scene_chips((160, 96), 2)
    with torch.inference_mode():
        expected = [out.numpy() for out in net(normalise_pixels(torch.from_numpy(images), channels))]
    engine = OnnxRetinaFace(build_retinaface_onnx(net), DetectionLimits(0.5, 0.4), channels=channels)
    for n, image in enumerate(images):
        for found, wanted in zip(engine._run(image), expected, strict=True):
            assert np.abs(found - wanted[n]).max() < 1e-3 * max(1.0, float(np.abs(wanted[n]).max()))
            assert np.ptp(wanted[n]) > 1e-3


def test_the_default_detectors_weights_give_its_own_graphs_faces() -> None:
    ours = OnnxRetinaFace(build_retinaface_onnx(load_retinaface_net()), DetectionLimits(0.02, 0.4))
    theirs = OnnxRetinaFace(read_retinaface_onnx(), DetectionLimits(0.02, 0.4))
    module = TorchRetinaFace(load_retinaface_net(), DetectionLimits(0.02, 0.4), "cpu")
    for size in ((640, 480), (224, 224), (96, 160)):
        image = make_scene_chips(size, 1, seed=2)
        found = [engine.detect(image)[0][:3] for engine in (ours, theirs, module)]
        for a, b, c in zip(*found, strict=True):
            assert a.shape == b.shape == c.shape
            assert np.abs(a - b).max(initial=0) < 1e-2
            assert np.abs(a - c).max(initial=0) < 1e-2
