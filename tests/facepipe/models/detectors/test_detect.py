"""The size that a detector sees: shrinking keeps places, and a quick look stands only where it leaves no doubt."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.models.detectors.retinaface_decode import (
    RetinaFaceOutputs,
    build_anchors,
    decode_confident_faces,
    decode_faces,
)
from facepipe.models.protocols import DetectionLimits, Faces
from facepipe.stages import Decode, Detect
from facepipe.stages.detect import shrink_image
from facepipe.types import UInt8Image


class Eye:
    """Finds one face at the input's middle; what it scores for an input of a longer side is `scores`."""

    stride = 8

    def __init__(self, scores: dict[int, tuple[float, ...]]):
        self.scores, self.seen = scores, list[int]()

    def detect(self, images: Sequence[UInt8Image]) -> list[Faces]:
        return [self._faces(images, 0.7)] * len(images)

    def detect_confident(
        self, images: Sequence[UInt8Image], *, reject_below: float, accept_above: float
    ) -> list[Faces | None]:
        faces = self._faces(images, reject_below)
        return [faces if len(faces.scores) and (faces.scores >= accept_above).all() else None] * len(images)

    def _faces(self, images: Sequence[UInt8Image], min_score: float) -> Faces:
        side = max(images[0].shape[:2]) if images else 0
        self.seen += [side] * len(images)
        scores = np.array([s for s in self.scores.get(side, ()) if s >= min_score], np.float32)
        box = np.array([side / 4, side / 4, side / 2, side / 2], np.float32)
        return Faces(np.tile(box, (len(scores), 1)), np.tile(box[:2], (len(scores), 5, 1)), scores)


class Blunt(Eye):
    """The same without a sense of doubt."""

    detect_confident = None  # type: ignore[assignment]


def looked(eye: Eye, **settings: float) -> dict[int, Faces]:
    stage = Detect(device="cpu", turns=False, **settings)  # type: ignore[arg-type]
    stage.__dict__["detector"] = eye
    return stage.detect_faces({0: np.zeros((640, 480, 3), np.uint8)})


@pytest.mark.parametrize(
    ("quick", "sides"),
    [
        ((0.95,), [384]),
        ((0.95, 0.93), [384]),
        ((0.95, 0.5), [384, 640]),  # the second face might be real, and show at full size
        ((0.95, 0.02), [384, 640]),
        ((0.95, 0.01), [384]),
        ((0.8,), [384, 640]),
        ((), [384, 640]),
    ],
)
def test_a_quick_look_stands_where_it_leaves_no_doubt(quick: tuple[float, ...], sides: list[int]) -> None:
    eye = Eye({384: quick, 640: (0.99, 0.98, 0.97)})
    found = looked(eye)[0]
    assert eye.seen == sides
    assert len(found.scores) == (3 if 640 in sides else len([s for s in quick if s >= 0.7]))


def test_no_quick_look_where_it_is_off_or_low_scores_mean_nothing_or_the_image_is_small() -> None:
    for eye, given_settings in (
        (Eye({640: (0.9,)}), {"quick_look": 0}),
        (Eye({384: (0.9,)}), {"size": 384}),
        (Blunt({640: (0.9,)}), {}),
    ):
        looked(eye, **given_settings)
        assert eye.seen == [given_settings.get("size", 640)]


def test_what_is_below_the_lowest_score_is_not_certain() -> None:
    eye = Eye({384: (0.95,), 640: (0.98,)})
    found = looked(eye, min_score=0.97)[0]
    assert eye.seen == [384, 640]
    assert found.scores == pytest.approx([0.98])


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.001, 0.5), st.floats(0.5, 0.99), st.floats(0.1, 0.9))
def test_doubt_is_what_suppression_would_leave_between_the_scores(
    seed: int, doubtful: float, sure: float, max_iou: float
) -> None:
    rng = np.random.default_rng(seed)
    shape = (64, 96)
    count = len(build_anchors(*shape))
    scores = np.where(rng.random(count) < 0.1, rng.random(count), 0).astype(np.float32)
    outputs = RetinaFaceOutputs(
        rng.normal(size=(count, 4)).astype(np.float32), scores, rng.normal(size=(count, 10)).astype(np.float32)
    )
    everything = decode_faces(outputs, shape, DetectionLimits(doubtful, max_iou))
    expected = len(everything.scores) > 0 and bool((everything.scores >= sure).all())
    found = decode_confident_faces(outputs, shape, reject_below=doubtful, accept_above=sure, max_iou=max_iou)
    assert (found is not None) == expected
    if found is not None:
        assert all(np.array_equal(a, b) for a, b in zip(found, everything, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.integers(40, 1500), st.integers(40, 1500), st.integers(32, 400), st.floats(0.1, 0.9), st.floats(0.1, 0.9))
def test_shrinking_keeps_places(width: int, height: int, size: int, x: float, y: float) -> None:
    """A bright square is where the scales say, to a pixel of the shrunk image."""
    side = max(width, height)
    half = max(8, side // 20)
    at = np.array([x * (width - 1), y * (height - 1)])
    low, high = np.maximum(np.ceil(at - half), 0).astype(int), np.ceil(at + half).astype(int)
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[low[1] : high[1], low[0] : high[0]] = 255
    centre = (low + np.minimum(high, (width, height)) - 1) / 2
    small, sx, sy = shrink_image(pixels, size)
    assert max(small.shape[:2]) <= size or small is pixels
    rows, columns = small[..., 0].astype(float).sum(1), small[..., 0].astype(float).sum(0)
    if rows.sum() == 0:
        return
    seen = np.array(
        [(columns * np.arange(len(columns))).sum() / columns.sum(), (rows * np.arange(len(rows))).sum() / rows.sum()]
    )
    back = (seen + 0.5) / (sx, sy) - 0.5
    assert np.abs(back - centre).max() <= 1.0 / min(sx, sy)


def test_no_face_of_the_photos_is_lost_by_a_quick_look(photos: Path) -> None:
    decode, quick, full = Decode(), Detect(device="cpu"), Detect(device="cpu", quick_look=0)
    images = [decode.decode_image(path.read_bytes()).pixels for path in sorted(photos.glob("*.jpg"))]
    pixels = {n: image for n, image in enumerate(images) if image is not None}
    a, b = quick.detect_faces(pixels), full.detect_faces(pixels)
    assert {n: len(faces.scores) for n, faces in a.items()} == {n: len(faces.scores) for n, faces in b.items()}
    moved = []
    for n, faces in a.items():
        for box, points in zip(faces.boxes, faces.landmarks, strict=True):
            nearest = np.abs(b[n].boxes - box).sum(1).argmin()
            width = (b[n].boxes[nearest, 2:] - b[n].boxes[nearest, :2]).min()
            moved.append(np.linalg.norm(points - b[n].landmarks[nearest], axis=1).mean() / width)
    assert max(moved) < 0.1
    assert 0 < np.median(moved) < 0.04


def test_a_quick_look_does_not_depend_on_the_batch(photos: Path) -> None:
    decode, detect = Decode(), Detect(device="cpu")
    pixels = {
        n: decode.decode_image((photos / name).read_bytes()).pixels
        for n, name in enumerate(("img56.jpg", "couple.jpg", "img4.jpg"))
    }
    together = detect.detect_faces(pixels)  # type: ignore[arg-type]
    for n, image in pixels.items():
        alone = detect.detect_faces({n: image})[n]  # type: ignore[dict-item]
        assert np.array_equal(alone.boxes, together[n].boxes)
        assert np.array_equal(alone.landmarks, together[n].landmarks)
