"""Alignment and pose against what they must invert."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.imaging.geometry import estimate_pose, fit_similarity, measure_scale, measure_sharpness, warp_chip
from facepipe.models.zoo.architectures import DLIB_TEMPLATE

TEMPLATE = np.array(DLIB_TEMPLATE)


@settings(deadline=None)
@given(st.floats(0.05, 20), st.floats(-3.1, 3.1), st.floats(-500, 500), st.floats(-500, 500))
def test_similarity_recovers_what_was_applied(scale: float, angle: float, dx: float, dy: float) -> None:
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = (TEMPLATE - [dx, dy]) @ np.linalg.inv(turn).T
    matrix = fit_similarity(points, TEMPLATE)
    assert np.allclose(matrix, np.hstack([turn, [[dx], [dy]]]), atol=1e-6 * max(1, scale, 1 / scale) * 500)
    assert measure_scale(matrix) == pytest.approx(scale)


def test_similarity_is_the_least_squares_one() -> None:
    rng = np.random.default_rng(0)
    points = TEMPLATE + rng.normal(0, 3, TEMPLATE.shape)
    matrix = fit_similarity(points, TEMPLATE)

    def error(m: np.ndarray) -> float:
        return float(((points @ m[:, :2].T + m[:, 2] - TEMPLATE) ** 2).sum())

    best = error(matrix)
    for _ in range(200):
        a, b, x, y = rng.normal(0, 0.01, 4)
        assert error(matrix + np.array([[a, -b, x], [b, a, y]])) >= best


def test_points_that_coincide_do_no_harm() -> None:
    assert np.isfinite(fit_similarity(np.ones((5, 2)), TEMPLATE)).all()


@pytest.mark.parametrize("scale", [0.7, 0.35, 0.11])
def test_chips_of_a_shrunk_image_agree_with_area_averages(scale: float) -> None:
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.integers(0, 255, (900, 1100, 3), np.uint8), (0, 0), 4)
    size = (150, 150)
    matrix = np.array([[scale, 0, -200 * scale], [0, scale, -100 * scale]])
    chip = warp_chip(image, matrix, size)
    fine = cv2.warpAffine(image, matrix * 8, (1200, 1200), flags=cv2.INTER_LINEAR)
    expected = cv2.resize(fine, size, interpolation=cv2.INTER_AREA)
    inside = np.s_[5:60, 5:60]
    assert np.abs(chip.astype(int)[inside] - expected[inside]).mean() < 4


def test_pose_of_turned_heads() -> None:
    from facepipe.imaging.geometry import _HEAD

    for yaw in (-40, 0, 25):
        for roll in (-30, 0, 15):
            a, b = np.radians([yaw, roll])
            turn = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
            points = (_HEAD @ turn.T)[:, :2]
            spin = np.array([[np.cos(b), -np.sin(b)], [np.sin(b), np.cos(b)]])
            found_yaw, found_roll = estimate_pose(3 * (points @ spin.T)[None] + 100)
            assert found_yaw[0] == pytest.approx(yaw, abs=1)
            assert found_roll[0] == pytest.approx(roll, abs=1)


def test_blur_lowers_sharpness() -> None:
    chip = np.random.default_rng(0).integers(0, 255, (150, 150, 3), np.uint8)
    assert measure_sharpness(cv2.GaussianBlur(chip, (0, 0), 2)) < measure_sharpness(chip) / 10
