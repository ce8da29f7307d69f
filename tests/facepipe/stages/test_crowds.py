"""Small faces in large pictures: which images are searched again, and what is added."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

import facepipe
from facepipe.arrow import view_buffers
from facepipe.imaging.decode import decode
from facepipe.imaging.geometry import Frame, bound_by_area
from facepipe.imaging.header import Header, read_header
from facepipe.models.detectors.retinaface_engines import TorchRetinaFace
from facepipe.models.protocols import DetectionLimits, Faces
from facepipe.models.zoo.packaged import load_retinaface_net
from facepipe.schema import WORK_ITEM
from facepipe.sources.item import make_file_uri
from facepipe.stages import Align, Decode, Detect, Read
from facepipe.stages.crowds import add_small_faces, choose_larger_size, choose_larger_view
from facepipe.stages.views import DecodedView


def make_faces(sides: list[float], left: float = 0, score: float = 0.9) -> Faces:
    boxes = np.array([[left + 100 * n, 0, left + 100 * n + side, side] for n, side in enumerate(sides)], np.float32)
    return Faces(boxes.reshape(-1, 4), np.zeros((len(sides), 5, 2), np.float32), np.full(len(sides), score, np.float32))


@pytest.mark.parametrize(("width", "height"), [(640, 480), (1000, 500), (480, 640), (16384, 2000), (2000, 16384)])
def test_the_area_of_an_input_is_bounded(width: int, height: int) -> None:
    size = bound_by_area(640, width, height)
    long, short = max(width, height), min(width, height)
    if long <= 2 * short:
        assert size == 640
    else:
        assert size * size * short / long == pytest.approx(640 * 640 / 2, rel=0.01)


def test_a_panorama_keeps_enough_pixels() -> None:
    assert Decode().choose_reduction(Header("jpeg", 16384, 2000)) == 8
    assert Decode().choose_reduction(Header("jpeg", 8192, 1000)) == 4
    assert Decode().choose_reduction(Header("jpeg", 8192, 6000)) == 8


@pytest.mark.parametrize(
    ("sides", "available", "expected"),
    [
        ([], 4000, None),
        ([100.0], 4000, None),
        ([14.0] * 3, 4000, 1280),
        ([14.0] * 3, 900, 900),
        ([14.0] * 3, 700, None),
        ([2.0], 9000, 2560),
        ([14.0, 100.0, 100.0], 4000, None),
        ([23.0] * 3, 4000, None),
    ],
)
def test_only_crowds_are_searched_again(sides: list[float], available: int, expected: int | None) -> None:
    assert choose_larger_size(make_faces(sides), 640, 640, available) == expected


def test_known_faces_stay_and_large_ones_are_not_added() -> None:
    known = make_faces([20.0, 20.0])
    found = make_faces([21.0, 21.0, 30.0, 90.0], score=0.95)
    joined = add_small_faces(known, found, 40)
    assert sorted(joined.boxes[:, 2] - joined.boxes[:, 0]) == [20, 20, 30]
    assert (np.diff(joined.scores) <= 0).all()
    assert add_small_faces(known, make_faces([]), 40) is known


def test_an_image_without_its_file_is_searched_in_the_pixels_at_hand() -> None:
    view = DecodedView(np.zeros((500, 750, 3), np.uint8), Frame(0.25))
    assert choose_larger_view(make_faces([14.0]), view, None, (3000, 2000), 640) is None
    out = io.BytesIO()
    Image.new("RGB", (3000, 2000)).save(out, "JPEG")
    larger = choose_larger_view(make_faces([14.0]), view, memoryview(out.getvalue()), (3000, 2000), 640)
    assert larger is not None
    assert max(larger.view.pixels.shape) >= larger.size > 1000


@pytest.fixture(scope="module")
def crowd(photos: Path) -> np.ndarray:
    """Twelve faces of some 45 pixels in a large picture."""
    data = (photos / "couple.jpg").read_bytes()
    pixels = decode(data, read_header(data))
    face = next(iter(facepipe.encode([pixels]))).faces[0].box
    centre = (face[:2] + face[2:]) / 2
    side = int((face[2:] - face[:2]).max())
    left, top = (centre - side).astype(int)
    crop = Image.fromarray(pixels[max(top, 0) : top + 2 * side, max(left, 0) : left + 2 * side]).resize((90, 90))
    picture = np.full((2000, 3000, 3), (110, 130, 120), np.uint8)
    for n in range(12):
        x, y = 700 * (n % 4) + 300, 600 * (n // 4) + 300
        picture[y : y + 90, x : x + 90] = np.asarray(crop)
    return picture


def test_a_crowd_is_found_in_arrays_files_and_batches(crowd: np.ndarray, tmp_path: Path) -> None:
    few = next(iter(facepipe.encode([crowd], detect=Detect(small_faces=False)))).faces
    many = next(iter(facepipe.encode([crowd]))).faces
    assert len(many) >= 11 > len(few)
    # What was found before is found as it was.
    for face in few:
        assert any(np.array_equal(face.box, other.box) for other in many)
    path = tmp_path / "crowd.jpg"
    Image.fromarray(crowd).save(path, quality=95)
    row = {"uri": make_file_uri(str(path)), "path": str(path).encode()}
    decoded = Decode()(Read()(pa.Table.from_pylist([row], schema=WORK_ITEM)))
    host = Align(thumbs=False)(Detect(device="cpu")(decoded))
    detect = Detect(device="cpu")
    limits = DetectionLimits(detect.lowest_score, detect.max_iou)
    detect.__dict__["detector"] = TorchRetinaFace(load_retinaface_net(), limits, "cpu", batches_on_cpu=True)
    device = Align(thumbs=False)(detect(decoded))
    assert host.num_rows == device.num_rows >= 11
    assert np.allclose(host["box"].to_pylist(), device["box"].to_pylist(), atol=0.5)
    assert len(list(view_buffers(host["chip"]))) == host.num_rows
