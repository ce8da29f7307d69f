"""Measure every embedding network: size, cost, and faces per second of one CPU thread in torch and ONNX Runtime.

python tests/bench/embedders.py [NAME ...]     weights are random: speed does not depend on them
"""

import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from facepipe.models.dlib.resnet import DlibResNet
from facepipe.models.embedders.facenet_mobilenet import FaceNetMobileNet
from facepipe.models.embedders.inception_resnet import InceptionResNetV1
from facepipe.models.embedders.iresnet import IResNet
from facepipe.models.embedders.layers import count_parameters
from facepipe.models.embedders.mobilefacenet import MobileFaceNet
from facepipe.models.embedders.prelu import replace_prelus
from facepipe.models.embedders.resnet import ResNet
from facepipe.models.runtime.onnx_session import open_session
from facepipe.models.runtime.torch_inference import to_channels_last

BATCH = 8
SECONDS = 4.0
MIN_CALLS = 3
# Constructor and (height, width) of the chips, by name.
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]] = {
    "dlib-resnet": (DlibResNet, (150, 150)),
    "mobilefacenet": (lambda: MobileFaceNet(size=(96, 112)), (112, 96)),
    "mobilefacenet-112": (MobileFaceNet, (112, 112)),
    "iresnet18": (lambda: IResNet(depth=18), (112, 112)),
    "lresnet50e-ir": (IResNet, (112, 112)),
    "iresnet100": (lambda: IResNet(depth=100), (112, 112)),
    "resnet18": (lambda: ResNet(depth=18), (112, 112)),
    "resnet50": (ResNet, (112, 112)),
    "facenet-mobilenet": (FaceNetMobileNet, (160, 160)),
    "facenet-inception": (InceptionResNetV1, (160, 160)),
}


def count_multiply_adds(net: nn.Module, images: Tensor) -> int:
    """Count the multiply-adds of the convolutions and linear layers for one image."""
    counts = []

    def count(module: nn.Module, _: tuple[Tensor, ...], out: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        counts.append(out[0].numel() * weight[0].numel())

    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.inference_mode():
        net(images[:1])
    for hook in hooks:
        hook.remove()
    return sum(counts)


def export_onnx(net: nn.Module, images: Tensor) -> bytes:
    """Export a network as ONNX, for batches of any length."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            replace_prelus(net),
            (images,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("n")},),
            input_names=["input"],
            output_names=["embedding"],
            verbose=False,
        )
    assert program is not None
    return program.model_proto.SerializeToString()


def measure_faces_per_second(call: Callable[[], object]) -> float:
    """Measure faces per second, from the median of calls over some seconds, after a warm-up call."""
    call()
    times: list[float] = []
    while sum(times) < SECONDS or len(times) < MIN_CALLS:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return BATCH / statistics.median(times)


def main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    names = sys.argv[1:] or list(NETS)
    print(
        f"{'model':18s} {'h x w':>9s} {'parameters':>11s} {'G mult-adds':>11s} {'torch/s':>8s} {'ONNX/s':>8s}  difference"
    )
    for name in names:
        make, size = NETS[name]
        torch.manual_seed(0)
        net = make().eval()
        images = torch.randn(BATCH, 3, *size)
        parameters = count_parameters(net)
        cost = count_multiply_adds(net, images)
        onnx = open_session(export_onnx(net, images), threads=1)
        array = images.numpy()
        (vectors,) = onnx.run(None, {"input": array})
        net = to_channels_last(net, "cpu")
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            difference = np.abs(vectors - net(images).numpy()).max() / np.abs(vectors).max()
            eager = measure_faces_per_second(lambda net=net, images=images: net(images))  # type: ignore[misc]
        runtime = measure_faces_per_second(lambda onnx=onnx, array=array: onnx.run(None, {"input": array}))  # type: ignore[misc]
        shape = f"{size[0]}x{size[1]}"
        print(
            f"{name:18s} {shape:>9s} {parameters:11,d} {cost / 1e9:11.3f} {eager:8.1f} {runtime:8.1f}  {difference:.1e}"
        )


if __name__ == "__main__":
    main()
