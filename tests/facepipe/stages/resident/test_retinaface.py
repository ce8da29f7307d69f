"""RetinaFace on a device: the host's post-processing, number by number, and the same faces in half precision."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from facepipe.imaging.decode import decode
from facepipe.imaging.header import read_header
from facepipe.models.detectors import retinaface_decode as decoding
from facepipe.models.detectors.retinaface_engines import OnnxRetinaFace
from facepipe.models.protocols import DetectionLimits
from facepipe.models.zoo.packaged import load_retinaface_net, read_retinaface_onnx
from facepipe.stages.resident.retinaface import PackedFaces, ResidentLimits, ResidentRetinaFace, pack_faces

SIDE = 160
PRIOR = torch.from_numpy(decoding.build_anchors(SIDE, SIDE))
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def predictions(share: float, seed: int, n: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As a network would give: a share of the anchors is above 0.7, many with equal scores."""
    rng = np.random.default_rng(seed)
    a = len(PRIOR)
    scores = np.where(
        rng.random((n, a)) < share, rng.choice([0.7, 0.75, 0.9, 0.99], (n, a)), rng.uniform(0, 0.69, (n, a))
    )
    parts = rng.normal(0, 1, (n, a, 4)), scores, rng.normal(0, 1, (n, a, 10))
    offsets, scored, points = (torch.from_numpy(part.astype(np.float32)) for part in parts)
    return offsets, scored, points


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.1])
@pytest.mark.parametrize("max_iou", [0.1, 0.4])
def test_packed_faces_are_those_of_the_host(share: float, max_iou: float) -> None:
    found = predictions(share, int(1000 * share))
    limits = ResidentLimits(0.7, max_iou, candidates=256, faces=200)
    rows = PackedFaces.from_rows(pack_faces(found, PRIOR, limits).numpy())
    assert rows.flagged.tolist() == [False] * 3
    for n, (offsets, scores, points) in enumerate(zip(*(part.numpy() for part in found), strict=True)):
        host = decoding.decode_faces(
            decoding.RetinaFaceOutputs(offsets, scores, points), (SIDE, SIDE), DetectionLimits(0.7, max_iou)
        )
        device = rows.unpack_image(n)
        assert len(host.scores) == len(device.scores)
        assert np.array_equal(host.scores, device.scores)
        assert np.allclose(host.boxes, device.boxes, rtol=1e-6, atol=1e-4)
        assert np.allclose(host.landmarks, device.landmarks, rtol=1e-6, atol=1e-4)


def test_images_with_more_than_fits_are_flagged() -> None:
    offsets, scores, points = predictions(0.05, 1)
    scores[1] = 0  # an image with nothing is none of them
    count = [int(n) for n in (scores >= 0.7).sum(1)]
    fits = PackedFaces.from_rows(
        pack_faces((offsets, scores, points), PRIOR, ResidentLimits(candidates=max(count), faces=max(count))).numpy()
    )
    assert not fits.flagged.any()
    few = PackedFaces.from_rows(
        pack_faces((offsets, scores, points), PRIOR, ResidentLimits(candidates=min(c for c in count if c) - 1)).numpy()
    )
    assert few.flagged.tolist() == [True, False, True]
    faces = min(n for n in fits.number.tolist() if n) - 1
    crowd = PackedFaces.from_rows(
        pack_faces((offsets, scores, points), PRIOR, ResidentLimits(candidates=max(count), faces=faces)).numpy()
    )
    assert crowd.flagged.tolist() == [True, False, True]
    exactly = PackedFaces.from_rows(
        pack_faces(
            (offsets, scores, points), PRIOR, ResidentLimits(candidates=max(count), faces=max(fits.number))
        ).numpy()
    )
    assert not exactly.flagged.any()


@pytest.fixture(scope="module")
def scenes(photos: Path) -> dict[str, np.ndarray]:
    """Photos with 1 to 4 faces, padded as the detector wants them; by name."""
    found = {}
    for name in ("couple", "img54", "img27", "img5", "img2", "img4", "img31", "img67"):
        data = (photos / f"{name}.jpg").read_bytes()
        pixels = decode(data, read_header(data))
        scale = min(1.0, 480 / max(pixels.shape[:2]))
        size = (round(pixels.shape[1] * scale), round(pixels.shape[0] * scale))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        h, w = pixels.shape[:2]
        found[name] = cv2.copyMakeBorder(pixels, 0, -h % 32, 0, -w % 32, cv2.BORDER_CONSTANT)
    return found


def apart(scenes: dict[str, np.ndarray], precision: str, device: str = "cpu") -> tuple[np.ndarray, np.ndarray]:
    """How far the landmarks of every face move (pixels, as seen by the detector), and the scores; the same faces."""
    host = OnnxRetinaFace(read_retinaface_onnx(), DetectionLimits(0.7, 0.4))
    finder = ResidentRetinaFace(load_retinaface_net(), "bgr", device, precision)
    moved, scores = [], []
    for image in scenes.values():
        (want,) = host.detect(image[None])
        rows = PackedFaces.from_rows(
            finder.detect(torch.from_numpy(image[None]).to(device), ResidentLimits()).cpu().numpy()
        )
        found = rows.unpack_image(0)
        assert not rows.flagged.any()
        assert len(found.scores) == len(want.scores) > 0
        distances = np.linalg.norm(want.landmarks[:, None] - found.landmarks[None], axis=3).mean(2)
        nearest = distances.argmin(1)
        assert sorted(nearest.tolist()) == list(range(len(found.scores)))
        moved += distances.min(1).tolist()
        scores += np.abs(want.scores - found.scores[nearest]).tolist()
    return np.array(moved), np.array(scores)


def test_single_precision_is_the_graph_of_the_cpu(scenes: dict[str, np.ndarray]) -> None:
    moved, scores = apart(scenes, "float32")
    assert moved.max() < 0.01
    assert scores.max() < 1e-4


@pytest.mark.parametrize(("precision", "bounds"), [("bfloat16", (0.6, 4.0, 0.15)), ("float16", (0.1, 0.5, 0.02))])
def test_half_precision_finds_the_same_faces(
    precision: str, bounds: tuple[float, float, float], scenes: dict[str, np.ndarray]
) -> None:
    """Where two anchors' scores are all but equal rounding decides which box stands for a face: that is the largest."""
    moved, scores = apart(scenes, precision)
    print(
        f"\n{precision}: landmarks move by {np.median(moved):.3f} px, at most {moved.max():.3f}; scores {scores.max():.4f}"
    )
    assert np.all(np.array([np.median(moved), moved.max(), scores.max()]) < bounds)


@cuda
@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "most"), [("float32", 0.5), ("float16", 1.0), ("bfloat16", 3.0)])
def test_a_gpu_finds_the_same_faces(precision: str, most: float, scenes: dict[str, np.ndarray]) -> None:
    assert apart(scenes, precision, "cuda")[0].max() < most


def test_what_is_found_does_not_depend_on_the_batch(scenes: dict[str, np.ndarray]) -> None:
    shape = scenes["couple"].shape
    images = [cv2.resize(image, shape[1::-1]) for image in scenes.values()][:4]
    finder = ResidentRetinaFace(load_retinaface_net(), "bgr", "cpu")
    together = finder.detect(torch.from_numpy(np.stack(images)), ResidentLimits())
    for n, image in enumerate(images):
        alone = finder.detect(torch.from_numpy(image[None]), ResidentLimits())[0]
        assert torch.equal(alone[:2], together[n, :2])
        assert torch.allclose(alone, together[n], atol=0.02)
    backwards = finder.detect(torch.from_numpy(np.stack(images[::-1])), ResidentLimits())
    assert torch.equal(backwards.flip(0), together)
