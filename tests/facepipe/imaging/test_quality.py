"""The share of a face that can be seen, and its quality."""

from dataclasses import replace

import numpy as np
import pytest

from facepipe.imaging.quality import QualityFigures, estimate_quality, find_shown_faces, measure_visible

SIZE = np.array([100.0, 80.0])
BOXES = np.array([[10, 10, 50, 60], [-20, 10, 20, 50], [70, 50, 130, 90], [-50, -50, -10, -10]], np.float32)


def test_the_share_of_a_box_inside() -> None:
    assert measure_visible(BOXES, SIZE) == pytest.approx([1, 0.5, 29.5 * 29.5 / 2400, 0], abs=0.02)
    assert np.array_equal(measure_visible(BOXES, SIZE), measure_visible(BOXES, np.tile(SIZE, (4, 1))))
    # The whole picture is visible, and nothing larger is more.
    assert measure_visible(np.array([[-0.5, -0.5, 99.5, 79.5]], np.float32), SIZE) == pytest.approx([1])
    assert len(measure_visible(np.empty((0, 4), np.float32), np.empty((0, 2)))) == 0


def test_what_is_mostly_mirror_is_no_face() -> None:
    landmarks = np.full((4, 5, 2), 30.0, np.float32)
    assert find_shown_faces(BOXES, landmarks, SIZE).tolist() == [True, False, False, False]
    # One landmark beside the picture is cut, two are mirrored.
    landmarks[0, 0] = (-3, 30)
    assert find_shown_faces(BOXES, landmarks, SIZE)[0]
    landmarks[0, 3] = (-3, 50)
    assert not find_shown_faces(BOXES, landmarks, SIZE)[0]


def test_a_close_up_that_is_cut_on_several_sides_is_a_face() -> None:
    box = np.array([[-30, -40, 110, 110]], np.float32)
    landmarks = np.array([[[-3, 30], [80, 30], [40, 50], [-2, 70], [70, 70]]], np.float32)
    assert measure_visible(box, SIZE)[0] < 0.6
    assert find_shown_faces(box, landmarks, SIZE).tolist() == [True]


GOOD = QualityFigures(*(np.array([value]) for value in (0.9999, 1.0, 150.0, 200.0, 2.0, 0.98)))


@pytest.mark.parametrize(
    ("name", "worse"),
    [("scores", 0.7), ("visible", 0.65), ("face_px", 14.0), ("sharpness", 2.0), ("yaw", 75.0), ("plausibility", 0.01)],
)
def test_every_term_lowers_the_quality(name: str, worse: float) -> None:
    best = float(estimate_quality(GOOD)[0])
    assert 0.9 < best <= 1
    low = float(estimate_quality(replace(GOOD, **{name: np.array([worse])}))[0])
    assert 0 <= low < 0.6 * best
    middle = (getattr(GOOD, name)[0] + worse) / 2
    assert low <= float(estimate_quality(replace(GOOD, **{name: np.array([middle])}))[0]) <= best
