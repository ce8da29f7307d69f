"""Matching of anchors and the multi-task loss, against loops over one anchor at a time."""

import numpy as np
import pytest
import torch

from facepipe.models.detectors.retinaface_decode import RetinaFaceOutputs, build_anchors, decode_faces
from facepipe.models.protocols import DetectionLimits
from facepipe.training.detection.config import MultiTaskConfig
from facepipe.training.detection.loss import MultiTaskLoss
from facepipe.training.detection.matching import encode_boxes, encode_points, match_anchors


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0) * max(h, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def matched_by_loops(boxes: np.ndarray, priors: np.ndarray, positive: float, ignore: float) -> list[int]:
    sides = [np.concatenate([p[:2] - p[2:] / 2, p[:2] + p[2:] / 2]) for p in priors]
    table = [[overlap(b, s) for s in sides] for b in boxes]
    assigned = []
    for a in range(len(priors)):
        column = [row[a] for row in table]
        best = int(np.argmax(column)) if column else -1
        assigned.append(best if column and column[best] >= positive else -1)
    for f, row in enumerate(table):
        if max(row) >= ignore:
            assigned[int(np.argmax(row))] = f
    return assigned


def random_faces(rng: np.random.Generator, count: int, side: float = 128.0) -> np.ndarray:
    """(count, 15) float64; the first is larger than any anchor's reach, some have no landmarks."""
    low = rng.uniform(0, side * 0.8, (count, 2))
    size = rng.uniform(3, 60, (count, 1)) * rng.uniform(0.7, 1.4, (count, 2))
    points = low[:, None] + rng.uniform(0, 1, (count, 5, 2)) * size[:, None]
    mark = rng.choice([1, -1], (count, 1), p=[0.7, 0.3])
    return np.concatenate([low, low + size, points.reshape(-1, 10) * (mark > 0), mark], 1)


def test_matching_equals_loops() -> None:
    rng = np.random.default_rng(0)
    priors = build_anchors(128, 128).astype(np.float64)
    ignored = 0
    for count in (1, 2, 7, 25, 25):
        boxes = random_faces(rng, count)[:, :4]
        expected = matched_by_loops(boxes, priors, 0.35, 0.2)
        assert match_anchors(torch.from_numpy(boxes), torch.from_numpy(priors), 0.35, 0.2).tolist() == expected
        ignored += count - len({f for f in expected if f >= 0})
    assert ignored > 0  # boxes of 3 pixels reach no anchor
    assert match_anchors(torch.empty(0, 4), torch.from_numpy(priors), 0.35, 0.2).tolist() == [-1] * len(priors)


def test_of_two_faces_on_one_anchor_the_later_has_it() -> None:
    priors = torch.tensor([[50.0, 50, 32, 32]])
    boxes = torch.tensor([[34.0, 34, 66, 66], [40.0, 40, 60, 60]])
    assert match_anchors(boxes, priors, 0.35, 0.2).tolist() == [1]
    assert match_anchors(boxes, priors, 0.35, 0.5).tolist() == [0]


def test_encoding_is_what_decoding_undoes() -> None:
    rng = np.random.default_rng(1)
    priors = build_anchors(96, 160)
    rows = rng.choice(len(priors), 6, replace=False)
    faces = random_faces(rng, 6).astype(np.float32)
    at = torch.from_numpy(priors[rows])
    offsets, points = np.zeros((len(priors), 4), np.float32), np.zeros((len(priors), 10), np.float32)
    offsets[rows] = encode_boxes(torch.from_numpy(faces[:, :4]), at).numpy()
    points[rows] = encode_points(torch.from_numpy(faces[:, 4:14]), at).numpy()
    scores = np.zeros(len(priors), np.float32)
    scores[rows] = np.linspace(0.9, 0.6, 6)
    found = decode_faces(RetinaFaceOutputs(offsets, scores, points), (96, 160), DetectionLimits(0.5, 1.0))
    assert np.allclose(found.boxes, faces[:, :4], atol=1e-3)
    assert np.allclose(found.landmarks.reshape(-1, 10), faces[:, 4:14], atol=1e-3)


def smooth_l1(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def loss_by_loops(
    predictions: list[np.ndarray], faces: list[np.ndarray], priors: np.ndarray, c: MultiTaskConfig
) -> tuple[float, float, float]:
    """(box, score, landmarks), written down from the paper and the reference, one anchor at a time."""
    box = score = points = 0.0
    positives = marked = 0
    for offsets, logits, landmarks, truth in zip(*predictions, faces, strict=True):
        assigned = matched_by_loops(truth[:, :4], priors, c.positive, c.ignore)
        hard = []
        for a, f in enumerate(assigned):
            cost = [np.log(np.exp(logits[a]).sum()) - logits[a][k] for k in (0, 1)]
            if f < 0:
                hard.append(cost[0])
                continue
            positives += 1
            score += cost[1]
            x1, y1, x2, y2 = truth[f, :4]
            px, py, pw, ph = priors[a]
            wanted = [
                ((x1 + x2) / 2 - px) / (0.1 * pw),
                ((y1 + y2) / 2 - py) / (0.1 * ph),
                np.log((x2 - x1) / pw) / 0.2,
                np.log((y2 - y1) / ph) / 0.2,
            ]
            box += sum(smooth_l1(o - w) for o, w in zip(offsets[a], wanted, strict=True))
            if truth[f, 14] > 0:
                marked += 1
                for k in range(5):
                    x, y = truth[f, 4 + 2 * k : 6 + 2 * k]
                    points += smooth_l1(landmarks[a][2 * k] - (x - px) / (0.1 * pw))
                    points += smooth_l1(landmarks[a][2 * k + 1] - (y - py) / (0.1 * ph))
        keep = min(int(c.negatives * sum(f >= 0 for f in assigned)), len(priors) - 1)
        score += sum(sorted(hard, reverse=True)[:keep])
    n = max(positives, 1)
    return box / n, score / n, points / max(marked, 1)


def batch_of(
    rng: np.random.Generator, counts: list[int], priors: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    faces = [random_faces(rng, n) for n in counts]
    predictions = [rng.normal(0, 2, (len(counts), len(priors), n)) for n in (4, 2, 10)]
    return predictions, faces


def padded(faces: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    targets = np.full((len(faces), max(map(len, faces)) + 2, 15), np.nan)  # padding must not be read
    valid = np.zeros(targets.shape[:2], bool)
    for n, found in enumerate(faces):
        targets[n, : len(found)], valid[n, : len(found)] = found, True
    return torch.from_numpy(targets), torch.from_numpy(valid)


@pytest.mark.parametrize("negatives", [7.0, 0.5, 10_000.0])
def test_loss_equals_loops(negatives: float) -> None:
    priors = build_anchors(128, 128).astype(np.float64)
    predictions, faces = batch_of(np.random.default_rng(2), [3, 0, 9], priors)
    config = MultiTaskConfig(negatives=negatives)
    objective = MultiTaskLoss(config)
    box, score, landmarks = (torch.from_numpy(p) for p in predictions)
    total = objective((box, score, landmarks), *padded(faces), torch.from_numpy(priors))
    expected = loss_by_loops(predictions, faces, priors, config)
    found = [objective.figures[name].item() for name in ("box", "score", "landmarks")]
    assert np.allclose(found, expected, rtol=1e-9)
    assert np.isclose(total.item(), 2 * expected[0] + expected[1] + expected[2])
    assert not list(objective.parameters())


def test_loss_of_a_batch_without_faces() -> None:
    priors = torch.from_numpy(build_anchors(64, 64))
    predictions = tuple(torch.randn(2, len(priors), n, requires_grad=True) for n in (4, 2, 10))
    total = MultiTaskLoss(MultiTaskConfig())(
        (predictions[0], predictions[1], predictions[2]),
        torch.zeros(2, 0, 15),
        torch.zeros(2, 0, dtype=torch.bool),
        priors,
    )
    total.backward()
    assert total.item() == 0


def test_gradients() -> None:
    priors = torch.from_numpy(build_anchors(16, 16).astype(np.float64))
    rng = np.random.default_rng(3)
    faces = [random_faces(rng, 2, 16.0), random_faces(rng, 1, 16.0)]
    targets, valid = padded(faces)
    start = [torch.from_numpy(rng.normal(0, 1, (2, len(priors), n))).requires_grad_() for n in (4, 2, 10)]
    objective = MultiTaskLoss(MultiTaskConfig(negatives=2.0))

    def loss(*predictions: torch.Tensor) -> torch.Tensor:
        return objective((predictions[0], predictions[1], predictions[2]), targets, valid, priors)

    assert torch.autograd.gradcheck(loss, start)


def test_half_precision_is_summed_in_single() -> None:
    priors = build_anchors(64, 64)
    predictions, faces = batch_of(np.random.default_rng(4), [3], priors)
    box, score, landmarks = (torch.from_numpy(p).bfloat16() for p in predictions)
    targets, valid = padded(faces)
    total = MultiTaskLoss(MultiTaskConfig())((box, score, landmarks), targets.float(), valid, torch.from_numpy(priors))
    assert total.dtype == torch.float32
    assert torch.isfinite(total)
