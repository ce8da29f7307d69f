"""What detectors are trained on: annotations, and augmentation that moves pixels, boxes and landmarks alike."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from facepipe.errors import SourceError
from facepipe.training.detection import augment as augmentation
from facepipe.training.detection.annotations import AnnotatedFaces, read_annotations
from facepipe.training.detection.augment import Scene
from facepipe.training.detection.config import SceneAugmentConfig

LABELS = """\
# 0--Parade/a.jpg
10 20 30 40 15.5 30 0.0 25 30 0.0 20 40 1.0 16 50 0.0 24 50 0.0 0.82
50 60 5 6 -1 -1 -1 -1 -1 -1 -1 -1 -1 -1 -1 -1 -1 -1 -1 0.3
# 1--Other/b c.jpg
7 8 9 10
7 8 0 10
"""
OFFICIAL = """\
0--Parade/a.jpg
2
10 20 30 40 0 0 0 0 0 0
50 60 5 6 0 0 0 1 0 0
1--Other/none.jpg
0
0 0 0 0 0 0 0 0 0 0
1--Other/b c.jpg
1
7 8 9 10 0 0 0 0 0 0
"""


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_annotations_with_landmarks(tmp_path: Path) -> None:
    read = read_annotations(written(tmp_path / "label.txt", LABELS))
    assert read.paths == ["0--Parade/a.jpg", "1--Other/b c.jpg"]
    assert read.offsets.tolist() == [0, 2, 3]
    assert read.get_faces(0).boxes.tolist() == [[10, 20, 40, 60], [50, 60, 55, 66]]
    assert read.get_faces(0).landmarks[0].tolist() == [[15.5, 30], [25, 30], [20, 40], [16, 50], [24, 50]]
    assert np.isnan(read.get_faces(0).landmarks[1]).all()
    assert np.isnan(read.get_faces(1).landmarks).all()
    assert read.dropped == 1


def test_official_annotations(tmp_path: Path) -> None:
    read = read_annotations(written(tmp_path / "wider_face_train_bbx_gt.txt", OFFICIAL))
    assert read.paths == ["0--Parade/a.jpg", "1--Other/none.jpg", "1--Other/b c.jpg"]
    assert read.offsets.tolist() == [0, 1, 1, 2]
    assert read.boxes.tolist() == [[10, 20, 40, 60], [7, 8, 16, 18]]
    assert np.isnan(read.landmarks).all()
    assert read.dropped == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# a.jpg\n1 2 3 4\n1 2 3\n", "line 3: 3 numbers; a face has 4 or 19 or 20"),
        ("# a.jpg\n1 2 x 4\n", "line 2: could not convert"),
        ("# a.jpg\n1 2 nan 4\n", "line 2: a number is not finite"),
        ("#\n1 2 3 4\n", "line 1: '' is not a path"),
        ("# ../../etc/passwd\n", "line 1: .* is not a path below"),
        ("# /a.jpg\n", "line 1: .* is not a path below"),
        ("a.jpg\none\n", "line 2: 'one' is not a number of faces"),
        ("a.jpg\n2\n1 2 3 4 0 0 0 0 0 0\n", "line 3: the file ends before"),
        ("a.jpg\n1\n1 2 3 4 0 0 0 0 0 0\n1 2 3 4 0 0 0 0 0 0\n", "line 4: the image has more faces"),
        ("a.jpg\n1\nb.jpg\n", "line 3: could not convert"),
        ("\n\n", "line 2: no image is annotated"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        read_annotations(written(tmp_path / "a.txt", text))


def test_missing_annotations() -> None:
    with pytest.raises(SourceError, match="cannot read the annotations"):
        read_annotations("/nowhere/label.txt")


def drawn_scene(w: int = 200, h: int = 120) -> Scene:
    """Three faces; at the landmarks of the first two pixels have colours of their own."""
    pixels = np.random.default_rng(0).integers(40, 120, (h, w, 3), np.uint8)
    boxes = np.array([[20, 20, 60, 70], [100, 30, 150, 90], [170, 90, 199, 119]], np.float32)
    points = np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]], np.float32)
    landmarks = boxes[:, None, :2] + points * (boxes[:, None, 2:] - boxes[:, None, :2])
    landmarks = (np.floor(landmarks) + 0.5).astype(
        np.float32
    )  # pixel centres, in coordinates that run over pixels' edges
    landmarks[2] = np.nan
    for n in range(2):
        for k, (x, y) in enumerate(np.floor(landmarks[n]).astype(int)):
            pixels[y, x] = marker(n, k)
    return Scene(pixels, AnnotatedFaces(boxes, landmarks))


def marker(n: int, k: int) -> list[int]:
    return [255, 200 + 10 * n, 150 + 20 * k]


def test_mirroring_moves_pixels_and_landmarks_alike() -> None:
    scene = drawn_scene()
    turned = augmentation.mirror_scene(scene)
    for n in range(2):
        for k, other in enumerate((1, 0, 2, 4, 3)):
            x, y = np.floor(turned.faces.landmarks[n, k]).astype(int)
            assert turned.pixels[y, x].tolist() == marker(n, other)
        left, right = turned.faces.landmarks[n, :2, 0]
        assert left < right
    assert turned.faces.boxes[0].tolist() == [140, 20, 180, 70]
    assert np.isnan(turned.faces.landmarks[2]).all()
    again = augmentation.mirror_scene(turned)
    assert np.array_equal(again.pixels, scene.pixels)
    assert np.array_equal(again.faces.boxes, scene.faces.boxes)
    assert np.array_equal(again.faces.landmarks, scene.faces.landmarks, equal_nan=True)


def test_crops_keep_the_faces_whose_centre_they_hold() -> None:
    scene, seen = drawn_scene(), set()
    for seed in range(200):
        cut = augmentation.crop_scene(scene, SceneAugmentConfig(), np.random.default_rng(seed))
        h, w = cut.pixels.shape[:2]
        assert h == w
        assert h in {36, 54, 72, 96, 120}
        seen.add(h)
        corner = corner_of(cut.pixels, scene.pixels)
        kept = [
            n
            for n, (x1, y1, x2, y2) in enumerate(scene.faces.boxes)
            if 0 < (x1 + x2) / 2 - corner[0] < w and 0 < (y1 + y2) / 2 - corner[1] < h
        ]
        assert len(kept) == len(cut.faces.boxes) > 0
        whole = False
        for n, box, points in zip(kept, cut.faces.boxes, cut.faces.landmarks, strict=True):
            moved = scene.faces.boxes[n] - np.tile(corner, 2)
            assert box.tolist() == np.clip(moved, 0, w).tolist()
            whole |= np.array_equal(box, moved)
            expected = np.clip(scene.faces.landmarks[n] - corner, 0, w)
            assert np.array_equal(points, expected, equal_nan=True)
        assert whole
    assert seen >= {72, 96, 120}


def corner_of(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    found = cv2.matchTemplate(whole, part, cv2.TM_SQDIFF)
    return np.array(np.unravel_index(found.argmin(), found.shape)[::-1])


def test_a_scene_without_a_fitting_crop_is_padded_whole() -> None:
    pixels = np.full((60, 100, 3), 200, np.uint8)
    scene = Scene(
        pixels, AnnotatedFaces(np.array([[0, 0, 100, 60]], np.float32), np.full((1, 5, 2), np.nan, np.float32))
    )
    config = SceneAugmentConfig(mirror=0.0, distort=False)
    found = augmentation.augment_scene(scene, 64, (1.0, 2.0, 3.0), config, np.random.default_rng(0))
    assert found.pixels.shape == (64, 64, 3)
    assert np.allclose(found.faces.boxes, [[0, 0, 64, 38.4]])
    assert found.pixels[-1, 0].tolist() == [1, 2, 3]
    assert found.pixels[5, 5].tolist() == [200, 200, 200]


def test_distortion_is_bounded_and_repeatable() -> None:
    pixels = drawn_scene().pixels
    found = [augmentation.distort_colours(pixels, np.random.default_rng(seed)) for seed in range(30)]
    assert all(
        np.array_equal(f, augmentation.distort_colours(pixels, np.random.default_rng(n))) for n, f in enumerate(found)
    )
    changed = [np.abs(f.astype(int) - pixels).mean() for f in found]
    assert np.mean(np.array(changed) > 3) > 0.6
    assert max(changed) < 120
    assert np.array_equal(pixels, drawn_scene().pixels)
