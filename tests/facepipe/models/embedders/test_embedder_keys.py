"""Key maps: public checkpoints' names, written down from their sources, and ours."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn

from facepipe.errors import WeightsError
from facepipe.models.checkpoint import State, load_state, read_state
from facepipe.models.embedders import keys
from facepipe.models.embedders.facenet_mobilenet import FaceNetMobileNet
from facepipe.models.embedders.inception_resnet import InceptionResNetV1
from facepipe.models.embedders.iresnet import IResNet
from facepipe.models.embedders.layers import count_parameters
from facepipe.models.embedders.mobilefacenet import MobileFaceNet
from facepipe.models.embedders.resnet import ResNet

Shapes = Iterator[tuple[str, tuple[int, ...]]]
CHECKPOINT = "weights/mobilefacenet-128-casia.ckpt"


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """Without memory for the weights: shapes and counts are there at once."""
    with torch.device("meta"):
        return make()


# What the lineages call their tensors.


def _bn(name: str, n: int) -> Shapes:
    yield from ((f"{name}.{leaf}", (n,)) for leaf in ("weight", "bias", "running_mean", "running_var"))
    yield f"{name}.num_batches_tracked", ()


def _conv(name: str, o: int, i: int, k: int | tuple[int, int] = 1) -> Shapes:
    yield f"{name}.weight", (o, i, *((k, k) if isinstance(k, int) else k))


def _block(name: str, o: int, i: int, k: int | tuple[int, int] = 1, prelu: bool = False) -> Shapes:
    """A module with `conv`, `bn` and perhaps `prelu`."""
    yield from _conv(f"{name}.conv", o, i, k)
    yield from _bn(f"{name}.bn", o)
    if prelu:
        yield f"{name}.prelu.weight", (o,)


_WIDE = [128] * 5 + [256] * 7 + [512] + [256] * 2  # of MobileFaceNet's bottlenecks
_ENDS = [64] * 6 + [128] * 10


def xiaoccer() -> Shapes:
    yield from _block("conv1", 64, 3, 3, True)
    yield from _block("dw_conv1", 64, 1, 3, True)
    for n, (i, wide, o) in enumerate(zip(_ENDS, _WIDE, _ENDS[1:], strict=False)):
        for at, (width, fan, k) in {0: (wide, i, 1), 3: (wide, 1, 3), 6: (o, wide, 1)}.items():
            yield from _conv(f"blocks.{n}.conv.{at}", width, fan, k)
            yield from _bn(f"blocks.{n}.conv.{at + 1}", width)
            if at < 6:
                yield f"blocks.{n}.conv.{at + 2}.weight", (width,)
    yield from _block("conv2", 512, 128, 1, True)
    yield from _block("linear7", 512, 1, (7, 6))
    yield from _block("linear1", 128, 512)


def treb1en() -> Shapes:
    names = ["conv_23", *(f"conv_3.model.{n}" for n in range(4)), "conv_34", *(f"conv_4.model.{n}" for n in range(6))]
    names += ["conv_45", "conv_5.model.0", "conv_5.model.1"]
    yield from _block("conv1", 64, 3, 3, True)
    yield from _block("conv2_dw", 64, 1, 3, True)
    for name, i, wide, o in zip(names, _ENDS, _WIDE, _ENDS[1:], strict=False):
        yield from _block(f"{name}.conv", wide, i, 1, True)
        yield from _block(f"{name}.conv_dw", wide, 1, 3, True)
        yield from _block(f"{name}.project", o, wide)
    yield from _block("conv_6_sep", 512, 128, 1, True)
    yield from _block("conv_6_dw", 512, 1, 7)
    yield "linear.weight", (512, 512)
    yield from _bn("bn", 512)


def arcface_torch(units: tuple[int, ...] = (3, 4, 14, 3)) -> Shapes:
    yield from _conv("conv1", 64, 3, 3)
    yield from _bn("bn1", 64)
    yield "prelu.weight", (64,)
    i = 64
    for n, (o, count) in enumerate(zip((64, 128, 256, 512), units, strict=True), 1):
        for u in range(count):
            at = f"layer{n}.{u}"
            yield from _bn(f"{at}.bn1", i)
            yield from _conv(f"{at}.conv1", o, i, 3)
            yield from _bn(f"{at}.bn2", o)
            yield f"{at}.prelu.weight", (o,)
            yield from _conv(f"{at}.conv2", o, o, 3)
            yield from _bn(f"{at}.bn3", o)
            if u == 0:
                yield from _conv(f"{at}.downsample.0", o, i)
                yield from _bn(f"{at}.downsample.1", o)
            i = o
    yield from _bn("bn2", 512)
    yield from (("fc.weight", (512, 512 * 49)), ("fc.bias", (512,)))
    yield from _bn("features", 512)


def mxnet() -> Shapes:
    """From the names of arcface_torch, whose modules are MXNet's in the same order."""
    leaves = {"running_mean": "moving_mean", "running_var": "moving_var", "weight": "gamma", "bias": "beta"}
    plain = {"conv1": "conv0", "bn1": "bn0", "prelu": "relu0", "bn2": "bn1", "fc": "pre_fc1", "features": "fc1"}
    inner = {"prelu": "relu1", "downsample.0": "conv1sc", "downsample.1": "sc"}
    for name, shape in arcface_torch():
        module, leaf = name.rsplit(".", 1)
        if leaf == "num_batches_tracked":
            continue
        leaf = leaf if len(shape) != 1 or module == "fc" else leaves[leaf]
        if module.startswith("layer"):
            layer, unit, part = module.split(".", 2)
            module = f"stage{layer[-1]}_unit{int(unit) + 1}_{inner.get(part, part)}"
        else:
            module = plain[module]
        yield f"{module}_{leaf}", shape


def facenet_pytorch() -> Shapes:
    ends = [3, 32, 32, 64, 80, 192, 256]
    stem = [("1a", 3), ("2a", 3), ("2b", 3), ("3b", 1), ("4a", 3), ("4b", 3)]
    for n, (name, k) in enumerate(stem):
        yield from _block(f"conv2d_{name}", ends[n + 1], ends[n], k)
    for n in range(5):
        yield from _block(f"repeat_1.{n}.branch0", 32, 256)
        for branch, layers in ((1, 2), (2, 3)):
            for at in range(layers):
                yield from _block(f"repeat_1.{n}.branch{branch}.{at}", 32, 32 if at else 256, 3 if at else 1)
        yield from _residual(f"repeat_1.{n}", 256, 96)
    yield from _block("mixed_6a.branch0", 384, 256, 3)
    yield from _block("mixed_6a.branch1.0", 192, 256)
    yield from _block("mixed_6a.branch1.1", 192, 192, 3)
    yield from _block("mixed_6a.branch1.2", 256, 192, 3)
    for n in range(10):
        yield from _cross(f"repeat_2.{n}", 896, 128, 7)
    for branch, widths in enumerate(((256, 384), (256, 256), (256, 256, 256))):
        for at, width in enumerate(widths):
            yield from _block(f"mixed_7a.branch{branch}.{at}", width, 256 if at else 896, 3 if at else 1)
    for n in range(5):
        yield from _cross(f"repeat_3.{n}", 1792, 192, 3)
    yield from _cross("block8", 1792, 192, 3)
    yield "last_linear.weight", (512, 1792)
    yield from _bn("last_bn", 512)
    yield from (("logits.weight", (8631, 512)), ("logits.bias", (8631,)))


def _cross(name: str, width: int, inner: int, k: int) -> Shapes:
    yield from _block(f"{name}.branch0", inner, width)
    yield from _block(f"{name}.branch1.0", inner, width)
    yield from _block(f"{name}.branch1.1", inner, inner, (1, k))
    yield from _block(f"{name}.branch1.2", inner, inner, (k, 1))
    yield from _residual(name, width, 2 * inner)


def _residual(name: str, width: int, inner: int) -> Shapes:
    yield from _conv(f"{name}.conv2d", width, inner)
    yield f"{name}.conv2d.bias", (width,)


def bubbliiiing_inception() -> Shapes:
    for name, shape in facenet_pytorch():
        if not name.startswith(("last_", "logits")):
            yield f"backbone.model.{name}", shape
    yield from _bubbliiiing_head(1792)


def bubbliiiing_mobilenet() -> Shapes:
    widths = [32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]
    places = [f"stage1.{n}" for n in range(1, 6)] + [f"stage2.{n}" for n in range(6)] + ["stage3.0", "stage3.1"]
    yield from _conv("backbone.model.stage1.0.0", 32, 3, 3)
    yield from _bn("backbone.model.stage1.0.1", 32)
    for place, i, o in zip(places, widths, widths[1:], strict=False):
        yield from _conv(f"backbone.model.{place}.0", i, 1, 3)
        yield from _bn(f"backbone.model.{place}.1", i)
        yield from _conv(f"backbone.model.{place}.3", o, i)
        yield from _bn(f"backbone.model.{place}.4", o)
    yield from _bubbliiiing_head(1024)


def _bubbliiiing_head(width: int) -> Shapes:
    yield "Bottleneck.weight", (128, width)
    yield from _bn("last_bn", 128)
    yield from (("classifier.weight", (10575, 128)), ("classifier.bias", (10575,)))


LINEAGES: dict[str, tuple[Callable[[], Shapes], Callable[[State], State], Callable[[], nn.Module]]] = {
    "xiaoccer": (xiaoccer, keys.rename_xiaoccer_mobilefacenet, lambda: MobileFaceNet(size=(96, 112))),
    "treb1en": (treb1en, keys.rename_treb1en_mobilefacenet, lambda: MobileFaceNet(512)),
    "arcface_torch": (arcface_torch, keys.rename_arcface_torch_iresnet, lambda: IResNet(512, eps=1e-5)),
    "arcface_torch-18": (
        lambda: arcface_torch((2, 2, 2, 2)),
        keys.rename_arcface_torch_iresnet,
        lambda: IResNet(512, depth=18),
    ),
    "arcface_torch-100": (
        lambda: arcface_torch((3, 13, 30, 3)),
        keys.rename_arcface_torch_iresnet,
        lambda: IResNet(512, depth=100),
    ),
    "mxnet": (mxnet, keys.rename_mxnet_iresnet, lambda: IResNet(512)),
    "facenet-pytorch": (facenet_pytorch, keys.rename_facenet_pytorch_inception, lambda: InceptionResNetV1(512)),
    "bubbliiiing-inception": (bubbliiiing_inception, keys.rename_bubbliiiing_inception, InceptionResNetV1),
    "bubbliiiing-mobilenet": (bubbliiiing_mobilenet, keys.rename_bubbliiiing_mobilenet, FaceNetMobileNet),
}


def modules(names: Iterator[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


@pytest.mark.parametrize("lineage", LINEAGES)
def test_key_maps_are_bijections(lineage: str) -> None:
    """Onto the network's names, with its shapes, and in the order of definition, which is the lineages' too."""
    names, key_map, make = LINEAGES[lineage]
    theirs = {name: torch.empty(shape, device="meta") for name, shape in names()}
    counters = "num_batches_tracked"
    ours = {k: v for k, v in on_meta(make).state_dict().items() if lineage != "mxnet" or not k.endswith(counters)}
    mapped = key_map(theirs)
    assert {k: v.shape for k, v in mapped.items()} == {k: v.shape for k, v in ours.items()}
    assert modules(iter(mapped)) == modules(iter(ours))
    classifier = [k for k in theirs if k.startswith(("logits.", "classifier."))]
    assert len(mapped) == len(theirs) - len(classifier)


def torchvision(bottlenecks: bool, units: tuple[int, ...]) -> Shapes:
    yield from _conv("conv1", 64, 3, 7)
    yield from _bn("bn1", 64)
    i = 64
    for n, (width, count) in enumerate(zip((64, 128, 256, 512), units, strict=True), 1):
        o = 4 * width if bottlenecks else width
        for u in range(count):
            at = f"layer{n}.{u}"
            plan = [(width, i, 1), (width, width, 3), (o, width, 1)] if bottlenecks else [(o, i, 3), (o, o, 3)]
            for k, step in enumerate(plan, 1):
                yield from _conv(f"{at}.conv{k}", *step)
                yield from _bn(f"{at}.bn{k}", step[0])
            if u == 0 and (i != o or n > 1):
                yield from _conv(f"{at}.downsample.0", o, i)
                yield from _bn(f"{at}.downsample.1", o)
            i = o
    yield from (("fc.weight", (1000, i)), ("fc.bias", (1000,)))


@pytest.mark.parametrize(("depth", "units"), [(18, (2, 2, 2, 2)), (50, (3, 4, 6, 3))])
def test_torchvisions_trunk_fits_but_for_the_embedding_layer(depth: int, units: tuple[int, ...]) -> None:
    theirs = {name: torch.empty(shape, device="meta") for name, shape in torchvision(depth == 50, units)}
    net = on_meta(lambda: ResNet(depth=depth))
    trunk = keys.rename_torchvision_resnet(theirs)
    ours = {k: v.shape for k, v in net.state_dict().items() if not k.startswith("embedding.")}
    assert {k: v.shape for k, v in trunk.items()} == ours
    with pytest.raises(WeightsError, match=r"2 missing: embedding\.weight, embedding\.bias"):
        load_state(net, trunk, "ResNet's file")


def test_mxnets_fixed_scale_is_one_whatever_the_file_holds() -> None:
    state = {"fc1_gamma": torch.full((3,), 7.0), "fc1_moving_var": torch.full((3,), 2.0), "unknown": torch.zeros(1)}
    mapped = keys.rename_mxnet_iresnet(state)
    assert mapped.keys() == {"last_bn.weight", "last_bn.running_var", "unknown"}
    assert torch.equal(mapped["last_bn.weight"], torch.ones(3))


def test_the_public_checkpoint_fits_bit_by_bit(shared: Path) -> None:
    if not (shared / CHECKPOINT).is_file():
        pytest.skip(f"{CHECKPOINT} is not in the shared data")
    state = read_state(shared / CHECKPOINT)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == dict(xiaoccer())
    net = MobileFaceNet(size=(96, 112))
    load_state(net, keys.rename_xiaoccer_mobilefacenet(state), CHECKPOINT)
    learnt = [t for k, t in state.items() if not k.endswith(("running_mean", "running_var", "tracked"))]
    assert count_parameters(net) == sum(t.numel() for t in learnt)
    for theirs, ours in zip(state.values(), net.state_dict().values(), strict=True):
        assert torch.equal(theirs, ours)


def test_a_wrapper_that_holds_itself_ends(tmp_path: Path) -> None:
    endless: dict[str, object] = {}
    endless["state_dict"] = endless
    torch.save(endless, tmp_path / "m.pth")
    with pytest.raises(WeightsError, match="holds no state dict"):
        read_state(tmp_path / "m.pth")


def test_damaged_checkpoints_are_weights_errors_whatever_the_bytes(tmp_path: Path) -> None:
    """A byte turned anywhere: it loads all the same, or it is an error of ours."""
    torch.save({"a": torch.arange(5.0), "b": {"c": torch.zeros(2)}}, tmp_path / "m.pth")
    whole = (tmp_path / "m.pth").read_bytes()
    refused = 0
    for at in range(0, len(whole), 7):
        (tmp_path / "m.pth").write_bytes(whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :])
        with suppress(WeightsError):
            refused += 1
            read_state(tmp_path / "m.pth")
            refused -= 1
    assert refused > 10
