"""FacesOnDevice against Detect, Align and Embed on real photos: the same faces, whatever the batch, order or options."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch

from facepipe.arrow import to_vectors
from facepipe.models.checkpoint import load_state, read_state
from facepipe.models.detectors.retinaface import RetinaFaceNet
from facepipe.models.detectors.retinaface_keys import rename_biubug6_keys
from facepipe.models.runtime.cuda_graphs import CudaGraphCache
from facepipe.models.zoo.architectures import ARCHITECTURES
from facepipe.models.zoo.card_file import CardFile, InputConfig, save_model
from facepipe.models.zoo.networks import can_run_resident
from facepipe.schema import FACES, WORK_ITEM, conform
from facepipe.stages import Align, Chain, Decode, Detect, Embed, Read, check_chain
from facepipe.stages.resident.stage import FacesOnDevice

NAMES = ("couple", "img54", "img27", "img5", "img2", "img4", "img31", "img67", "img1", "img11_reflection")
SMALL = FacesOnDevice(device="cpu", frames=2, chips=4)
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def work(paths: list[Path]) -> pa.Table:
    return pa.Table.from_pylist([{"uri": p.name, "path": str(p).encode()} for p in paths], schema=WORK_ITEM)


def run(stages: tuple[object, ...], table: pa.Table, batch: int = 64, ahead: int = 0) -> pa.Table:
    chain = Chain(stages, batch, ahead)
    chain.setup()
    return chain(table)


@pytest.fixture(scope="module")
def items(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """Photos; two small ones that get a mirrored border, a close-up, a PNG above twice the size, and what has no pixels."""
    folder = tmp_path_factory.mktemp("odd")
    image = cv2.imread(str(photos / "img5.jpg"))
    cv2.imwrite(str(folder / "small.png"), cv2.resize(image, (250, 250)))
    cv2.imwrite(str(folder / "tiny.png"), cv2.resize(image, (120, 90)))
    cv2.imwrite(str(folder / "large.png"), cv2.resize(cv2.imread(str(photos / "img4.jpg")), None, fx=1.6, fy=1.6))
    cv2.imwrite(str(folder / "grey.png"), np.full((700, 900, 3), 127, np.uint8))
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    odd = [folder / name for name in ("small.png", "tiny.png", "large.png", "grey.png", "broken.jpg", "absent.jpg")]
    return work([*odd[:3], *(photos / f"{name}.jpg" for name in NAMES), *odd[3:]])


@pytest.fixture(scope="module")
def decoded(items: pa.Table) -> pa.Table:
    return run((Read(), Decode()), items)


def by_stages(table: pa.Table, stage: FacesOnDevice) -> pa.Table:
    """What the three stages make that it stands for."""
    return run((stage.detect, replace(stage.align, embedder=stage.embed.model), stage.embed), table)


def same(one: pa.Table, other: pa.Table, pixels: float = 0.01, distance: float = 0.002) -> None:
    """The same rows and statuses; boxes and landmarks within `pixels`, embeddings within `distance`."""
    assert one.schema.equals(other.schema)
    for name in ("uri", "status", "error", "face_index", "width", "height"):
        assert one[name].equals(other[name]), name
    for name, most in (("box", pixels), ("landmarks", pixels), ("det_score", 1e-4), ("yaw", 0.1), ("roll", 0.1)):
        a, b = (np.array([v for v in t[name].to_pylist() if v is not None], np.float64) for t in (one, other))
        assert np.abs(a - b).max(initial=0) <= most, name
    a, b = (to_vectors(t["embedding"].drop_null(), 128) for t in (one, other))
    assert np.linalg.norm(a - b, axis=1).max(initial=0) <= distance
    a, b = (np.array(t["sharpness"].drop_null()) for t in (one, other))
    assert np.allclose(a, b, rtol=0.01)


def test_it_keeps_its_word(decoded: pa.Table) -> None:
    check_chain([Read(), Decode(), SMALL], WORK_ITEM.names)
    SMALL.setup()
    found = SMALL(decoded)
    assert set(SMALL.adds) <= set(found.column_names)
    assert not set(SMALL.drops) & set(found.column_names)
    assert conform(found).schema == FACES
    with pytest.raises(AttributeError):
        SMALL.frames = 3  # type: ignore[misc]


def test_its_faces_are_those_of_the_stages(decoded: pa.Table) -> None:
    found, expected = run((SMALL,), decoded), by_stages(decoded, SMALL)
    same(found, expected)
    assert set(found["status"].to_pylist()) == {"ok", "no_face", "decode_error", "read_error"}
    assert found.num_rows - found["face_id"].null_count >= 15
    assert found["face_id"].equals(expected["face_id"])


@pytest.mark.parametrize(
    "changed",
    [
        {"detect": Detect(quick_look=0)},
        {"detect": Detect(size=320, border_below=200, min_score=0.5, max_iou=0.3)},
        {"detect": Detect(size=1024, second_look=False, border_below=0, min_face=60)},
        {"align": Align(thumbs=False), "embed": Embed(flip=False)},
        {"align": Align(thumb_side=64, thumb_quality=30), "threads": 3},
        {"embed": Embed("face-recognition", flip=False)},
    ],
    ids=["no-quick-look", "small", "large", "no-flip", "thumbs", "dlib-chips"],
)
def test_every_option_of_the_stages_holds(changed: dict[str, object], decoded: pa.Table) -> None:
    stage = replace(SMALL, **changed)  # type: ignore[arg-type]
    found, expected = run((stage,), decoded), by_stages(decoded, stage)
    same(found, expected)
    a, b = (t["thumb"].to_pylist() for t in (found, expected))
    assert [thumb is None for thumb in a] == [thumb is None for thumb in b]


@pytest.mark.parametrize("architecture", ["mobilefacenet", "facenet-mobilenet"])
def test_models_from_files_run_on_the_device(
    architecture: str, decoded: pa.Table, shared: Path, tmp_path: Path
) -> None:
    """A detector that takes RGB; embedders with other templates, or turned by the eyes, which the host cuts."""
    detector = RetinaFaceNet("mobilenet025", norms=True)
    weights = shared / "weights" / "retinaface-mobilenet025-rgb.pth"
    load_state(detector, rename_biubug6_keys(read_state(weights)), str(weights))
    file = CardFile("mine", "", "detector", "retinaface-mnet025", input=InputConfig(channels="rgb"))
    found = str(save_model(tmp_path / "mine", detector.state_dict(), file))
    made = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    net = made.build(128, made.layout.size).eval()
    embedder = str(
        save_model(tmp_path / "net", net.state_dict(), CardFile("net", "", "embedder", architecture, dim=128))
    )
    assert can_run_resident(found, embedder)
    stage = replace(SMALL, detect=Detect(found, device="cpu"), align=Align(), embed=Embed(embedder, device="cpu"))
    some = decoded.slice(0, 8)
    same(run((stage,), some), by_stages(some, stage))


def test_which_models_run_on_the_device() -> None:
    assert can_run_resident("retinaface-mnet025", "dlib-resnet")
    assert not can_run_resident("mtcnn", "dlib-resnet")
    assert not can_run_resident("retinaface-mnet025", "fake-embedder")


def test_crowds_and_clutter_are_finished_on_the_host(decoded: pa.Table) -> None:
    """More faces, or candidates, than the device's fixed sizes hold: none is lost."""
    same(run((replace(SMALL, faces=1, candidates=8),), decoded), by_stages(decoded, SMALL))


def test_neither_batch_nor_order_matters(items: pa.Table, decoded: pa.Table) -> None:
    expected = run((SMALL,), decoded)
    for stage, batch, ahead in ((replace(SMALL, frames=4, chips=8), 3, 2), (SMALL, 5, 0), (SMALL, 1, 2)):
        found = run((Read(), Decode(), stage), items, batch, ahead)
        same(found, expected, distance=1e-4)
    order = np.random.default_rng(0).permutation(items.num_rows)
    mixed = run((SMALL,), decoded.take(pa.array(order)))
    uris = expected["uri"].to_pylist()
    rows = [n for row in order.tolist() for n, uri in enumerate(uris) if uri == items["uri"][row].as_py()]
    same(mixed, expected.take(pa.array(rows)), distance=1e-4)


def test_a_device_that_is_short_of_memory_takes_less_at_a_time(
    decoded: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of more than one fail: all are halved, none is lost."""
    expected = run((SMALL,), decoded)
    original, refused = CudaGraphCache.__call__, []

    def short(self: CudaGraphCache, things: torch.Tensor, size: int) -> torch.Tensor:
        if size > 1:
            refused.append(size)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, things, size)

    monkeypatch.setattr(CudaGraphCache, "__call__", short)
    same(run((replace(SMALL, frames=4, chips=8),), decoded), expected, distance=1e-4)
    assert {8, 4, 2} <= set(refused)


def test_tables_come_back_in_order_and_one_by_one(decoded: pa.Table) -> None:
    taken: list[int] = []

    def tables() -> Iterator[pa.Table]:
        for n in range(6):
            taken.append(n)
            yield decoded.slice(n, 1)

    SMALL.setup()
    found = []
    for table in SMALL.stream(tables()):
        found.append(table["uri"][0].as_py())
        assert len(taken) - len(found) <= 3, "so many tables are in hand and no more"
    assert found == decoded["uri"].to_pylist()[:6]
    assert list(SMALL.stream([])) == []


@pytest.mark.parametrize(("precision", "median", "most"), [("float16", 0.005, 0.1), ("bfloat16", 0.02, 0.15)])
def test_half_precision_moves_embeddings_little(precision: str, median: float, most: float, decoded: pa.Table) -> None:
    """Two people are 0.41 apart and more; decoding at another scale moves a face by 0.06 (test_stages)."""
    some = decoded.slice(3, 6)
    found, expected = run((replace(SMALL, precision=precision),), some), by_stages(some, SMALL)
    assert found["uri"].equals(expected["uri"])
    a, b = (to_vectors(t["embedding"].drop_null(), 128) for t in (found, expected))
    apart = np.linalg.norm(a - b, axis=1)
    print(f"\n{precision}: embeddings move by {np.median(apart):.4f}, at most {apart.max():.4f}")
    assert np.median(apart) < median
    assert apart.max() < most


@cuda
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_a_gpu_finds_the_same_faces(precision: str, decoded: pa.Table) -> None:
    stage = FacesOnDevice(device="cuda", precision=precision, threads=4)
    found, expected = run((stage,), decoded), by_stages(decoded, SMALL)
    assert found["uri"].equals(expected["uri"])
    a, b = (to_vectors(t["embedding"].drop_null(), 128) for t in (found, expected))
    assert np.median(np.linalg.norm(a - b, axis=1)) < {"float32": 0.005, "float16": 0.01, "bfloat16": 0.03}[precision]
    again = run((replace(stage, frames=8, chips=16),), decoded)
    assert again["uri"].equals(found["uri"])
