"""A detector trained for some minutes on a CPU: does the loss fall, and does it find faces of people it never saw?

WIDER FACE is not at hand. Faces of Labeled Faces in the Wild are pasted into canvases, with the default detector's
boxes and landmarks as the truth, identities split into trained and held; the annotations are written and read back as
WIDER's label.txt. What this cannot show is the accuracy on WIDER itself.

python tests/bench/detector_training.py [seconds] [shared data]
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch

from facepipe.models.checkpoint import load_state, read_state
from facepipe.models.detectors.retinaface import RetinaFaceNet, fold_batch_norms
from facepipe.models.detectors.retinaface_keys import rename_biubug6_keys
from facepipe.models.protocols import DetectionLimits, Detector
from facepipe.models.zoo.registry import find_card
from facepipe.training.detection.config import DetectionConfig, SceneAugmentConfig
from facepipe.training.detection.task import DetectionTask
from facepipe.types import Float32, UInt8Image

SIDE, CANVASES, HELD = 320, 500, 40
BORDER = 37  # 150 + 2 * 37 = 7 * 32


class Pasted(NamedTuple):
    """A crop with one face: box (4,) and landmarks (5, 2) in its pixels."""

    pixels: UInt8Image
    box: Float32
    landmarks: Float32


def faces(folders: list[Path], detector: Detector) -> list[Pasted]:
    """One image of each identity, where the detector sees one face."""
    found = []
    for folder in folders:
        pixels = cv2.imread(str(min(folder.iterdir())), cv2.IMREAD_COLOR_RGB)
        bordered = cv2.copyMakeBorder(pixels, BORDER, BORDER, BORDER, BORDER, cv2.BORDER_REFLECT_101)
        (seen,) = detector.detect(np.asarray(bordered)[None])
        centre = (seen.boxes[:, :2] + seen.boxes[:, 2:]) / 2 - BORDER
        inside = np.flatnonzero(((centre > 0) & (centre < 150)).all(1))
        if len(inside) == 1:
            found.append(Pasted(np.asarray(pixels), seen.boxes[inside[0]] - BORDER, seen.landmarks[inside[0]] - BORDER))
    return found


def canvas(pool: list[Pasted], rng: np.random.Generator) -> tuple[UInt8Image, list[str]]:
    """One to five faces in cells of a 3x3 grid over a blurred ground, beside patches without faces; WIDER's lines."""
    ground = cv2.resize(pool[rng.integers(len(pool))].pixels, (SIDE, SIDE))
    image, lines = cv2.GaussianBlur(ground, (0, 0), 15), []
    cell = SIDE // 3
    for n, place in enumerate(rng.permutation(9)[: rng.integers(4, 9)]):
        face = pool[rng.integers(len(pool))]
        side = int(rng.integers(40, cell))
        x, y = (int(v) * cell + int(rng.integers(cell - side + 1)) for v in (place % 3, place // 3))
        if n > 0 and rng.random() < 0.5:
            patch = face.pixels[-40:, :40]
            image[y : y + side, x : x + side] = cv2.resize(patch, (side, side))
            continue
        image[y : y + side, x : x + side] = cv2.resize(face.pixels, (side, side), interpolation=cv2.INTER_AREA)
        scale, shift = side / 150, np.array([x, y])
        box, points = face.box.reshape(2, 2) * scale + shift, face.landmarks * scale + shift
        numbers = [*box[0], *(box[1] - box[0]), *np.hstack([points, np.zeros((5, 1))]).ravel(), 0.5]
        lines.append(" ".join(f"{v:.3f}" for v in numbers))
    return image, lines


def written(root: Path, pool: list[Pasted], count: int, seed: int) -> str:
    """A folder in WIDER's form; the path of its label.txt."""
    rng, lines = np.random.default_rng(seed), []
    (root / "images").mkdir(parents=True)
    for n in range(count):
        image, faces_of_it = canvas(pool, rng)
        cv2.imwrite(str(root / "images" / f"{n}.jpg"), image[..., ::-1])
        lines += [f"# {n}.jpg", *faces_of_it]
    (root / "label.txt").write_text("\n".join(lines) + "\n")
    return str(root / "label.txt")


def train(task: DetectionTask, seconds: float, lr: float) -> Iterator[tuple[int, float]]:
    """Losses of the steps that fit into the time; the rate falls linearly with it."""
    optimiser = torch.optim.AdamW(task.net.parameters(), lr, weight_decay=5e-4)
    task.net.train()
    began, step = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds:
        optimiser.param_groups[0]["lr"] = lr * (1 - spent / seconds)
        loss, _ = task.compute_loss(task.make_batch(step))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(task.net.parameters(), 10.0)
        optimiser.step()
        yield step, loss.item()
        step += 1


def reported(name: str, task: DetectionTask, seconds: float, lr: float) -> None:
    before = task.validate(task.net.eval())
    losses = [loss for _, loss in train(task, seconds, lr)]
    after = task.validate(task.net.eval())
    tenth = max(1, len(losses) // 10)
    curve = ", ".join(f"{np.mean(losses[at : at + tenth]):.2f}" for at in range(0, len(losses), tenth))
    print(f"{name}: {len(losses)} steps of {task.config.batch} in {seconds:.0f} s; loss by tenths {curve}")
    print(f"  AP {before['score']:.3f} -> {after['score']:.3f}, recall {before['recall']:.3f} -> {after['recall']:.3f}")


def checkpoint_net(shared: Path) -> RetinaFaceNet:
    net, file = RetinaFaceNet(norms=True), shared / "weights" / "retinaface-mobilenet025-rgb.pth"
    load_state(net, rename_biubug6_keys(read_state(file)), str(file))
    return net


def without_heads(net: RetinaFaceNet) -> RetinaFaceNet:
    """With heads that start at random."""
    for heads in (net.class_head, net.box_head, net.landmark_head):
        for head in heads:
            head.reset_parameters()  # type: ignore[operator]
    return net


def main(seconds: float, shared: Path) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    torch.manual_seed(0)
    people = sorted((shared / "data" / "lfw-dev" / "images").iterdir())
    detector = find_card("retinaface-mnet025", "detector").load("cpu", 1, DetectionLimits(0.3, 0.4))
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        trained, held = faces(people[:700], detector), faces(people[-150:], detector)
        label = written(Path(folder) / "train", trained, CANVASES, 0)
        held_label = written(Path(folder) / "held", held, HELD, 1)
        config = DetectionConfig(
            annotations=label,
            held=held_label,
            size=192,
            batch=16,
            threads=1,
            augment=SceneAugmentConfig(scales=(0.45, 0.6, 0.8)),
        )
        print(
            f"{len(trained)} faces to train on, {len(held)} of other people held; {time.perf_counter() - began:.0f} s"
        )
        whole = DetectionTask(fold_batch_norms(checkpoint_net(shared)), config, channels="rgb")
        print("the public checkpoint as it is:", whole.validate(whole.net))
        heads = DetectionTask(without_heads(checkpoint_net(shared)), config, channels="rgb")
        reported("public checkpoint, new heads", heads, seconds / 3, 1e-3)
        blank = DetectionTask(RetinaFaceNet(norms=True), config)
        reported("from random weights", blank, seconds * 2 / 3, 2e-3)


if __name__ == "__main__":
    main(float((sys.argv[1:] or ["300"])[0]), Path((sys.argv[2:] or ["../shared"])[0]))
