"""Training of a detector: the task's batches, what becomes of bad images, and that it learns; average precision."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from facepipe.config import build
from facepipe.errors import ConfigError, SourceError
from facepipe.models.detectors.retinaface import RetinaFaceNet
from facepipe.models.detectors.retinaface_decode import build_anchors
from facepipe.training.detection.average_precision import compute_average_precision, mark_correct
from facepipe.training.detection.config import DetectionConfig
from facepipe.training.detection.task import DetectionTask


def test_average_precision_by_hand() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5], np.float32)
    right = np.array([True, False, True, False, True])
    # Precision at the three hits: 1, 2/3, 3/5; of four true boxes one is never found.
    assert np.isclose(compute_average_precision(scores, right, 4), (1 + 2 / 3 + 3 / 5) / 4)
    order = [3, 0, 4, 2, 1]
    assert np.isclose(compute_average_precision(scores[order], right[order], 4), (1 + 2 / 3 + 3 / 5) / 4)
    assert compute_average_precision(scores, np.ones(5, bool), 5) == 1
    assert compute_average_precision(np.empty(0, np.float32), np.empty(0, bool), 3) == 0
    # The envelope: a later, better precision lifts what stands before it.
    assert np.isclose(compute_average_precision(scores, np.array([False, True, True, True, True]), 4), 4 / 5)


def test_a_face_is_found_once() -> None:
    truth = np.array([[0, 0, 10, 10], [20, 0, 30, 10]], np.float32)
    found = np.array([[0, 0, 10, 9], [0, 0, 10, 10], [20, 0, 30, 4], [21, 0, 30, 10]], np.float32)
    assert mark_correct(found, truth).tolist() == [True, False, False, True]
    assert mark_correct(found, truth[:0]).tolist() == [False] * 4
    assert mark_correct(found[:0], truth).tolist() == []


def face_like(rng: np.random.Generator) -> np.ndarray:
    """A disc with dark eyes and a mouth on a noisy ground: enough to tell a face from the ground."""
    canvas = np.full((128, 128, 3), rng.integers(60, 200), np.uint8)
    return np.asarray(cv2.add(canvas, rng.integers(0, 40, canvas.shape, np.uint8)), np.uint8)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten small drawings with one or two faces; the annotations name two more, one missing and one damaged."""
    root, rng, lines = tmp_path_factory.mktemp("wider"), np.random.default_rng(5), []
    (root / "images").mkdir()
    for n in range(10):
        image = face_like(rng)
        lines.append(f"# {n}.png")
        for _ in range(n % 2 + 1):
            r = int(rng.integers(12, 28))
            x, y = (int(v) for v in rng.integers(r, 128 - r, 2))
            cv2.circle(image, (x, y), r, (230, 180, 160), -1)
            points = [
                (x - r // 3, y - r // 4),
                (x + r // 3, y - r // 4),
                (x, y),
                (x - r // 3, y + r // 2),
                (x + r // 3, y + r // 2),
            ]
            for point in points:
                cv2.circle(image, point, max(1, r // 8), (20, 20, 20), -1)
            lines.append(" ".join(map(str, (x - r, y - r, 2 * r, 2 * r, *(v for p in points for v in (*p, 0.0)), 0.5))))
        cv2.imwrite(str(root / "images" / f"{n}.png"), image[..., ::-1])
    (root / "images" / "broken.png").write_bytes(b"no picture")
    lines += ["# missing.png", "1 2 30 40", "# broken.png", "1 2 30 40"]
    (root / "label.txt").write_text("\n".join(lines) + "\n")
    return root


def config(corpus: Path, **more: object) -> DetectionConfig:
    label = str(corpus / "label.txt")
    return build(DetectionConfig, {"annotations": label, "held": label, "size": 96, "batch": 4, "threads": 2, **more})


def test_batches_are_functions_of_the_step(corpus: Path) -> None:
    task = DetectionTask(RetinaFaceNet(norms=True), config(corpus), seed=3)
    again = DetectionTask(torch.nn.Identity(), config(corpus), seed=3)
    for step in (0, 5):
        for a, b in zip(task.make_batch(step), again.make_batch(step), strict=True):
            assert torch.equal(a, b)
    whole = task.make_batch(2)
    halves = [task.make_batch(2, rank, 2) for rank in (0, 1)]
    assert torch.equal(whole[0], torch.cat([half[0] for half in halves]))
    assert not torch.equal(whole[0], task.make_batch(3)[0])
    assert not torch.equal(whole[0], DetectionTask(task.net, config(corpus), seed=4).make_batch(2)[0])
    images, targets, valid, _ = whole
    assert images.shape == (4, 96, 96, 3)
    assert images.dtype == torch.uint8
    assert targets.shape[:2] == valid.shape
    assert valid.any(1).all()
    assert (targets[valid][:, :4] >= 0).all()
    assert (targets[valid][:, :4] <= 96).all()


def test_missing_and_broken_images_are_counted(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = DetectionTask(RetinaFaceNet(norms=True), config(corpus), seed=0)
    assert task.notes == ("1 of 12 annotated images are missing",)
    assert task.steps_per_epoch == 3  # eleven images, of which one cannot be decoded
    assert "missing.png is missing" in caplog.text
    passed = sum(int(task.make_batch(step)[3].sum()) for step in range(3))
    assert passed >= 1
    assert "broken.png is skipped: no known image format" in caplog.text


def test_no_image_at_all(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="none of the 12 images"):
        DetectionTask(torch.nn.Identity(), config(corpus, images=str(tmp_path)))
    (tmp_path / "missing.png").write_bytes(b"no picture")
    with pytest.raises(SourceError, match="can be decoded"):
        DetectionTask(torch.nn.Identity(), config(corpus, images=str(tmp_path), batch=1)).make_batch(0)


def test_too_few_images_for_a_batch(corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"detection\.batch=12, but .* has only 11 images with faces"):
        DetectionTask(torch.nn.Identity(), config(corpus, batch=12))


def test_colours_enter_in_the_order_the_network_takes_them(corpus: Path) -> None:
    seen: list[torch.Tensor] = []

    class Spy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            seen.append(x)
            a = len(build_anchors(96, 96))
            return torch.zeros(len(x), a, 4), torch.zeros(len(x), a, 2), torch.zeros(len(x), a, 10)

    inputs = DetectionTask(Spy(), config(corpus)).make_batch(0)
    for channels in ("rgb", "bgr"):
        DetectionTask(Spy(), config(corpus), channels="rgb" if channels == "rgb" else "bgr").compute_loss(inputs)
    mean = torch.tensor([104.0, 117, 123]).view(1, 3, 1, 1)
    assert torch.equal((seen[0] + mean).flip(1), seen[1] + mean)
    assert torch.equal((seen[0] + mean).permute(0, 2, 3, 1).byte(), inputs[0])


def test_sizes_are_multiples_of_the_coarsest_stride(corpus: Path) -> None:
    with pytest.raises(ConfigError, match="multiple of 32"):
        config(corpus, size=100)


def test_training_learns_to_find_the_drawn_faces(corpus: Path) -> None:
    torch.manual_seed(0)
    task = DetectionTask(RetinaFaceNet(norms=True), config(corpus, augment={"distort": False}), seed=0)
    before = task.validate(task.net.eval())
    optimiser = torch.optim.AdamW(task.net.parameters(), 3e-3)
    task.net.train()
    losses = []
    for step in range(60):
        loss, figures = task.compute_loss(task.make_batch(step))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(loss.item())
    assert set(figures) == {"box", "score", "landmarks", "positives", "passed_over"}
    after = task.validate(task.net.eval())
    print("\nloss", np.mean(losses[:5]), np.mean(losses[-5:]), "before", before, "after", after)
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    assert before["score"] < 0.3
    assert after["score"] > 0.5
    assert after["images"] == 10
    assert after["images_unreadable"] == 2
    assert after["faces"] == 15
