"""MTCNN: its weights read without trust, its resampling, and the cascade against the public port."""

import io
import os
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from facepipe.errors import WeightsError
from facepipe.models.checkpoint import load_state
from facepipe.models.detectors import mtcnn, mtcnn_weights
from facepipe.models.detectors.mtcnn import Mtcnn
from facepipe.models.detectors.mtcnn_nets import MtcnnNets, rename_facenet_pytorch_keys
from facepipe.models.detectors.mtcnn_weights import (
    SHA256,
    convert_keras_arrays,
    decompress_lz4_frame,
    load_packaged_nets,
    read_arrays,
)
from facepipe.models.detectors.retinaface_engines import OnnxRetinaFace
from facepipe.models.protocols import DetectionLimits
from facepipe.models.weights import find_package_file
from facepipe.models.zoo.packaged import read_retinaface_onnx

# What facenet-pytorch 2.6.0 finds with its defaults in photos shrunk to 640 by area: box and landmarks.
FOUND = {
    "couple.jpg": [
        ([398.0, 77.4, 559.3, 308.2], [463.1, 173.3, 534.9, 174.3, 509.3, 215.6, 467.6, 255.6, 527.2, 255.8]),
        ([98.7, 139.2, 272.5, 368.1], [161.0, 241.6, 237.7, 229.2, 218.8, 284.3, 180.9, 323.6, 244.0, 312.1]),
    ],
    "img27.jpg": [([288.6, 37.1, 379.1, 162.4], [309.6, 90.8, 352.2, 85.6, 333.3, 114.2, 319.1, 133.9, 353.5, 129.6])],
}


@pytest.fixture(scope="module")
def nets() -> MtcnnNets:
    try:
        return load_packaged_nets()
    except WeightsError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def detector(nets: MtcnnNets) -> Mtcnn:
    return Mtcnn(nets, DetectionLimits(0.7, 1.0))


def photo(folder: Path, name: str) -> np.ndarray:
    image = cv2.cvtColor(cv2.imread(str(folder / name)), cv2.COLOR_BGR2RGB)
    scale = 640 / max(image.shape[:2])
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else image


def random_nets(seed: int = 0) -> MtcnnNets:
    torch.manual_seed(seed)
    return MtcnnNets().eval().requires_grad_(False)


@pytest.mark.parametrize("name", sorted(FOUND))
def test_finds_what_the_public_port_finds(detector: Mtcnn, photos: Path, name: str) -> None:
    faces = detector.detect(photo(photos, name)[None])[0]
    assert len(faces.scores) == len(FOUND[name])
    for box, points in FOUND[name]:
        n = np.abs(faces.boxes - (np.array(box) - 1)).max(1).argmin()  # the port counts from 1
        assert np.abs(faces.boxes[n] - (np.array(box) - 1)).max() < 0.5
        assert np.abs(faces.landmarks[n].reshape(-1) - points).max() < 0.5


@pytest.mark.parametrize("names", [("one.jpg",), pytest.param(("couple.jpg", "img27.jpg"), marks=pytest.mark.shared)])
def test_agrees_with_retinaface(detector: Mtcnn, names: tuple[str, ...], request: pytest.FixtureRequest) -> None:
    other = OnnxRetinaFace(read_retinaface_onnx(), DetectionLimits(0.9, 0.4))
    folder = request.getfixturevalue("portraits" if names == ("one.jpg",) else "photos")
    for name in names:
        image = photo(folder, name)
        h, w = (side // 32 * 32 for side in image.shape[:2])
        image = np.ascontiguousarray(image[:h, :w])
        ours, theirs = detector.detect(image[None])[0], other.detect(image[None])[0]
        assert len(ours.scores) == len(theirs.scores)
        for points in theirs.landmarks:
            errors = np.abs(ours.landmarks - points).max((1, 2)) / np.linalg.norm(points[1] - points[0])
            assert errors.min() < 0.25


def test_faces_come_by_score_and_each_has_its_left_eye_first(detector: Mtcnn, photos: Path) -> None:
    faces = detector.detect(photo(photos, "couple.jpg")[None])[0]
    assert (np.diff(faces.scores) <= 0).all()
    x, y = faces.landmarks[..., 0], faces.landmarks[..., 1]
    assert (x[:, 0] < x[:, 1]).all()
    assert (x[:, 3] < x[:, 4]).all()
    assert (y[:, :2].max(1) < y[:, 2]).all()
    assert all(part.dtype == np.float32 for part in faces[:3])


def test_limits(nets: MtcnnNets, photos: Path) -> None:
    image = photo(photos, "couple.jpg")
    scores = Mtcnn(nets, DetectionLimits(0.7, 1.0)).detect(image[None])[0].scores
    between = float(scores[0] + scores[1]) / 2
    assert len(Mtcnn(nets, DetectionLimits(between, 1.0)).detect(image[None])[0].scores) == 1


def test_an_image_does_not_depend_on_its_batch(detector: Mtcnn, photos: Path) -> None:
    one = cv2.resize(photo(photos, "couple.jpg"), (160, 120))
    two = cv2.resize(photo(photos, "img1.jpg"), (160, 120))
    for alone, together in zip((one, two), detector.detect(np.stack([one, two])), strict=True):
        for a, b in zip(detector.detect(alone[None])[0], together, strict=True):
            assert np.array_equal(a, b)


@pytest.mark.parametrize("shape", [(1, 1), (11, 11), (12, 12), (19, 500), (4, 3000), (3000, 4), (20, 20), (37, 301)])
@pytest.mark.parametrize("fill", ["black", "white", "noise"])
def test_hostile_images(detector: Mtcnn, shape: tuple[int, int], fill: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1, *shape, 3), np.uint8)
    image = {"black": noise * 0, "white": noise * 0 + 255, "noise": noise}[fill]
    faces = detector.detect(image)[0]
    assert faces.boxes.shape == (0, 4)
    assert faces.landmarks.shape == (0, 5, 2)
    assert faces.scores.shape == (0,)


def test_windows_outside_the_image_are_left_out() -> None:
    boxes, windows = mtcnn._clip_to_image(
        np.array([[-9.0, 3, -2, 9], [-5, -5, 4, 4], [90, 1, 120, 9], [5, 5, 5, 5]]), (50, 80)
    )
    assert boxes.tolist() == [[-5, -5, 4, 4], [5, 5, 5, 5]]
    assert windows.tolist() == [[0, 0, 4, 4], [4, 4, 5, 5]]


@pytest.mark.parametrize("size", [(7, 9), (24, 24), (50, 33), (61, 83)])
def test_levels_are_area_means(size: tuple[int, int]) -> None:
    image = np.random.default_rng(1).integers(0, 256, (61, 83, 3), np.uint8)
    whole = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    sums = mtcnn._integrate(image)
    level = mtcnn._average_level(sums, mtcnn._divide(0, 61, size[0]), mtcnn._divide(0, 83, size[1]))
    wanted = (F.adaptive_avg_pool2d(whole, size) - 127.5) / 128
    assert np.abs(level - wanted.numpy()).max() < 1e-6


def test_crops_are_area_means() -> None:
    image = np.random.default_rng(2).integers(0, 256, (61, 83, 3), np.uint8)
    whole = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    windows = np.array([[0, 0, 83, 61], [10, 20, 11, 21], [3, 4, 33, 60], [70, 0, 83, 5]])
    crops = mtcnn._average_windows(mtcnn._integrate(image), windows, 24)
    for crop, (x1, y1, x2, y2) in zip(crops, windows, strict=True):
        wanted = (F.adaptive_avg_pool2d(whole[:, :, y1:y2, x1:x2], 24)[0] - 127.5) / 128
        assert np.abs(crop - wanted.numpy()).max() < 1e-6


def test_sums_of_large_images_do_not_overflow() -> None:
    image = np.full((2910, 2910, 3), 255, np.uint8)
    sums = mtcnn._integrate(image)
    assert sums[:, -1, -1].tolist() == [255 * 2910**2] * 3


@pytest.mark.parametrize("shape", [(12, 300), (13, 40), (120, 150), (151, 101)])
def test_stripes_hold_every_window_once(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    pnet = random_nets().pnet
    x = torch.randn(1, 3, *shape)
    whole, _ = pnet(x)
    monkeypatch.setattr(mtcnn, "_PIXELS_PER_STRIPE", 2000)
    parts = [pnet(x[:, :, start:stop])[0] for start, stop in mtcnn.split_into_stripes(*shape)]
    assert len(parts) > 1 or shape[0] < 50
    together = torch.cat(parts, 1)
    assert together.shape == whole.shape
    assert (together - whole).abs().max() < 1e-5


def test_pyramid() -> None:
    found = mtcnn.list_scales(480, 640)
    assert found[0] == pytest.approx(0.6)
    assert found[1] / found[0] == pytest.approx(0.709)
    assert 480 * found[-1] >= 12 > 480 * found[-1] * 0.709
    assert mtcnn.list_scales(19, 4000) == []


def test_parameters() -> None:
    counts = {name: sum(p.numel() for p in net.parameters()) for name, net in MtcnnNets().named_children()}
    assert counts == {"pnet": 6632, "rnet": 100_178, "onet": 389_040}


@pytest.mark.parametrize("whole", [True, False])
def test_names_of_the_public_port(whole: bool) -> None:
    nets = random_nets()
    renamed = {
        "pnet": {"head.face": "conv4_1", "head.box": "conv4_2"},
        "rnet": {"head.face": "dense5_1", "head.box": "dense5_2"},
        "onet": {"head.face": "dense6_1", "head.box": "dense6_2", "head.landmarks": "dense6_3"},
    }
    public: dict[str, dict[str, torch.Tensor]] = {}
    for owner, names in renamed.items():
        state = getattr(nets, owner).state_dict()
        public[owner] = {
            f"{names.get(layer, layer)}.{leaf}": state[f"{layer}.{leaf}"]
            for layer, leaf in (key.rsplit(".", 1) for key in state)
        }
    if whole:
        found = rename_facenet_pytorch_keys({f"{o}.{k}": t for o, state in public.items() for k, t in state.items()})
    else:
        found = {k: t for owner, state in public.items() for k, t in rename_facenet_pytorch_keys(state, owner).items()}
    wanted = nets.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def keras(net: torch.nn.Module, order: list[str]) -> list[np.ndarray]:
    """What Keras would list of a network."""
    arrays = []
    for layer in order:
        weight = net.get_parameter(f"{layer}.weight").detach().numpy()
        if "prelu" in layer:
            arrays.append(weight[None, None])
            continue
        arrays.append(np.ascontiguousarray(np.moveaxis(weight, (0, 1), (-1, -2))))
        arrays.append(net.get_parameter(f"{layer}.bias").detach().numpy())
    return arrays


def test_keras_layouts() -> None:
    nets, empty = random_nets(), random_nets(1)
    order = ["conv1", "prelu1", "conv2", "prelu2", "conv3", "prelu3", "dense4", "prelu4", "head.box", "head.face"]
    state = empty.state_dict() | convert_keras_arrays("rnet", keras(nets.rnet, order))
    load_state(empty, state, "a test")
    x = torch.randn(3, 3, 24, 24)
    assert all(torch.equal(a, b) for a, b in zip(nets.rnet(x), empty.rnet(x), strict=True))
    with pytest.raises(WeightsError, match="do not make an MTCNN rnet"):
        convert_keras_arrays("rnet", keras(nets.rnet, order[:-1]))


def test_altered_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        data = bytearray(find_package_file("mtcnn", "assets/weights/pnet.lz4", "mtcnn").read_bytes())
    except WeightsError as error:
        pytest.skip(str(error))
    data[9000] ^= 1
    (tmp_path / "pnet.lz4").write_bytes(data)
    monkeypatch.setattr(mtcnn_weights, "find_package_file", lambda *_: tmp_path / "pnet.lz4")
    with pytest.raises(WeightsError, match="SHA-256"):
        load_packaged_nets()


class Evil:
    """A pickle that would run a command."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    for content in ([Evil(tmp_path / "ran")], Evil(tmp_path / "ran")):
        for protocol in (0, 2, 4, 5):
            with pytest.raises(WeightsError, match="refused"):
                read_arrays(pickle.dumps(content, protocol))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "code", [b"c__builtin__\neval\n.", b"cnumpy\nload\n.", b"cjoblib\nload\n.", b"\x82\x01.", b"", b"]b."]
)
def test_pickles_with_other_names_are_refused(code: bytes) -> None:
    with pytest.raises(WeightsError, match="refused"):
        read_arrays(code)


def stream(kind: str = "f4", padding: int = 3, order: str = "C") -> bytes:
    """A list of one array as joblib writes it, by hand."""
    out = io.BytesIO()
    out.write(b"\x80\x04](cjoblib.numpy_pickle\nNumpyArrayWrapper\n)\x81}(")
    out.write(b"X\x05\0\0\0shape(K\x02K\x03tX\x05\0\0\0orderX\x01\0\0\0" + order.encode())
    out.write(b"X\x05\0\0\0dtypecnumpy\ndtype\n(X\x02\0\0\0" + kind.encode() + b"\x89\x88tRub")
    out.write(bytes([padding]) + b"\xff" * padding + np.arange(6, dtype="<f4").tobytes() + b"e.")
    return out.getvalue()


def test_arrays_between_opcodes() -> None:
    assert [a.tolist() for a in read_arrays(stream())] == [[[0, 1, 2], [3, 4, 5]]]
    for damaged in (stream("O8"), stream("f8"), stream(order="F"), stream()[:-9], stream(padding=200)[:120]):
        with pytest.raises(WeightsError):
            read_arrays(damaged)
    with pytest.raises(WeightsError, match="not a list"):
        read_arrays(pickle.dumps([1, 2]))


def frame(*blocks: tuple[bytes, bool]) -> bytes:
    parts = [(len(b) | (0 if packed else 1 << 31)).to_bytes(4, "little") + b for b, packed in blocks]
    return b"\x04\x22\x4d\x18\x40\x40\xc0" + b"".join(parts) + bytes(4)


def test_lz4_frames() -> None:
    assert decompress_lz4_frame(frame((b"plain", False))) == b"plain"
    # "ab", then 12 bytes from 2 back, which the match itself makes; then literals of more than 15 bytes
    packed = bytes([0x28]) + b"ab" + b"\x02\x00" + bytes([0xF0, 1]) + b"0123456789abcdef"
    assert decompress_lz4_frame(frame((packed, True))) == b"ab" * 7 + b"0123456789abcdef"
    # a match of 4 + 15 + 255 + 1 bytes that reaches into the block before
    linked = bytes([0x0F]) + b"\x05\x00" + bytes([255, 1, 0x10]) + b"!"
    assert decompress_lz4_frame(frame((b"plain", False), (linked, True))) == (b"plain" * 60)[: 5 + 275] + b"!"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04aaaaaaaa",
        frame((b"\x0f\x09\x00\x00", True)),
        frame((b"\xff\xff", True)),
        frame((b"plain", False))[:-7],
    ],
)
def test_damaged_lz4_frames_are_refused(data: bytes) -> None:
    with pytest.raises(WeightsError, match="LZ4"):
        decompress_lz4_frame(data)


def test_every_weight_file_is_pinned() -> None:
    assert sorted(SHA256) == sorted(name for name, _ in MtcnnNets().named_children())
