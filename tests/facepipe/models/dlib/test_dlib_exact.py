"""The port of dlib's landmarks, chips and vectors against dlib itself, on photos and on drawn cases."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest

from facepipe.errors import WeightsError
from facepipe.imaging.dlib_chip import TEMPLATE, cut_dlib_chip, find_dlib_square, halve_image
from facepipe.models.dlib.format import FormatError
from facepipe.models.dlib.predictor import PREDICTOR_SHA256, load_predictor
from facepipe.models.dlib.predictor_format import read_cascade, read_integers
from facepipe.models.weights import find_package_file, verify_sha256
from facepipe.models.zoo.registry import find_card

FOLDER = "models/"
PREDICTOR = "shape_predictor_5_face_landmarks.dat"
NETWORK = "dlib_face_recognition_resnet_model_v1.dat"


def weights(name: str) -> Path:
    return find_package_file("face_recognition_models", FOLDER + name, "face-recognition-models")


class Face(NamedTuple):
    name: str
    image: np.ndarray
    rect: tuple[int, int, int, int]


class Dlib(NamedTuple):
    detector: Any
    predictor: Any
    network: Any

    def shape(self, face: Face) -> Any:
        import dlib

        return self.predictor(face.image, dlib.rectangle(*face.rect))


@pytest.fixture(scope="module")
def reference() -> Dlib:
    dlib = pytest.importorskip("dlib")
    network = dlib.face_recognition_model_v1(str(weights(NETWORK)))
    return Dlib(dlib.get_frontal_face_detector(), dlib.shape_predictor(str(weights(PREDICTOR))), network)


def coordinates(shape: Any) -> np.ndarray:
    return np.array([(part.x, part.y) for part in shape.parts()])


def load(file: Path) -> np.ndarray:
    return np.asarray(cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB))


def found(detector: Any, image: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """dlib's boxes, found in a small version."""
    scale = min(1.0, 360 / max(image.shape[:2]))
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    for r in detector(small, 1):
        left, top, right, bottom = (round(v / scale) for v in (r.left(), r.top(), r.right(), r.bottom()))
        yield left, top, right, bottom


def variants(name: str, image: np.ndarray, rect: tuple[int, int, int, int]) -> Iterator[Face]:
    """The face as it is, shrunk, turned by 90 and 180 degrees, and at two edges of a cropped image."""
    height, width = image.shape[:2]
    left, top, right, bottom = rect
    yield Face(name, image, rect)
    third = cv2.resize(image, None, fx=1 / 3, fy=1 / 3, interpolation=cv2.INTER_AREA)
    yield Face(f"{name} shrunk", third, (left // 3, top // 3, right // 3, bottom // 3))
    yield Face(f"{name} turned", np.rot90(image).copy(), (top, width - 1 - right, bottom, width - 1 - left))
    over = (width - 1 - right, height - 1 - bottom, width - 1 - left, height - 1 - top)
    yield Face(f"{name} upside down", np.rot90(image, 2).copy(), over)
    x, y = left + (right - left) // 4, top + (bottom - top) // 4
    if min(x, y, width - x, height - y) > 0:
        yield Face(f"{name} at the top left", image[y:, x:].copy(), (left - x, top - y, right - x, bottom - y))
    x, y = right - (right - left) // 4, bottom - (bottom - top) // 4
    yield Face(f"{name} at the bottom right", image[:y, :x].copy(), rect)


def photos_of_people(shared: Path) -> list[Path]:
    """All of the photos, and 20 of LFW's people."""
    photos = sorted((shared / "data" / "photos-dev").glob("*.jpg"))
    assert len(photos) == 32
    return photos + sorted((shared / "data" / "lfw-dev" / "images").glob("*/*_0001.jpg"))[::100][:20]


@pytest.fixture(scope="module", params=["portraits", pytest.param("shared", marks=pytest.mark.shared)])
def faces(request: pytest.FixtureRequest, reference: Dlib) -> list[Face]:
    """The faces of real photos, with all variants."""
    folder = request.getfixturevalue(request.param)
    files = photos_of_people(folder) if request.param == "shared" else sorted(folder.glob("*.jpg"))
    cases = [
        face
        for file in files
        for image in (load(file),)
        for rect in found(reference.detector, image)
        for face in variants(file.name, image, rect)
    ]
    assert len({face.name.split()[0] for face in cases}) >= len(files) - 2  # hardly an image without a face
    return cases


def test_landmarks_and_chips_are_those_of_dlib(faces: list[Face], reference: Dlib) -> None:
    import dlib

    predictor = load_predictor()
    for face in faces:
        shape = reference.shape(face)
        points = predictor.predict(face.image, face.rect)
        np.testing.assert_array_equal(points, coordinates(shape), face.name)
        chip = dlib.get_face_chip(face.image, shape, 150, 0.25)
        np.testing.assert_array_equal(cut_dlib_chip(face.image, points), chip, face.name)


def test_vectors_are_those_of_dlib(faces: list[Face], reference: Dlib) -> None:
    some = faces[:: max(1, len(faces) // 30)]
    assert len(some) > 20
    predictor, embedder = load_predictor(), find_card("dlib-resnet", "embedder").load("cpu", 1)
    for face in some:
        ours = embedder.embed(cut_dlib_chip(face.image, predictor.predict(face.image, face.rect))[None])[0]
        theirs = np.array(reference.network.compute_face_descriptor(face.image, reference.shape(face)))
        assert np.abs(ours - theirs).max() <= 1e-6, face.name


def drawn(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth noise with burnt-out and black patches, where truncation shows every rounding."""
    small = rng.integers(0, 256, (max(2, height // 9), max(2, width // 9), 3), dtype=np.uint8)
    image = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    return np.clip(image * 2 - 128, 0, 255).astype(np.uint8)


def placed(rng: np.random.Generator, scale: float, centre: tuple[float, float]) -> np.ndarray:
    """The template's points turned at random, with noise, at a scale, about a centre."""
    angle = rng.uniform(-np.pi, np.pi)
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = (TEMPLATE - 75) @ turn.T + centre + rng.normal(0, 3 * scale, (5, 2))
    return np.floor(points + 0.5).astype(np.int64)


def test_chips_of_any_similarity_are_those_of_dlib() -> None:
    dlib = pytest.importorskip("dlib")
    rng = np.random.default_rng(7)
    for scale in np.geomspace(0.05, 12, 150):
        height, width = (int(v) for v in rng.integers(20, 900, 2))
        image = drawn(rng, height, width)
        points = placed(rng, scale, (rng.uniform(-50, width + 50), rng.uniform(-50, height + 50)))
        if np.ptp(points, 0).max() < 3:
            continue
        parts = dlib.points([dlib.point(int(x), int(y)) for x, y in points])
        shape = dlib.full_object_detection(dlib.rectangle(0, 0, 9, 9), parts)
        np.testing.assert_array_equal(
            cut_dlib_chip(image, points), dlib.get_face_chip(image, shape, 150, 0.25), f"{scale}"
        )


@pytest.mark.parametrize("shade", [255, 254, 127, 1])
def test_chips_of_flat_colours_are_those_of_dlib(shade: int) -> None:
    dlib = pytest.importorskip("dlib")
    rng = np.random.default_rng(shade)
    image = np.full((400, 500, 3), shade, np.uint8)
    for scale in np.geomspace(0.1, 6, 20):
        points = placed(rng, scale, (250, 200))
        parts = dlib.points([dlib.point(int(x), int(y)) for x, y in points])
        shape = dlib.full_object_detection(dlib.rectangle(0, 0, 9, 9), parts)
        theirs = dlib.get_face_chip(image, shape, 150, 0.25)
        np.testing.assert_array_equal(cut_dlib_chip(image, points), theirs, f"{scale}")


def test_landmarks_of_any_box_are_those_of_dlib(reference: Dlib) -> None:
    rng = np.random.default_rng(3)
    predictor = load_predictor()
    for _ in range(100):
        image = drawn(rng, *(int(v) for v in rng.integers(2, 500, 2)))
        left, top, width, height = (int(v) for v in rng.integers((-300, -300, 1, 1), (700, 700, 900, 900)))
        face = Face("drawn", image, (left, top, left + width, top + height))
        np.testing.assert_array_equal(predictor.predict(image, face.rect), coordinates(reference.shape(face)))


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (2, 2), (9, 9), (300, 8)])
def test_no_face_is_too_odd(size: tuple[int, int]) -> None:
    image = np.full((*size, 3), 200, np.uint8)
    predictor = load_predictor()
    for rect in ((0, 0, 0, 0), (5, 5, 5, 5), (-900, -900, -700, -700), (10**6, 10**6, 10**6 + 50, 10**6 + 50)):
        points = predictor.predict(image, rect)
        assert points.shape == (5, 2)
        assert points.dtype == np.int64
        assert cut_dlib_chip(image, points).shape == (150, 150, 3)
    far = np.array([[10**6, 0], [0, 10**6], [-(10**6), 0], [0, -(10**6)], [3, 3]])
    for points in (np.zeros((5, 2), np.int64), far, placed(np.random.default_rng(0), 500.0, (0, 0))):
        assert cut_dlib_chip(image, points).dtype == np.uint8


def test_a_face_outside_the_image_is_black() -> None:
    image = np.full((100, 100, 3), 200, np.uint8)
    rng = np.random.default_rng(1)
    assert not cut_dlib_chip(image, placed(rng, 1.0, (900, 50))).any()
    assert cut_dlib_chip(image, placed(rng, 1.0, (50, 50))).any()


def test_pyramid_truncates() -> None:
    image = np.random.default_rng(0).integers(0, 256, (31, 44, 3)).astype(np.int64)
    taps = np.array([1, 4, 6, 4, 1])
    rows = sum(t * image[k : k + 27 : 2] for k, t in enumerate(taps))
    both = sum(t * rows[:, k : k + 40 : 2] for k, t in enumerate(taps))
    expected = (both // 256)[: (31 - 3) // 2, : (44 - 3) // 2]
    np.testing.assert_array_equal(halve_image(image.astype(np.uint8)), expected)


def test_square() -> None:
    assert find_dlib_square((10, 20, 110, 120), (0, 0, 1)) == (10, 20, 109, 119)
    assert find_dlib_square((0, 0, 50, 200), (0.1, -0.1, 1.2)) == (-25, 30, 94, 149)
    assert find_dlib_square(np.array([3, 4, 61, 62], np.float32), None) == (3, 4, 61, 62)
    left, top, right, bottom = find_dlib_square((7, 7, 7, 7), (0, 0, 1.3))  # an empty box
    assert (left, top) == (right, bottom)


def test_file_is_walked_to_its_end() -> None:
    data = weights(PREDICTOR).read_bytes()
    for broken in (data[:-1], data + b"\x01\x00", data[1:], b"", b"\x00" + data[1:], data[:5000]):
        with pytest.raises(FormatError, match="predictor"):
            read_cascade(broken)


def test_altered_weights_are_refused() -> None:
    data = weights(PREDICTOR).read_bytes()
    with pytest.raises(WeightsError, match="not the registered file"):
        verify_sha256(data[:-1] + bytes([data[-1] ^ 1]), PREDICTOR_SHA256, PREDICTOR)


def test_packed_integers() -> None:
    packed = bytes([1, 7, 0x81, 7, 2, 0, 1, 4, 255, 255, 255, 255, 0x82, 1, 2])
    assert read_integers(packed).tolist() == [7, -7, 256, 2**32 - 1, -513]
    assert read_integers(b"").tolist() == []
    for broken in (b"\x01", b"\x09123456789", b"\x11a", b"\x00"):
        with pytest.raises(FormatError):
            read_integers(broken)


def test_arrays_are_read_only() -> None:
    predictor = load_predictor()
    assert load_predictor() is predictor
    with pytest.raises(ValueError, match="read-only"):
        predictor.levels[0].leaves[0, 0] = 1
