"""Compare the exact dlib mode with dlib and with the package face_recognition: differences and time on one thread.

    python tests/bench/dlib_exact.py [../shared/data]

It prints two tables for the docs, and where dlib puts its squares about the default detector's boxes.
"""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import csv
import importlib.util
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import dlib
import numpy as np
import numpy.typing as npt
from PIL import Image

from facepipe.imaging.dlib_chip import cut_dlib_chip, find_dlib_square
from facepipe.models.dlib.predictor import load_predictor
from facepipe.models.protocols import DetectionLimits
from facepipe.models.weights import find_package_file
from facepipe.models.zoo.registry import find_card
from facepipe.types import UInt8Image

Rect = tuple[int, int, int, int]
WORKING = 800  # side of the images in which dlib's detector searches


def find_weights(name: str) -> str:
    return str(find_package_file("face_recognition_models", f"models/{name}", "face-recognition-models"))


DETECTOR = dlib.get_frontal_face_detector()
PREDICTOR = dlib.shape_predictor(find_weights("shape_predictor_5_face_landmarks.dat"))
NETWORK = dlib.face_recognition_model_v1(find_weights("dlib_face_recognition_resnet_model_v1.dat"))
EMBEDDER = find_card("dlib-resnet", "embedder").load("cpu", 1)


def load_image(file: Path, side: int = 0) -> UInt8Image:
    image = np.array(Image.open(file).convert("RGB"))
    scale = side / max(image.shape[:2]) if side else 1.0
    return image if scale >= 1 else cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def detect_with_dlib(image: UInt8Image) -> list[Rect]:
    """Detect faces with dlib, one upsampling, in an image of at most WORKING pixels; boxes are scaled back."""
    scale = min(1.0, WORKING / max(image.shape[:2]))
    small = image if scale == 1 else cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    ends = [(r.left(), r.top(), r.right(), r.bottom()) for r in DETECTOR(small, 1)]
    return [(round(a / scale), round(b / scale), round(c / scale), round(d / scale)) for a, b, c, d in ends]


def time_call(run: Callable[[], Any], times: int = 3) -> tuple[Any, float]:
    """Call a function some times, and return its result and the least CPU time in ms."""
    spent = []
    for _ in range(times):
        start = time.thread_time()
        result = run()
        spent.append(1e3 * (time.thread_time() - start))
    return result, min(spent)


def embed_face(image: UInt8Image, rect: Rect) -> npt.NDArray[np.float32]:
    return EMBEDDER.embed(cut_dlib_chip(image, load_predictor().predict(image, rect))[None])[0]


def compare_face(image: UInt8Image, rect: Rect) -> list[float]:
    """Compare one face: differences (landmarks px, chip levels, vector), then ms, ours and dlib's, for the chip and for all."""
    box = dlib.rectangle(*rect)
    shape = PREDICTOR(image, box)
    points, chip = load_predictor().predict(image, rect), dlib.get_face_chip(image, shape, 150, 0.25)
    theirs = np.array([(part.x, part.y) for part in shape.parts()])
    ours, cut_ms = time_call(lambda: cut_dlib_chip(image, load_predictor().predict(image, rect)))
    _, dlib_cut_ms = time_call(lambda: dlib.get_face_chip(image, PREDICTOR(image, box), 150, 0.25))
    vector, ms = time_call(lambda: embed_face(image, rect))
    expected, dlib_ms = time_call(lambda: np.array(NETWORK.compute_face_descriptor(image, PREDICTOR(image, box))))
    differences = (points - theirs, ours.astype(int) - chip, vector - expected)
    return [*(float(np.abs(d).max()) for d in differences), cut_ms, dlib_cut_ms, ms, dlib_ms]


def turn(image: UInt8Image, rect: Rect) -> tuple[UInt8Image, Rect]:
    left, top, right, bottom = rect
    width = image.shape[1]
    return np.rot90(image).copy(), (top, width - 1 - right, bottom, width - 1 - left)


def crop_at_face(image: UInt8Image, rect: Rect) -> tuple[UInt8Image, Rect]:
    """Crop an image so that a quarter of the box is outside, left and above."""
    left, top, right, bottom = rect
    x, y = max(0, left + (right - left) // 4), max(0, top + (bottom - top) // 4)
    return image[y:, x:].copy(), (left - x, top - y, right - x, bottom - y)


def print_exactness(data: Path) -> None:
    photos = sorted((data / "photos-dev").glob("*.jpg"))
    people = sorted((data / "lfw-dev" / "images").glob("*/*.jpg"))[::40]
    print(
        "| images | n | faces | landmarks, px | chip, levels | vector | landmarks + chip, ms (dlib) | all, ms (dlib) |"
    )
    print("|---|---|---|---|---|---|---|---|")
    full = [(load_image(f), rects) for f in photos if (rects := detect_with_dlib(load_image(f)))]
    small = [(image, detect_with_dlib(image)) for image in (load_image(f, WORKING) for f in photos)]
    lfw = [(image, detect_with_dlib(image)) for image in (load_image(f) for f in people)]
    print_row("photos, full size", full)
    print_row(f"photos, {WORKING} px", small)
    print_row("photos, turned by 90 degrees", [(t[0], [t[1]]) for i, rs in full for r in rs for t in [turn(i, r)]])
    print_row("photos, face at the edge", [(t[0], [t[1]]) for i, rs in full for r in rs for t in [crop_at_face(i, r)]])
    print_row("LFW, every 40th image", lfw)


def print_row(name: str, images: list[tuple[UInt8Image, list[Rect]]]) -> None:
    figures = np.array([compare_face(image, rect) for image, rects in images for rect in rects])
    worst, ms = figures[:, :3].max(0), np.median(figures[:, 3:], 0)
    print(
        f"| {name} | {len(images)} | {len(figures)} | {worst[0]:.0f} | {worst[1]:.0f} | {worst[2]:.1e} "
        f"| {ms[0]:.1f} ({ms[1]:.1f}) | {ms[2]:.1f} ({ms[3]:.1f}) |"
    )


def import_face_recognition() -> Any:
    """Import the package; None without it. Its models' package needs pkg_resources, which setuptools no longer has."""
    if importlib.util.find_spec("face_recognition") is None:
        return None
    if importlib.util.find_spec("pkg_resources") is None:
        stand_in = types.ModuleType("pkg_resources")
        stand_in.resource_filename = lambda package, name: str(find_package_file(package, name, package))  # type: ignore[attr-defined]
        sys.modules["pkg_resources"] = stand_in
    return importlib.import_module("face_recognition")


def print_package(data: Path) -> None:
    """Compare with the package's own vectors and distances, from its own boxes."""
    library = import_face_recognition()
    if library is None:
        print("face_recognition is not installed: pip install --no-deps face_recognition")
        return
    theirs, ours = {}, {}
    for file in sorted((data / "photos-dev").glob("*.jpg")):
        image = load_image(file, WORKING)
        theirs[file.name] = library.face_encodings(image)
        ours[file.name] = [embed_face(image, rect) for rect in detect_with_dlib(image)]
        assert len(theirs[file.name]) == len(ours[file.name])
    worst = max(float(np.abs(a - b).max()) for n in theirs for a, b in zip(theirs[n], ours[n], strict=True))
    distances = list(measure_pair_distances(data, library, theirs, ours))
    other = sum((a <= 0.6) != (b <= 0.6) for a, b in distances)
    print(f"\n| photos | faces | vector | pairs | distance | pairs on the other side of 0.6 |\n{'|---' * 6}|")
    print(
        f"| {len(theirs)} | {sum(map(len, theirs.values()))} | {worst:.1e} | {len(distances)} "
        f"| {max(abs(a - b) for a, b in distances):.1e} | {other} |"
    )


def measure_pair_distances(data: Path, library: Any, theirs: Any, ours: Any) -> Iterator[tuple[float, float]]:
    """Measure the package's distance and ours, for the pairs whose photos both have a face."""
    with (data / "photos-dev" / "pairs.csv").open() as file:
        for pair in csv.DictReader(file):
            x, y = pair["file_x"], pair["file_y"]
            if theirs[x] and theirs[y]:
                expected = float(library.face_distance([theirs[x][0]], theirs[y][0])[0])
                yield expected, float(np.linalg.norm(ours[x][0].astype(np.float64) - ours[y][0]))


def print_squares(data: Path) -> None:
    """Print dlib's squares in the default detector's boxes, and how far vectors from such squares are from dlib's."""
    detector = find_card("retinaface-mnet025", "detector").load("cpu", 1, DetectionLimits(0.8, 0.4))
    files = [*(data / "photos-dev").glob("*.jpg"), *sorted((data / "lfw-dev" / "images").glob("*/*.jpg"))[::20]]
    pairs = [pair for file in sorted(files) for pair in match_boxes(detector, load_image(file, 640))]
    relative = np.array([measure_square(box, rect) for _, box, rect in pairs])
    dx, dy, side = (float(v) for v in np.median(relative, 0))
    spread = np.percentile(np.abs(relative - np.median(relative, 0)), 50, axis=0)
    far = [
        np.linalg.norm(embed_face(i, rect) - embed_face(i, find_dlib_square(box, (dx, dy, side))))
        for i, box, rect in pairs[::4]
    ]
    print(
        f"\nRetinaFace's boxes, {len(pairs)} faces: square = ({dx:.3f}, {dy:.3f}, {side:.3f}), median deviation {spread.round(3)}"
    )
    print(
        f"vectors from such squares: distance to dlib's own, median {np.median(far):.3f}, 95 % {np.percentile(far, 95):.3f}"
    )


def match_boxes(detector: Any, image: UInt8Image) -> Iterator[tuple[UInt8Image, Any, Rect]]:
    """Match the detector's boxes with the one dlib box that holds their centre."""
    height, width = image.shape[:2]
    padded = np.pad(image, ((0, -height % 32), (0, -width % 32), (0, 0)))
    rects = detect_with_dlib(image)
    for box in detector.detect(padded[None])[0].boxes:
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        around = [r for r in rects if r[0] < x < r[2] and r[1] < y < r[3]]
        if len(around) == 1:
            yield image, box, around[0]


def measure_square(box: Any, rect: Rect) -> tuple[float, float, float]:
    """Measure the centre and side of a rectangle, in the units of a card's `square`."""
    unit = float(np.sqrt((box[2] - box[0]) * (box[3] - box[1])))
    dx = (rect[0] + rect[2] + 1 - box[0] - box[2]) / 2 / unit
    dy = (rect[1] + rect[3] + 1 - box[1] - box[3]) / 2 / unit
    return float(dx), float(dy), (rect[2] + 1 - rect[0]) / unit


if __name__ == "__main__":
    cv2.setNumThreads(1)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "../shared/data")
    print_exactness(folder)
    print_package(folder)
    print_squares(folder)
