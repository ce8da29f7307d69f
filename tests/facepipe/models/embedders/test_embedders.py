"""Embedding networks: shapes, sizes, training and inference, files."""

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from facepipe.errors import WeightsError
from facepipe.models.checkpoint import load_state, read_state
from facepipe.models.dlib.resnet import DlibResNet
from facepipe.models.embedders.engines import TorchEmbedder
from facepipe.models.embedders.facenet_mobilenet import FaceNetMobileNet
from facepipe.models.embedders.inception_resnet import InceptionResNetV1
from facepipe.models.embedders.iresnet import IResNet
from facepipe.models.embedders.layers import ConvBN, count_parameters, fold_batch_norms
from facepipe.models.embedders.mobilefacenet import MobileFaceNet
from facepipe.models.embedders.prelu import replace_prelus
from facepipe.models.embedders.resnet import ResNet
from facepipe.models.runtime.preprocess import Input

# The smallest of each kind for small chips: (constructor, (h, w))
SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]] = {
    "mobilefacenet": (lambda: MobileFaceNet(size=(32, 48)), (48, 32)),
    "iresnet18": (lambda: IResNet(size=(32, 48), depth=18), (48, 32)),
    "inception-resnet-v1": (InceptionResNetV1, (80, 80)),
    "facenet-mobilenet": (FaceNetMobileNet, (64, 64)),
    "resnet18": (lambda: ResNet(depth=18), (64, 64)),
    "resnet50": (ResNet, (64, 64)),
}
# As they are used.
FULL: dict[str, tuple[Callable[[int], nn.Module], tuple[int, int]]] = {
    "mobilefacenet-112x96": (lambda dim: MobileFaceNet(dim, (96, 112)), (112, 96)),
    "mobilefacenet-112x112": (MobileFaceNet, (112, 112)),
    "lresnet50e-ir": (IResNet, (112, 112)),
    "inception-resnet-v1": (InceptionResNetV1, (160, 160)),
    "facenet-mobilenet": (FaceNetMobileNet, (160, 160)),
    "resnet18": (lambda dim: ResNet(dim, 18), (112, 112)),
    "resnet50": (ResNet, (224, 224)),
}


def chips(n: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """Without memory for the weights: shapes and counts are there at once."""
    with torch.device("meta"):
        return make()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Layers as small as these are slower on several threads, much so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=SMALL)
def small(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[int, int]]:
    torch.manual_seed(1)
    make, size = SMALL[request.param]
    return make(), size


def test_training_and_inference(small: tuple[nn.Module, tuple[int, int]]) -> None:
    net, size = small
    images = chips(3, size)
    before = {name: tensor.clone() for name, tensor in net.named_buffers()}
    out = net.train()(images)
    assert out.shape == (3, 128)
    assert out.dtype == torch.float32
    (out * torch.randn(out.shape)).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # IResNet's last bias stands before a batch norm, which takes it out again.
        assert name == "linear.bias" or parameter.grad.abs().max() > 0, name
    moved = {name for name, tensor in net.named_buffers() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if not name.endswith(".weight")}, "running statistics"

    after = {name: tensor.clone() for name, tensor in net.named_buffers()}
    with torch.inference_mode():
        whole, alone = net.eval()(images), net(images[2:3])
    assert all(torch.equal(tensor, after[name]) for name, tensor in net.named_buffers())
    torch.testing.assert_close(whole[2:3], alone, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))


@pytest.mark.parametrize(
    ("make", "count"),
    [
        # The publication says 0.99 M; 995 584 without the slopes of the PReLUs.
        (lambda: MobileFaceNet(), 1_003_136),
        # Counted in the public checkpoint of 112x96, see test_embedder_keys.py.
        (lambda: MobileFaceNet(size=(96, 112)), 999_552),
        # arcface_torch's networks: 43 590 848 and so on, less the last 512 scales, which are fixed there too.
        (lambda: IResNet(512, depth=18), 24_025_600 - 512),
        (lambda: IResNet(512, depth=34), 34_139_328 - 512),
        (lambda: IResNet(512, depth=50), 43_590_848 - 512),
        (lambda: IResNet(512, depth=100), 65_156_160 - 512),
        # facenet-pytorch 2.6.0: 23 482 624 without its classifier.
        (lambda: InceptionResNetV1(512), 23_482_624),
        (lambda: InceptionResNetV1(128), 23_482_624 - (512 - 128) * (1792 + 2)),
        # Keras' MobileNet has 4 231 976 learnt weights with a classifier of 1000 classes.
        (lambda: FaceNetMobileNet(), 4_231_976 - 1000 * 1025 + 128 * 1024 + 256),
        # torchvision: 11 689 512 and 25 557 032 with classifiers of 1000 classes.
        (lambda: ResNet(depth=18), 11_689_512 - 1000 * 513 + 128 * 513),
        (lambda: ResNet(depth=50), 25_557_032 - 1000 * 2049 + 128 * 2049),
    ],
)
def test_counts_are_the_references(make: Callable[[], nn.Module], count: int) -> None:
    assert count_parameters(on_meta(make)) == count


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("dim", [128, 512])
def test_shapes(name: str, dim: int) -> None:
    make, size = FULL[name]
    out = on_meta(lambda: make(dim))(torch.empty(2, 3, *size, device="meta"))
    assert out.shape == (2, dim)


def test_depths_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="18, 34, 50, 100, not 51"):
        IResNet(depth=51)
    with pytest.raises(ValueError, match="18, 50, not 34"):
        ResNet(depth=34)


def test_the_first_unit_of_a_stage_halves_the_map_in_its_second_convolution() -> None:
    """As in insightface's unit of version 3; its shortcut is a convolution even where the widths are equal."""
    stages = on_meta(IResNet).get_submodule("stages")
    for name, module in stages.named_modules():
        if isinstance(module, nn.Conv2d):
            first = name.split(".")[1] == "0"
            strided = first and name.split(".")[2] in ("conv2", "shortcut")
            assert module.stride == ((2, 2) if strided else (1, 1)), name
    assert stages.get_submodule("0.0.shortcut.conv").weight.shape == (64, 64, 1, 1)


def test_the_last_scale_of_iresnet_stays_one() -> None:
    net = IResNet(depth=18)
    assert "last_bn.weight" in net.state_dict()
    assert "last_bn.weight" not in dict(net.named_parameters())
    x = torch.randn(6, 128)
    reference = nn.BatchNorm1d(128, 2e-5)
    for training in (True, False):
        torch.testing.assert_close(net.last_bn.train(training)(x), reference.train(training)(x))
    assert net.last_bn.num_batches_tracked == reference.num_batches_tracked == 1


def test_convolved_prelus_compute_the_same() -> None:
    net = MobileFaceNet(size=(32, 48))
    for module in net.modules():
        if isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, -0.5, 1.5)
    images = chips(3, (48, 32))
    net.train()(images)
    made = replace_prelus(net.eval())
    assert not any(isinstance(m, nn.PReLU) for m in made.modules())
    assert sum(isinstance(m, nn.PReLU) for m in net.modules()) == 33
    with torch.inference_mode():
        torch.testing.assert_close(made(images), net(images), rtol=1e-4, atol=1e-4)


def test_folded_batch_norms_compute_the_same(small: tuple[nn.Module, tuple[int, int]]) -> None:
    net, size = small
    images = chips(3, size)
    net.train()(images)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    folded = fold_batch_norms(net)
    with torch.inference_mode():
        expected = net.eval()(images)
        torch.testing.assert_close(folded(images), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert not any(isinstance(module, ConvBN) and isinstance(module.bn, nn.BatchNorm2d) for module in folded.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_vectors_do_not_depend_on_threads(count: int) -> None:
    torch.manual_seed(2)
    net = MobileFaceNet(size=(32, 48)).eval()
    images = np.random.default_rng(0).integers(0, 256, (count, 48, 32, 3), np.uint8)
    before = torch.get_num_threads()
    found = [
        TorchEmbedder(net, Input(), (32, 48), device="cpu", threads=threads).embed(images) for threads in (1, 2, 5)
    ]
    assert found[0].shape == (count, 128)
    assert all(np.array_equal(found[0], vectors) for vectors in found[1:])
    assert torch.get_num_threads() == before


def test_layers_of_one_chip_are_not_shared_out() -> None:
    """Threads that share a small layer mostly wait for each other, and burn CPU meanwhile."""
    counts = set()

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            counts.add(torch.get_num_threads())
            return x.flatten(1)

    embedder = TorchEmbedder(Spy(), Input(), (4, 4), device="cpu", threads=3)
    counts.clear()
    torch.set_num_threads(2)
    embedder.embed(np.zeros((5, 4, 4, 3), np.uint8))
    assert counts == {1}
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("name", ["mobilefacenet", "iresnet18"])
def test_a_network_survives_its_file(name: str, tmp_path: Path) -> None:
    make, size = SMALL[name]
    first, second = make(), make()
    first.train()(chips(4, size))
    save_file(first.state_dict(), tmp_path / "net.safetensors")
    load_state(second, read_state(tmp_path / "net.safetensors"), "net.safetensors")
    with torch.inference_mode():
        expected, found = first.eval()(chips(2, size, 1)), second.eval()(chips(2, size, 1))
    assert torch.equal(expected, found)


def test_what_does_not_fit_is_named() -> None:
    net = on_meta(MobileFaceNet)
    good = net.state_dict()
    bad = {k: v for k, v in good.items() if k not in ("stem.conv.weight", "stem.bn.num_batches_tracked")}
    bad |= {"classifier.weight": torch.zeros(3), "linear.conv.weight": torch.zeros(512, 512, 1, 1)}
    with pytest.raises(WeightsError) as raised:
        load_state(net, bad, "x.pth")
    message = str(raised.value)
    assert message.startswith("x.pth does not fit MobileFaceNet: 1 missing: stem.conv.weight; ")
    assert "1 left over: classifier.weight" in message
    assert "linear.conv.weight (512, 512, 1, 1), expected (128, 512, 1, 1)" in message
    assert "num_batches_tracked" not in message


class Bomb:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, new_format: bool) -> None:
    file, mark = tmp_path / "bomb.pth", tmp_path / "ran"
    content = {"state_dict": {"stem.conv.weight": torch.zeros(2)}, "epoch": Bomb(mark)}
    torch.save(content, file, _use_new_zipfile_serialization=new_format)
    with pytest.raises(WeightsError, match="refused"):
        read_state(file)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Bomb(mark), protocol=2))
    with pytest.raises(WeightsError):
        read_state(tmp_path / "plain.pth")
    assert not mark.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.999])
def test_truncated_files_are_named(tmp_path: Path, suffix: str, kept: float) -> None:
    file = tmp_path / f"net{suffix}"
    state = {"a": torch.randn(100), "b": torch.randn(50, 3)}
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else int(kept)])
    with pytest.raises(WeightsError, match=f"net{suffix}"):
        read_state(file)


def test_dlibs_network_can_be_trained_further() -> None:
    """Random weights and three identities of two images: SGD brings those of one identity together."""
    torch.manual_seed(3)
    net = DlibResNet().train()
    identities = F.interpolate(torch.randn(3, 3, 5, 5), size=(120, 120), mode="bilinear")
    images = 0.3 * (identities.repeat_interleave(2, 0) + 0.8 * torch.randn(6, 3, 120, 120))
    optimiser = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(20):
        vectors = F.normalize(net(images))
        anchors, positives, negatives = vectors[0::2], vectors[1::2], vectors[1::2].roll(1, 0)
        further = (anchors - positives).square().sum(1) - (anchors - negatives).square().sum(1)
        loss = F.softplus(5 * further).mean()  # a triplet's loss without the corner
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())
        optimiser.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3]), losses
