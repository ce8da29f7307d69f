"""Faces on their side or upside down: found, kept in the image's own frame, and cut upright; upright ones stay as they are."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import facepipe
from facepipe.imaging.alignment import ChipLayout
from facepipe.imaging.decode import decode
from facepipe.imaging.geometry import Frame
from facepipe.imaging.header import read_header
from facepipe.models.detectors.turns import TurnModel, load_turn_model, measure_geometry
from facepipe.models.protocols import Faces
from facepipe.models.zoo.registry import find_card
from facepipe.stages import Detect
from facepipe.stages.align import DecodedView, cut_upright_chip
from facepipe.stages.turned import (
    find_turned_faces,
    get_turns,
    measure_overlaps,
    turn_boxes,
    turn_boxes_back,
    turn_pixels,
    turn_points,
    turn_points_back,
)

# An upright face's landmarks in a box that is higher than wide.
UPRIGHT = np.array([[[30.0, 45], [70, 45], [50, 65], [35, 90], [65, 90]]], np.float32)
BOX = np.array([[10.0, 0, 90, 110]], np.float32)


def make_faces(box: np.ndarray, landmarks: np.ndarray, score: float) -> Faces:
    return Faces(box.astype(np.float32), landmarks.astype(np.float32), np.array([score], np.float32))


@given(st.integers(0, 3), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_turning_points_is_turning_pixels(quarters: int, height: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3), np.uint8)
    x, y = int(rng.integers(width)), int(rng.integers(height))
    pixels[y, x] = 255
    turned = turn_pixels(pixels, quarters)
    at = turn_points(np.array([[float(x), y]]), quarters, (height, width))[0]
    assert turned[int(at[1]), int(at[0])].min() == 255
    assert np.array_equal(turn_points_back(at[None], quarters, (height, width)), [[x, y]])
    boxes = np.sort(rng.uniform(0, 40, (3, 2, 2)), 1).reshape(3, 4)
    there = turn_boxes(boxes, quarters, (height, width))
    assert (there[:, 2:] >= there[:, :2]).all()
    assert np.allclose(turn_boxes_back(there, quarters, (height, width)), boxes)


def test_overlaps() -> None:
    boxes = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30]], np.float32)
    assert np.allclose(measure_overlaps(boxes, boxes), [[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 1]])


def test_the_geometry_does_not_depend_on_place_and_scale() -> None:
    moved = measure_geometry(BOX * 3 + 7, UPRIGHT * 3 + 7)
    assert np.allclose(moved, measure_geometry(BOX, UPRIGHT), atol=1e-6)
    assert np.isfinite(measure_geometry(np.zeros((1, 4), np.float32), UPRIGHT)).all()


@pytest.mark.parametrize("detector", ["retinaface-mnet025", "mtcnn", "scrfd", "yunet"])
def test_upright_geometry_is_upright(detector: str) -> None:
    model = load_turn_model(detector)
    probabilities = model.predict(BOX, UPRIGHT)
    assert probabilities.sum() == pytest.approx(1)
    assert probabilities.argmax() == 0
    # Upright landmarks in a box that lies are those of a face on its side.
    assert model.predict(np.array([[-10.0, 15, 110, 95]], np.float32), UPRIGHT)[0, 0] < 0.5


def test_detectors_without_landmarks_of_their_own_have_no_turns() -> None:
    assert find_card("dlib-hog", "detector").turn_model is None
    assert Detect(model="fake-detector").turn_model is None
    assert Detect(turns=False).turn_model is None
    plain = Detect(turns=False, small_faces=False)
    assert plain.lowest_score == plain.min_score > Detect(small_faces=False).lowest_score > Detect().lowest_score


# ---------------------------------------------------------------- the search, with a model that reads the box's shape


class BoxModel(TurnModel):
    """Takes boxes that are wider than high for faces on their side, by one quarter clockwise."""

    def __init__(self) -> None:
        pass

    def predict(self, boxes: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
        is_wide = (boxes[:, 2] - boxes[:, 0]) > (boxes[:, 3] - boxes[:, 1])
        upright = np.array([0.9, 0.05, 0.03, 0.02])
        lying = np.array([0.1, 0.8, 0.05, 0.05])
        return np.where(is_wide[:, None], lying, upright)


HIGH = np.array([[10.0, 10, 30, 40]], np.float32)
WIDE = np.array([[10.0, 10, 40, 30]], np.float32)
PIXELS = {0: np.zeros((60, 80, 3), np.uint8)}


def run_search(detected: Faces, weak: Faces | None, answers: list[Faces]) -> tuple[Faces | None, int]:
    looks = []

    def search(turned: dict[int, np.ndarray]) -> dict[int, Faces]:
        looks.append(turned)
        return dict.fromkeys(turned, answers[len(looks) - 1])

    found = find_turned_faces({0: detected}, {0: weak} if weak else {}, PIXELS, BoxModel(), search)
    return found.get(0), len(looks)


NOTHING = Faces(np.empty((0, 4), np.float32), np.empty((0, 5, 2), np.float32), np.empty(0, np.float32))
POINTS = np.full((1, 5, 2), 20.0, np.float32)


def test_an_upright_face_costs_no_look() -> None:
    assert run_search(make_faces(HIGH, POINTS, 0.99), None, []) == (None, 0)


def test_a_turned_face_is_replaced_in_the_frame_of_the_image() -> None:
    shape = PIXELS[0].shape[:2]
    there = turn_boxes(WIDE, 1, shape)
    points = turn_points(POINTS, 1, shape)
    found, looks = run_search(make_faces(WIDE, POINTS, 0.9), None, [make_faces(there, points, 0.95)])
    assert looks == 1
    assert found is not None
    assert np.allclose(found.boxes, WIDE)
    assert np.allclose(found.landmarks, POINTS)
    assert get_turns(found).tolist() == [90]


def test_a_face_that_scores_less_turned_stays() -> None:
    there = turn_boxes(WIDE, 1, PIXELS[0].shape[:2])
    lower = make_faces(there, POINTS, 0.8)
    assert run_search(make_faces(WIDE, POINTS, 0.9), None, [lower, NOTHING]) == (None, 2)


def test_an_image_without_a_face_is_searched_at_all_turns() -> None:
    weak = make_faces(WIDE, POINTS, 0.3)
    there = make_faces(turn_boxes(WIDE, 3, PIXELS[0].shape[:2]), POINTS, 0.95)
    found, looks = run_search(NOTHING, weak, [NOTHING, NOTHING, there])
    assert looks == 3
    assert found is not None
    assert len(found.scores) == 1
    # A doubtful face in one of four directions is likely to be none.
    assert run_search(NOTHING, weak, [NOTHING, NOTHING, replace_score(there, 0.75)]) == (None, 3)


def replace_score(faces: Faces, score: float) -> Faces:
    return faces._replace(scores=np.array([score], np.float32))


# ---------------------------------------------------------------- chips


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "layout",
    [
        ChipLayout((64, 64), template=((20.0, 25.0), (44.0, 25.0), (32.0, 38.0), (22.0, 50.0), (42.0, 50.0))),
        ChipLayout((64, 80), "eyes"),
        ChipLayout((80, 64), "box", fill=128),
    ],
    ids=["similarity", "eyes", "box"],
)
def test_all_layouts_cut_upright_chips(layout: ChipLayout, quarters: int) -> None:
    y, x = np.mgrid[0:140, 0:180]
    upright = np.stack([x, y, (x + y) // 2], -1).astype(np.uint8)
    box, landmarks = BOX.astype(np.float64) + 20, UPRIGHT.astype(np.float64) + 20
    expected = cut_upright_chip(layout, DecodedView(upright, Frame()), box[0], landmarks[0], turn=0, square=None)
    # The same picture as it is stored if the face lies in it.
    stored = turn_pixels(upright, -quarters % 4)
    shape = stored.shape[:2]
    chip = cut_upright_chip(
        layout,
        DecodedView(stored, Frame()),
        turn_boxes_back(box, quarters, shape)[0],
        turn_points_back(landmarks, quarters, shape)[0],
        turn=90 * quarters,
        square=None,
    )
    assert np.abs(chip.astype(int) - expected).max() <= 2


# ---------------------------------------------------------------- photos


def test_faces_of_photos_are_righted_and_upright_ones_stay(photos: Path) -> None:
    quick = Detect(device="cpu")
    off = replace(quick, turns=False)
    images = {}
    for n, name in enumerate(("img56.jpg", "couple.jpg", "img4.jpg", "img43.jpg", "img58.jpg")):
        data = (photos / name).read_bytes()
        images[n] = decode(data, read_header(data), 2)
    upright = off.detect_faces(images)
    kept = quick.detect_faces(images)
    for n, faces in upright.items():
        assert np.array_equal(kept[n].boxes, faces.boxes)
        assert not get_turns(kept[n]).any()
    for quarters in (1, 2, 3):
        stored = {n: turn_pixels(image, -quarters % 4) for n, image in images.items()}
        found = quick.detect_faces(stored)
        for n, faces in upright.items():
            shape = stored[n].shape[:2]
            expected = turn_points_back(faces.landmarks, quarters, shape)
            side = float((faces.boxes[:, 2:] - faces.boxes[:, :2]).max())
            nearest = np.abs(found[n].landmarks[:, None] - expected[None]).max((2, 3)).min(0)
            assert (nearest < 0.1 * side).all()
            assert (get_turns(found[n]) == 90 * quarters).all()


def test_vectors_of_turned_photos_are_those_of_upright_ones(photos: Path) -> None:
    pixels = cv2.cvtColor(cv2.imread(str(photos / "img56.jpg")), cv2.COLOR_BGR2RGB)
    pixels = cv2.resize(pixels, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    results = facepipe.encode([turn_pixels(pixels, -quarters % 4) for quarters in range(4)])
    first = results[0].faces[0]
    for quarters, result in enumerate(results):
        assert result.faces[0].turn == 90 * quarters
        assert np.linalg.norm(result.faces[0].embedding - first.embedding) < 0.1
        assert result.faces[0].face_quality == pytest.approx(first.face_quality, abs=0.1)
