"""Chips cut on the device against OpenCV's, at every scale, turned, and half outside of the image."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from facepipe.imaging import geometry
from facepipe.models.runtime.transfers import Uploads
from facepipe.models.zoo.registry import find_chip_layout
from facepipe.stages.resident.chips import ChipCuts, cut_chips, fit_similarities, measure_scales, plan_cuts
from facepipe.stages.resident.sampling import ResidentImages

CPU = torch.device("cpu")
LAYOUT = find_chip_layout("dlib-resnet")
TEMPLATE = np.array(LAYOUT.template)


def scene(height: int = 400, width: int = 520) -> np.ndarray:
    """Structure at all scales, up to noise pixel by pixel."""
    rng = np.random.default_rng(3)
    layers = [cv2.resize(rng.integers(0, 256, (k, k, 3), np.uint8), (width, height)) for k in (4, 20, 90)]
    return np.mean([*layers, rng.integers(0, 256, (height, width, 3))], 0).astype(np.uint8)


def landmarks(scale: float, angle: float, x: float, y: float) -> np.ndarray:
    """The template as it lies in an image: `scale` image pixels a chip pixel."""
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return (TEMPLATE - TEMPLATE.mean(0)) @ turn.T + (x, y)


def on_device(images: list[np.ndarray], image: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    shapes = np.array([picture.shape[:2] for picture in images])
    cuts, order = plan_cuts(image, matrices, shapes[image], LAYOUT.size).sort_by_step()
    chips = cut_chips(ResidentImages.upload(images, Uploads(CPU)), cuts, LAYOUT.size).numpy()
    return chips[np.argsort(order)]


faces = st.tuples(
    st.floats(0.2, 4.5), st.floats(-np.pi, np.pi), st.floats(-60, 580), st.floats(-60, 460)
)  # scale, angle, centre


@settings(deadline=None, max_examples=25)
@example([(9.3, 0.4, 250.0, 200.0)])
@given(st.lists(faces, min_size=1, max_size=4))
def test_chips_are_opencvs_to_a_level(rows: list[tuple[float, float, float, float]]) -> None:
    """OpenCV 5 interpolates exactly, OpenCV 4 at positions rounded to 1/32 of a pixel: some 2 levels in noise."""
    images = [scene(), scene(333, 251)]
    points = np.stack([landmarks(*row) for row in rows])
    matrices = fit_similarities(points, TEMPLATE)
    image = np.arange(len(rows)) % 2
    chips = on_device(images, image, matrices)
    exact = int(cv2.__version__.split(".")[0]) >= 5
    for chip, n, matrix in zip(chips, image, matrices, strict=True):
        apart = np.abs(chip.astype(int) - geometry.warp_chip(images[n], matrix, LAYOUT.size))
        assert apart.max() <= (1 if exact else 8)
        assert apart.mean() < (0.01 if exact else 0.5)


@settings(deadline=None, max_examples=60)
@given(st.lists(faces, min_size=1, max_size=5))
def test_similarities_are_those_of_one_face(rows: list[tuple[float, float, float, float]]) -> None:
    points = np.stack([landmarks(*row) + np.random.default_rng(0).normal(0, 2, (5, 2)) for row in rows])
    matrices = fit_similarities(points, TEMPLATE)
    for found, face in zip(matrices, points, strict=True):
        assert np.allclose(found, geometry.fit_similarity(face, TEMPLATE), rtol=1e-9, atol=1e-9)
    assert np.allclose(measure_scales(matrices), [geometry.measure_scale(matrix) for matrix in matrices])


def test_five_points_in_one_place_are_no_division_by_zero() -> None:
    points = np.full((1, 5, 2), 7.0)
    assert np.allclose(fit_similarities(points, TEMPLATE)[0], geometry.fit_similarity(points[0], TEMPLATE))


def test_a_chip_does_not_depend_on_the_others() -> None:
    images, rng = [scene(), scene(300, 300)], np.random.default_rng(1)
    rows = [(float(rng.uniform(0.4, 2.9)), float(rng.uniform(-1, 1)), 200.0, 170.0) for _ in range(9)]
    matrices, image = fit_similarities(np.stack([landmarks(*row) for row in rows]), TEMPLATE), np.arange(9) % 2
    together = on_device(images, image, matrices)
    order = rng.permutation(9)
    assert np.array_equal(on_device(images, image[order], matrices[order]), together[order])
    for n in range(9):
        assert np.array_equal(on_device(images, image[n : n + 1], matrices[n : n + 1])[0], together[n])


def test_nothing_to_cut() -> None:
    none = ChipCuts(np.empty(0, np.int64), np.empty((0, 2, 3)), np.empty(0, np.int64))
    assert cut_chips(ResidentImages.upload([scene()], Uploads(CPU)), none, LAYOUT.size).shape == (0, 150, 150, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_cuts_the_same_chips() -> None:
    images = [scene(), scene(333, 251)]
    rng = np.random.default_rng(2)
    rows = [(float(rng.uniform(0.3, 6)), float(rng.uniform(-3, 3)), 210.0, 180.0) for _ in range(24)]
    matrices, image = fit_similarities(np.stack([landmarks(*row) for row in rows]), TEMPLATE), np.arange(24) % 2
    cuts, order = plan_cuts(image, matrices, np.array([i.shape[:2] for i in images])[image], LAYOUT.size).sort_by_step()
    there = cut_chips(ResidentImages.upload(images, Uploads(torch.device("cuda"))), cuts, LAYOUT.size).cpu().numpy()
    assert np.abs(there[np.argsort(order)].astype(int) - on_device(images, image, matrices)).max() <= 1
