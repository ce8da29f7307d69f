"""The stages as a GPU runs them against those of a CPU: the same faces within stated tolerances. Run on CPU tensors."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from facepipe.arrow import to_vectors
from facepipe.models.checkpoint import load_state, read_state
from facepipe.models.detectors.retinaface import RetinaFaceNet
from facepipe.models.detectors.retinaface_engines import TorchRetinaFace
from facepipe.models.detectors.retinaface_keys import rename_biubug6_keys
from facepipe.models.embedders.engines import TorchEmbedder
from facepipe.models.protocols import DetectionLimits
from facepipe.models.zoo.architectures import ARCHITECTURES
from facepipe.models.zoo.packaged import load_dlib_net, load_retinaface_net
from facepipe.schema import WORK_ITEM
from facepipe.stages import Align, Chain, Decode, Detect, Embed, Read

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

# What a GPU may move a face by against a CPU: of the unit vector, and of landmarks as shares of the face's longer side.
# Two people are 0.41 apart and more; decoding at another scale moves a face by 0.06.
TYPICAL = {"float32": (2e-4, 1e-4), "float16": (0.005, 0.005), "bfloat16": (0.02, 0.02)}
MOST = {"float32": (0.03, 0.01), "float16": (0.1, 0.05), "bfloat16": (0.2, 0.1)}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(detect: Detect, embed: Embed, table: pa.Table, batch: int = 64, parallel: int = 1) -> pa.Table:
    chain = Chain((detect, Align(thumbs=False, embedder=embed.model), embed), batch, parallel=parallel)
    chain.setup()
    return chain(table)


def on_device(
    precision: str = "float32",
    *,
    detect: Detect | None = None,
    embed: Embed | None = None,
    max_batch: int = 8,
    change: Callable[[nn.Module], None] = lambda net: None,
) -> tuple[Detect, Embed]:
    """Make the two stages with the engines and batches of a GPU, on a CPU."""
    detect = replace(detect or Detect(), device="cpu")
    embed = replace(embed or Embed(), device="cpu")
    net = load_retinaface_net()
    change(net)
    limits = DetectionLimits(detect.lowest_score, detect.max_iou)
    detector = TorchRetinaFace(net, limits, "cpu", batches_on_cpu=True)
    detector.configure(precision, max_batch)
    embedder_net = load_dlib_net()
    change(embedder_net)
    model_input = ARCHITECTURES["dlib-resnet"].input
    embedder = TorchEmbedder(embedder_net, model_input, (150, 150), device="cpu", batches_on_cpu=True)
    embedder.configure(precision, max_batch)
    # A cached_property looks here before it loads anything.
    detect.__dict__["detector"] = detector
    embed.__dict__["embedder"] = embedder
    return detect, embed


def read_and_decode(folder: Path, names: list[str] | None = None) -> pa.Table:
    paths = sorted(folder.glob("*.jpg")) if names is None else [folder / f"{name}.jpg" for name in names]
    rows = [{"uri": path.name, "path": str(path).encode()} for path in paths]
    return Decode()(Read()(pa.Table.from_pylist(rows, schema=WORK_ITEM)))


@pytest.fixture(scope="module")
def decoded(portraits: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """Four shapes, five faces, an image without a face, and one that is broken."""
    (portraits / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    return read_and_decode(portraits)


@pytest.fixture(scope="module")
def expected(decoded: pa.Table) -> pa.Table:
    return run(Detect(device="cpu"), Embed(device="cpu"), decoded)


def measure_moves(found: pa.Table, expected: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Measure by how much faces moved: their vectors, and their landmarks as shares of their sides. Rows are equal."""
    for name in ("uri", "status", "error", "face_index", "face_id", "width", "height", "turn"):
        assert found[name].equals(expected[name]), name
    vectors, others = (to_vectors(table["embedding"].drop_null(), 128) for table in (found, expected))
    points, other_points = (np.array(table["landmarks"].drop_null().to_pylist()) for table in (found, expected))
    boxes = np.array(expected["box"].drop_null().to_pylist())
    sides = (boxes[:, 2:] - boxes[:, :2]).max(1)
    return np.linalg.norm(vectors - others, axis=1), np.abs(points - other_points).max(1) / sides


def check_moves(found: pa.Table, expected: pa.Table, precision: str) -> None:
    vectors, points = measure_moves(found, expected)
    print(
        f"\n{precision}: {len(vectors)} faces; vectors move by {np.median(vectors):.2g}, at most {vectors.max():.2g}; "
        f"landmarks by {np.median(points):.2g}, at most {points.max():.2g} of the face"
    )
    assert np.median(vectors) <= TYPICAL[precision][0]
    assert np.median(points) <= TYPICAL[precision][1]
    assert vectors.max() <= MOST[precision][0]
    assert points.max() <= MOST[precision][1]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_device_finds_the_faces_of_a_cpu(precision: str, decoded: pa.Table, expected: pa.Table) -> None:
    found = run(*on_device(precision), decoded)
    check_moves(found, expected, precision)
    assert set(found["status"].to_pylist()) == {"ok", "no_face", "decode_error"}
    assert found.num_rows - found["face_id"].null_count == 5


@pytest.mark.shared
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_a_device_finds_the_faces_of_32_photos(precision: str, shared: Path) -> None:
    table = read_and_decode(shared / "data" / "photos-dev")
    assert table.num_rows == 32
    check_moves(run(*on_device(precision), table), run(Detect(device="cpu"), Embed(device="cpu"), table), precision)


@pytest.mark.parametrize(
    "changed",
    [
        {"detect": Detect(quick_look=0)},
        {"detect": Detect(size=320, border_below=200, min_score=0.5, max_iou=0.3)},
        {"detect": Detect(size=1024, second_look=False, border_below=0, min_face=60)},
        {"embed": Embed(flip=False)},
    ],
    ids=["no-quick-look", "small", "large", "no-flip"],
)
def test_every_option_of_the_stages_holds(changed: dict[str, object], decoded: pa.Table) -> None:
    detect, embed = on_device(**changed)  # type: ignore[arg-type]
    plain = {"detect": Detect(), "embed": Embed()} | changed
    other = run(replace(plain["detect"], device="cpu"), replace(plain["embed"], device="cpu"), decoded)  # type: ignore[type-var]
    check_moves(run(detect, embed, decoded), other, "float32")


def test_neither_batch_nor_threads_nor_order_matter(decoded: pa.Table) -> None:
    once = run(*on_device(), decoded)
    for max_batch, batch, parallel in ((1, 64, 1), (4, 2, 3)):
        vectors, points = measure_moves(run(*on_device(max_batch=max_batch), decoded, batch, parallel), once)
        assert vectors.max() < 2e-4
        assert points.max() < 1e-4
    order = np.random.default_rng(0).permutation(decoded.num_rows)
    mixed = run(*on_device(), decoded.take(pa.array(order)))
    back = mixed.sort_by([("uri", "ascending"), ("face_index", "ascending")])
    vectors, _ = measure_moves(back, once.sort_by([("uri", "ascending"), ("face_index", "ascending")]))
    assert vectors.max() < 2e-4


@pytest.mark.shared
def test_a_detector_that_takes_rgb(photos: Path, shared: Path) -> None:
    weights = shared / "weights" / "retinaface-mobilenet025-rgb.pth"
    net = RetinaFaceNet("mobilenet025", norms=True)
    load_state(net, rename_biubug6_keys(read_state(weights)), str(weights))
    limits = DetectionLimits(0.7, 0.4)
    image = next(image for image in read_pixels(photos, "img5"))
    (alone,) = TorchRetinaFace(net.eval(), limits, "cpu", "rgb").detect([image])
    (batched,) = TorchRetinaFace(net.eval(), limits, "cpu", "rgb", batches_on_cpu=True).detect([image])
    assert len(alone.scores) == len(batched.scores) > 0
    assert np.abs(alone.landmarks - batched.landmarks).max() < 0.5


def read_pixels(folder: Path, name: str) -> Iterator[np.ndarray]:
    stage = Detect(device="cpu")
    stage.__dict__["detector"] = type("Stride", (), {"stride": 32})
    from facepipe.arrow import view_images

    for image in view_images(read_and_decode(folder, [name])):
        assert image is not None
        yield stage.letterbox(image, 640).pixels


def round_to_tf32(tensor: torch.Tensor) -> torch.Tensor:
    """Round to 10 bits, as tensor cores take the factors of a product."""
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def emulate_tf32(net: nn.Module) -> None:
    """Give each convolution what cuDNN's default would."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            with torch.no_grad():
                module.weight.copy_(round_to_tf32(module.weight.detach()))
            module.register_forward_pre_hook(lambda _, given: (round_to_tf32(given[0]),))


def test_the_tolerances_of_float32_notice_tf32(decoded: pa.Table, expected: pa.Table) -> None:
    vectors, _ = measure_moves(run(*on_device(change=emulate_tf32), decoded), expected)
    print(f"\nTF32 moves vectors by {np.median(vectors):.2g}, at most {vectors.max():.2g}")
    assert np.median(vectors) > 2 * TYPICAL["float32"][0]


@cuda
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_a_gpu_finds_the_same_faces(precision: str, decoded: pa.Table, expected: pa.Table) -> None:
    detect = Detect(device="cuda", precision=precision)  # type: ignore[arg-type]
    embed = Embed(device="cuda", precision=precision)  # type: ignore[arg-type]
    found = run(detect, embed, decoded)
    check_moves(found, expected, precision)
    again = run(replace(detect, batch=2), replace(embed, batch=4), decoded, 2, 3)
    vectors, _ = measure_moves(again, found)
    assert vectors.max() < {"float32": 2e-4, "float16": 0.02, "bfloat16": 0.05}[precision]
