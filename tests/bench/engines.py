"""Compare ONNX Runtime with torch for the default models on one core, and on a GPU if there is one.

python tests/bench/engines.py
"""

import statistics
import time
from collections.abc import Callable

import cv2
import numpy as np
import torch

from facepipe.models.detectors.retinaface_engines import TorchRetinaFace
from facepipe.models.dlib.resnet import DlibResNet
from facepipe.models.embedders.engines import TorchEmbedder
from facepipe.models.protocols import DetectionLimits
from facepipe.models.zoo.architectures import ARCHITECTURES
from facepipe.models.zoo.packaged import load_retinaface_net, read_dlib_weights
from facepipe.models.zoo.registry import find_card

LIMITS = DetectionLimits(0.7, 0.4)


def measure_milliseconds(call: Callable[[], object], items: int, rounds: int = 15) -> float:
    """Measure the median time per item, after two warm-up calls."""
    for _ in range(2):
        call()
    durations = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        durations.append((time.perf_counter() - start) / items)
    return statistics.median(durations) * 1e3


def main() -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    rng = np.random.default_rng(0)
    chips = rng.integers(0, 255, (32, 150, 150, 3), np.uint8)
    frames = rng.integers(0, 255, (8, 480, 640, 3), np.uint8)
    detectors = {
        "onnxruntime": find_card("retinaface-mnet025", "detector").load("cpu", 1, LIMITS),
        "torch": TorchRetinaFace(load_retinaface_net(), LIMITS, "cpu"),
    }
    net = DlibResNet().load_weights(*read_dlib_weights())
    embedders = {
        "onnxruntime": find_card("dlib-resnet", "embedder").load("cpu", 1),
        "torch": TorchEmbedder(net, ARCHITECTURES["dlib-resnet"].input, (150, 150), device="cpu"),
    }
    for n in (1, 8):
        times = {name: measure_milliseconds(lambda e=e, n=n: e.detect(frames[:n]), n) for name, e in detectors.items()}
        text = ", ".join(f"{name} {ms:.1f} ms" for name, ms in times.items())
        print(f"RetinaFace 640x480, batch {n}: {text}; torch/onnxruntime {times['torch'] / times['onnxruntime']:.2f}")
    for n in (2, 8, 32):
        times = {name: measure_milliseconds(lambda e=e, n=n: e.embed(chips[:n]), n) for name, e in embedders.items()}
        text = ", ".join(f"{name} {ms:.2f} ms" for name, ms in times.items())
        print(f"dlib ResNet, batch {n}: {text}; torch/onnxruntime {times['torch'] / times['onnxruntime']:.2f}")
    if torch.cuda.is_available():
        gpu_detector = find_card("retinaface-mnet025", "detector").load("cuda", 1, LIMITS)
        gpu_embedder = find_card("dlib-resnet", "embedder").load("cuda", 1)
        many = np.repeat(chips, 16, 0)
        print(
            f"{torch.cuda.get_device_name()}: RetinaFace {measure_milliseconds(lambda: gpu_detector.detect(frames), 8):.2f} ms, "
            f"dlib ResNet {measure_milliseconds(lambda: gpu_embedder.embed(many), len(many)):.3f} ms"
        )


if __name__ == "__main__":
    main()
