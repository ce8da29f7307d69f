"""Every embedding network: size, cost, and faces per second of one CPU thread in torch and in ONNX Runtime.

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

BATCH, SECONDS, FEWEST = 8, 4.0, 3
# name: (constructor, (h, w))
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


def multiply_adds(net: nn.Module, images: Tensor) -> int:
    """Of the convolutions and linear layers, for one image."""
    counted = []

    def count(module: nn.Module, _: tuple[Tensor, ...], out: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        counted.append(out[0].numel() * weight[0].numel())

    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.inference_mode():
        net(images[:1])
    for hook in hooks:
        hook.remove()
    return sum(counted)


def graph(net: nn.Module, images: Tensor) -> bytes:
    """The network as ONNX, for batches of any length."""
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


def per_second(call: Callable[[], object]) -> float:
    """Faces, from the median of the calls of some seconds; one call before is not counted."""
    call()
    times: list[float] = []
    while sum(times) < SECONDS or len(times) < FEWEST:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return BATCH / statistics.median(times)


def main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    chosen = sys.argv[1:] or list(NETS)
    print(
        f"{'model':18s} {'h x w':>9s} {'parameters':>11s} {'G mult-adds':>11s} {'torch/s':>8s} {'ONNX/s':>8s}  difference"
    )
    for name in chosen:
        make, size = NETS[name]
        torch.manual_seed(0)
        net, images = make().eval(), torch.randn(BATCH, 3, *size)
        learnt, cost = count_parameters(net), multiply_adds(net, images)
        onnx = open_session(graph(net, images), threads=1)
        array = images.numpy()
        (found,) = onnx.run(None, {"input": array})
        net, images = to_channels_last(net, "cpu"), images.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            difference = np.abs(found - net(images).numpy()).max() / np.abs(found).max()
            eager = per_second(lambda net=net, images=images: net(images))  # type: ignore[misc]
        runtime = per_second(lambda onnx=onnx, array=array: onnx.run(None, {"input": array}))  # type: ignore[misc]
        shape = f"{size[0]}x{size[1]}"
        print(f"{name:18s} {shape:>9s} {learnt:11,d} {cost / 1e9:11.3f} {eager:8.1f} {runtime:8.1f}  {difference:.1e}")


if __name__ == "__main__":
    main()
