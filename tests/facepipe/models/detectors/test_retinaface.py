"""RetinaFace's two trunks, public checkpoints under our names, and batch norms folded away."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from facepipe.errors import WeightsError
from facepipe.gallery import Contract
from facepipe.models.checkpoint import load_state, read_state
from facepipe.models.detectors.retinaface import Channels, RetinaFaceNet, Trunk, fold_batch_norms, normalise_pixels
from facepipe.models.detectors.retinaface_decode import to_bgr_planes
from facepipe.models.detectors.retinaface_engines import OnnxRetinaFace
from facepipe.models.detectors.retinaface_keys import rename_biubug6_keys
from facepipe.models.protocols import DetectionLimits, Faces
from facepipe.models.zoo.card_file import CardFile, InputConfig, save_model
from facepipe.models.zoo.packaged import read_retinaface_onnx
from facepipe.models.zoo.registry import find_card
from facepipe.training.detection.detector import detect
from facepipe.training.detection.overlap import compute_iou
from facepipe.types import UInt8Image

LIMITS = DetectionLimits(0.7, 0.4)
ALIGNMENT = Contract.from_models("retinaface-mnet025", "face-recognition", False).alignment
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def units(conv: str, norm: str) -> list[str]:
    """The names of a convolution and of its batch norm."""
    return [f"{conv}.weight", *(f"{norm}.{leaf}" for leaf in NORM)]


def biubug6_names(trunk: Trunk) -> list[str]:
    """The names of the public checkpoints in their order, written down from the reference's modules."""
    names: list[str] = []
    if trunk == "mobilenet025":
        names += units("body.stage1.0.0", "body.stage1.0.1")
        blocks = [(1, n) for n in range(1, 6)] + [(2, n) for n in range(6)] + [(3, n) for n in range(2)]
        for stage, n in blocks:
            names += units(f"body.stage{stage}.{n}.0", f"body.stage{stage}.{n}.1")
            names += units(f"body.stage{stage}.{n}.3", f"body.stage{stage}.{n}.4")
    else:
        names += units("body.conv1", "body.bn1")
        for layer, count in zip((1, 2, 3, 4), (3, 4, 6, 3), strict=True):
            for n in range(count):
                block = f"body.layer{layer}.{n}"
                for k in (1, 2, 3):
                    names += units(f"{block}.conv{k}", f"{block}.bn{k}")
                names += units(f"{block}.downsample.0", f"{block}.downsample.1") if n == 0 else []
    for part in ("output1", "output2", "output3", "merge1", "merge2"):
        names += units(f"fpn.{part}.0", f"fpn.{part}.1")
    for n in (1, 2, 3):
        for part in ("conv3X3", "conv5X5_1", "conv5X5_2", "conv7X7_2", "conv7x7_3"):
            names += units(f"ssh{n}.{part}.0", f"ssh{n}.{part}.1")
    for head in ("ClassHead", "BboxHead", "LandmarkHead"):
        names += [f"{head}.{n}.conv1x1.{leaf}" for n in (0, 1, 2) for leaf in ("weight", "bias")]
    return names


@pytest.mark.parametrize("trunk", ["mobilenet025", "resnet50"])
def test_the_reference_names_map_onto_ours_one_to_one(trunk: Trunk) -> None:
    with torch.device("meta"):
        wanted = RetinaFaceNet(trunk, norms=True).state_dict()
    names = biubug6_names(trunk)
    mapped = rename_biubug6_keys({name: torch.tensor(n) for n, name in enumerate(names)})
    assert len(mapped) == len(names)
    assert set(mapped) == set(wanted)
    leaves = {ours.rsplit(".", 1)[1] == names[int(n)].rsplit(".", 1)[1] for ours, n in mapped.items()}
    assert leaves == {True}
    # The finer level's merge runs last.
    assert names[int(mapped["merge.1.conv.weight"])] == "fpn.merge1.0.weight"


def test_parameters() -> None:
    with torch.device("meta"):
        small, large = RetinaFaceNet("mobilenet025", norms=True), RetinaFaceNet("resnet50", norms=True)
    assert sum(p.numel() for p in small.parameters()) == 426_608
    assert sum(p.numel() for p in large.parameters()) == 27_293_600
    # torchvision states 25,557,032 for ResNet-50, of which 2,049,000 are its classifier.
    assert sum(p.numel() for p in large.trunk.parameters()) == 25_557_032 - 2_049_000


def test_strange_names_are_left_over() -> None:
    state = rename_biubug6_keys({"body.stage9.0.0.weight": torch.zeros(1), "fc.weight": torch.zeros(1)})
    assert set(state) == {"body.stage9.0.0.weight", "fc.weight"}
    with pytest.raises(WeightsError, match="2 left over"):
        load_state(RetinaFaceNet(norms=True), state, "the file")


def random_statistics(net: RetinaFaceNet) -> RetinaFaceNet:
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                assert tensor is not None
                tensor.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias.data, module.running_mean):
                assert tensor is not None
                tensor.normal_(0, 0.2, generator=generator)
    return net.eval()


@pytest.mark.parametrize("trunk", ["mobilenet025", "resnet50"])
def test_folding_changes_nothing(trunk: Trunk) -> None:
    torch.manual_seed(0)
    net = random_statistics(RetinaFaceNet(trunk, norms=True)).double()
    folded = fold_batch_norms(net)
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.inference_mode():
        for a, b in zip(net(x), folded(x), strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-9 * a.abs().max().item())
    assert set(folded.state_dict()) == set(RetinaFaceNet(trunk).state_dict())
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())
    assert net(x)[0].shape == (1, 2 * (8 * 12 + 4 * 6 + 2 * 3), 4)


def test_training_gives_logits_and_inference_their_softmax() -> None:
    torch.manual_seed(0)
    net = random_statistics(RetinaFaceNet(norms=True))
    x = torch.randn(2, 3, 64, 64)
    probability = fold_batch_norms(net)(x)[1]
    net.training = True  # of the network alone: its batch norms stay in inference
    logits = net(x)[1]
    assert logits.shape == (2, 168, 2)
    assert torch.allclose(logits.exp()[..., 1] / logits.exp().sum(-1), probability, atol=1e-5)


def test_the_mean_goes_off_in_the_order_the_channels_enter() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (2, 8, 9, 3), np.uint8)
    mean = np.array([104, 117, 123], np.float32)
    orders: list[tuple[Channels, UInt8Image]] = [("rgb", pixels), ("bgr", pixels[..., ::-1])]
    for channels, ordered in orders:
        found = normalise_pixels(torch.from_numpy(pixels), channels).numpy()
        assert np.array_equal(found, (ordered.astype(np.float32) - mean).transpose(0, 3, 1, 2))
    assert np.array_equal(normalise_pixels(torch.from_numpy(pixels), "bgr").numpy(), to_bgr_planes(pixels))


def shrunk(path: Path, longest: int = 640) -> UInt8Image:
    image = np.asarray(cv2.imread(str(path), cv2.IMREAD_COLOR_RGB))
    scale = min(1.0, longest / max(image.shape[:2]))
    h, w = (round(side * scale) for side in image.shape[:2])
    image = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.copyMakeBorder(image, 0, -h % 32, 0, -w % 32, cv2.BORDER_CONSTANT), np.uint8)


@pytest.fixture(scope="module")
def rgb_net(shared: Path) -> RetinaFaceNet:
    file = shared / "weights" / "retinaface-mobilenet025-rgb.pth"
    net = RetinaFaceNet("mobilenet025", norms=True)
    load_state(net, rename_biubug6_keys(read_state(file)), str(file))
    return fold_batch_norms(net)


def found_again(truth: Faces, found: Faces) -> tuple[list[float], list[float]]:
    """Of each true face, the best overlap, and where it is over one half the landmarks' mean distance in sides."""
    overlaps = compute_iou(torch.from_numpy(truth.boxes), torch.from_numpy(found.boxes)).numpy()
    best, distances = [], []
    for n, row in enumerate(overlaps):
        best.append(float(row.max(initial=0.0)))
        if best[-1] > 0.5:
            apart = np.linalg.norm(truth.landmarks[n] - found.landmarks[row.argmax()], axis=1).mean()
            distances.append(float(apart / np.sqrt(np.prod(truth.boxes[n, 2:] - truth.boxes[n, :2]))))
    return best, distances


def compared(net: RetinaFaceNet, images: list[UInt8Image], channels: Channels) -> tuple[list[float], list[float]]:
    default = OnnxRetinaFace(read_retinaface_onnx(), LIMITS)
    overlaps: list[float] = []
    distances: list[float] = []
    for image in images:
        best, apart = found_again(default.detect(image[None])[0], detect(net, image, channels, LIMITS))
        overlaps += best
        distances += apart
    return overlaps, distances


def test_the_rgb_checkpoint_finds_the_default_models_faces(rgb_net: RetinaFaceNet, photos: Path) -> None:
    images = [shrunk(photos / f"img{n}.jpg", 320) for n in (1, 2, 4, 5, 6, 7, 10, 20)]
    overlaps, distances = compared(rgb_net, images, "rgb")
    print("\nface for face, RGB: IoU", np.round(overlaps, 2), "landmarks, sides:", np.round(distances, 3))
    assert len(overlaps) >= 8
    assert np.median(overlaps) > 0.8
    assert np.mean(np.array(overlaps) > 0.5) >= 0.9
    assert np.median(distances) < 0.05


def test_a_trained_state_loads_as_a_registered_detector(
    tmp_path: Path, rgb_net: RetinaFaceNet, shared: Path, photos: Path
) -> None:
    net = RetinaFaceNet("mobilenet025", norms=True)
    load_state(net, rename_biubug6_keys(read_state(shared / "weights" / "retinaface-mobilenet025-rgb.pth")), "the file")
    file = CardFile("mine", "", "detector", "retinaface-mnet025", input=InputConfig(channels="rgb"))
    toml = save_model(tmp_path / "mine", net.state_dict(), file)
    assert Contract.from_models(str(toml), "face-recognition", False).alignment == ALIGNMENT
    image = shrunk(photos / "img1.jpg", 320)
    (found,) = find_card(str(toml), "detector").load("cpu", 1, LIMITS).detect(image[None])
    expected = detect(rgb_net, image, "rgb", LIMITS)
    assert len(expected.scores) > 0
    assert np.allclose(found.boxes, expected.boxes, atol=1e-3)
    assert np.allclose(found.landmarks, expected.landmarks, atol=1e-3)
