"""Chips: where eyes and boxes come to lie, what is beside them, and that scale and orientation do not show."""

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from facepipe.imaging.alignment import ChipLayout, cut_chip, find_required_scale, scale_arcface_template
from facepipe.imaging.decode import decode
from facepipe.imaging.geometry import Frame, locate_frame
from facepipe.imaging.header import read_header

SIMILARITY = ChipLayout((112, 112), template=scale_arcface_template((112, 112)))
EYES = ChipLayout((160, 160), "eyes", fill=128)
BOX = ChipLayout((96, 112), "box", fill=200)
LAYOUTS = [SIMILARITY, EYES, BOX]
FACE = np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]])


def marked(angle: float = 0.0, side: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A grey picture with a red and a blue disc for eyes, turned by degrees; its box and landmarks."""
    turn = cv2.getRotationMatrix2D((150, 150), -angle, 1)
    landmarks = (100 + 100 * FACE) @ turn[:, :2].T + turn[:, 2]
    image = np.full((side, side, 3), 90, np.uint8)
    for point, colour in ((landmarks[0], (255, 0, 0)), (landmarks[1], (0, 0, 255))):
        cv2.circle(image, tuple(int(v) for v in np.round(point)), 4, colour, -1)
    low, high = landmarks.min(0) - 30, landmarks.max(0) + 30
    return image, np.concatenate([low, high]), landmarks


def eyes_in(chip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centres of the red and of the blue disc."""
    levels = chip.astype(int)
    masks = (levels[..., 0] - levels[..., 2] > 120, levels[..., 2] - levels[..., 0] > 120)
    left, right = (np.argwhere(mask)[:, ::-1].mean(0) for mask in masks)
    return left, right


@given(angle=st.floats(-80, 80))
@settings(max_examples=25, deadline=None)
def test_eyes_are_level(angle: float) -> None:
    image, box, landmarks = marked(angle)
    left, right = eyes_in(cut_chip(EYES, image, Frame(), box, landmarks))
    assert abs(left[1] - right[1]) < 2.5
    assert right[0] - left[0] > 20


@given(angle=st.floats(-170, 170))
@settings(max_examples=25, deadline=None)
def test_landmarks_go_to_the_template(angle: float) -> None:
    image, box, landmarks = marked(angle)
    left, right = eyes_in(cut_chip(SIMILARITY, image, Frame(), box, landmarks))
    upright = marked(0)
    expected = eyes_in(cut_chip(SIMILARITY, upright[0], Frame(), *upright[1:]))
    assert np.abs(np.array([left, right]) - expected).max() < 1.5


def test_a_box_is_not_turned() -> None:
    image, box, landmarks = marked(30)
    left, right = eyes_in(cut_chip(BOX, image, Frame(), box, landmarks))
    across = right - left
    assert np.degrees(np.arctan2(across[1], across[0])) == pytest.approx(30, abs=4)


@given(width=st.integers(10, 200), height=st.integers(10, 200), turned=st.booleans())
@settings(max_examples=30, deadline=None)
def test_what_is_beside_the_box_is_filled(width: int, height: int, turned: bool) -> None:
    layout = EYES if turned else BOX
    image = np.zeros((260, 260, 3), np.uint8)
    box = np.array([20, 30, 20 + width, 30 + height], float)
    chip = cut_chip(layout, image, Frame(), box, 50 + 10 * FACE)
    assert chip.shape == (layout.size[1], layout.size[0], 3)
    scale = min(layout.size[0] / width, layout.size[1] / height)
    filled = (chip == layout.fill).all(2)
    assert (~filled).any(0).sum() == pytest.approx(width * scale, abs=1.01)
    assert (~filled).any(1).sum() == pytest.approx(height * scale, abs=1.01)
    rows, columns = np.flatnonzero((~filled).any(1)), np.flatnonzero((~filled).any(0))
    assert abs(rows[0] - (layout.size[1] - 1 - rows[-1])) <= 1
    assert abs(columns[0] - (layout.size[0] - 1 - columns[-1])) <= 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_face_half_outside_the_image(layout: ChipLayout) -> None:
    image = np.full((80, 80, 3), 255, np.uint8)
    box, landmarks = np.array([-40, -10, 40, 70], float), np.array([-40, -10]) + 80 * FACE
    chip = cut_chip(layout, image, Frame(), box, landmarks)
    middle = chip[chip.shape[0] // 2]
    assert (middle[2] == 0).all(), "outside the image it is black"
    assert (middle[chip.shape[1] - 25 :] == 255).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("box", [(5, 5, 5, 5), (5, 5, 5, 60), (50, 50, 40, 40), (900, 900, 960, 980)])
def test_degenerate_boxes_do_not_raise(layout: ChipLayout, box: tuple[float, ...]) -> None:
    image = np.full((80, 80, 3), 255, np.uint8)
    for landmarks in (np.zeros((5, 2)), np.full((5, 2), 33.0), 40 + 20 * FACE):
        corners = np.array(box, float)
        assert find_required_scale(layout, corners, landmarks) > 0
        chip = cut_chip(layout, image, Frame(), corners, landmarks)
        assert chip.shape == (layout.size[1], layout.size[0], 3)


def photo(photos: Path, orientation: int = 1) -> bytes:
    """A smooth photograph as a JPEG with an EXIF orientation; what is seen is the same under all of them."""
    with Image.open(photos / "couple.jpg") as file:
        seen = file.convert("RGB").resize((960, 640))
    back = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    turn = back[orientation]
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    (seen if turn is None else seen.transpose(turn)).save(out, "JPEG", quality=97, subsampling=0, exif=exif)
    return out.getvalue()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scale_and_orientation_do_not_show(layout: ChipLayout, photos: Path) -> None:
    box = np.array([300, 120, 700, 560], float)
    landmarks = np.array([300, 120]) + np.array([400, 440]) * FACE @ np.array([[1.0, 0.15], [-0.15, 1.0]])
    chips = []
    for orientation in (1, 3, 6, 8):
        data = photo(photos, orientation)
        header = read_header(data)
        assert header.oriented_size == (960, 640)
        for reduce in (1, 2):
            assert find_required_scale(layout, box, landmarks) <= 1 / reduce
            view = decode(data, header, reduce), locate_frame(header, reduce)
            chips.append(cut_chip(layout, *view, box, landmarks).astype(int))
    for chip in chips[1:]:
        assert np.abs(chip - chips[0]).mean() < 2.5


@pytest.mark.parametrize(("size", "eye"), [((112, 112), 38.2946), ((96, 112), 30.2946), ((224, 224), 76.5892)])
def test_arcface_templates_of_other_sizes(size: tuple[int, int], eye: float) -> None:
    template = scale_arcface_template(size)
    assert template[0][0] == pytest.approx(eye)
    assert template[0][1] == pytest.approx(51.6963 * size[1] / 112, abs=1e-3)
