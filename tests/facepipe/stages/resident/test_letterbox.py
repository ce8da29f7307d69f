"""The detector's input made on the device is, pixel by pixel, what Detect makes on the host."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.models.runtime.transfers import Uploads
from facepipe.stages import Detect
from facepipe.stages.resident.letterbox import LetterboxPlacement, LetterboxRule, letterbox_images
from facepipe.stages.resident.sampling import ResidentImages

CPU = torch.device("cpu")


class Strided:
    stride = 32


def detect(border_below: int = 320) -> Detect:
    made = Detect(border_below=border_below)
    made.__dict__["detector"] = Strided()
    return made


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from([64, 160, 384, 640]), st.sampled_from([0, 96, 320]))
def test_every_shape_lies_as_detect_lays_it(height: int, width: int, size: int, border_below: int) -> None:
    image = noise(height, width)
    host = detect(border_below).letterbox(image, size)
    place = LetterboxRule(border_below, 32).place(height, width, size)
    if place is None:
        assert max(height, width) > 4 * size or max(height // 2, width // 2) > 2 * size
        return
    assert (place.out_height, place.out_width) == host.pixels.shape[:2]
    assert (place.left, place.top) == (host.left, host.top)
    assert (place.sx, place.sy) == pytest.approx((host.sx, host.sy), rel=1e-12)
    resident = ResidentImages.upload([noise(5, 7), image], Uploads(CPU))
    device = letterbox_images(resident.select(np.array([1])), [place])
    assert np.array_equal(device[0].numpy(), host.pixels)


def test_images_of_one_shape_are_made_together() -> None:
    """Scaled, mirrored and as they are: each as it is alone."""
    sides = [(300, 200), (290, 190), (310, 210)]
    rule = LetterboxRule(320, 32)
    by_shape: dict[tuple[int, int], list[tuple[np.ndarray, LetterboxPlacement]]] = {}
    for n, (height, width) in enumerate(sides * 2):
        place = rule.place(height, width, 640)
        assert place is not None
        by_shape.setdefault((place.out_height, place.out_width), []).append((noise(height, width, n), place))
    assert max(map(len, by_shape.values())) > 2
    for rows in by_shape.values():
        resident = ResidentImages.upload([image for image, _ in rows], Uploads(CPU))
        together = letterbox_images(resident.select(np.arange(len(rows))), [place for _, place in rows])
        for (image, _), made in zip(rows, together.numpy(), strict=True):
            assert np.array_equal(made, detect().letterbox(image, 640).pixels)


def test_images_one_behind_the_other_are_not_copied() -> None:
    images = [noise(64, 96, n) for n in range(3)]
    resident = ResidentImages.upload([noise(3, 3), *images, noise(64, 96, 9)], Uploads(CPU))
    stacked = resident.view_stack(np.array([1, 2, 3]))
    assert stacked is not None
    assert np.array_equal(stacked.numpy(), np.stack(images))
    assert stacked.data_ptr() == resident.pixels[9:].data_ptr()
    assert resident.view_stack(np.array([1, 3])) is None
    assert resident.view_stack(np.array([0, 1])) is None
