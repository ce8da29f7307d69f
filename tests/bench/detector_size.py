"""Find the size at which a detector has to see an image: faces lost by a quick look, and recognition after it.

    python tests/bench/detector_size.py recall [--size 384] [--doubtful 0.02]
    python tests/bench/detector_size.py recognition [--enlarged 4]

It needs ../shared. `recall` uses the development photos as they are and at half their size, mosaics of 4, 9 and 16 of
them, and each with a small photo put into it. That is the worst case: a large, certain face beside one too small to be
seen. `recognition` uses LFW-dev enlarged, so that faces fill the frame as in portraits, detected at several sizes. The
embedder is dlib-resnet-int8 for speed.
"""

import argparse
import time
from collections.abc import Callable, Iterator

import cv2
import numpy as np
from corpus import SHARED
from eight_bits import IMAGES, describe_all_pairs, describe_view2

from facepipe.imaging.alignment import cut_chip
from facepipe.imaging.geometry import Frame
from facepipe.models.protocols import Faces
from facepipe.models.zoo.registry import find_card, find_chip_layout
from facepipe.stages import Decode, Detect
from facepipe.stages import detect as stage
from facepipe.stages.chips import compute_prominence
from facepipe.types import UInt8Image

_CANVAS = 1280


def read_photos() -> list[UInt8Image]:
    decode = Decode()
    decoded = [
        decode.decode_image(path.read_bytes()).pixels for path in sorted((SHARED / "data" / "photos-dev").glob("*.jpg"))
    ]
    return [pixels for pixels in decoded if pixels is not None]


def scale_image(pixels: UInt8Image, scale: float) -> UInt8Image:
    return np.asarray(cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA), np.uint8)


def fit_image(pixels: UInt8Image, width: int, height: int) -> UInt8Image:
    small = scale_image(pixels, min(width / pixels.shape[1], height / pixels.shape[0], 1))[:height, :width]
    canvas = np.zeros((height, width, 3), np.uint8)
    canvas[: small.shape[0], : small.shape[1]] = small
    return canvas


def make_corpora() -> Iterator[tuple[str, list[UInt8Image]]]:
    """Make corpora with their names, from a fixed seed."""
    originals = read_photos()
    rng = np.random.default_rng(0)
    yield "photos", originals
    yield "photos at half size", [scale_image(pixels, 0.5) for pixels in originals]
    for k in (2, 3, 4):
        mosaics = []
        for _ in range(24):
            tiles = [fit_image(originals[n], _CANVAS // k, _CANVAS // k) for n in rng.choice(len(originals), k * k)]
            mosaics.append(np.concatenate([np.concatenate(tiles[r * k : r * k + k], 1) for r in range(k)]))
        yield f"mosaics of {k * k}", mosaics
    for share in (4, 6, 8, 10):
        yield f"photos with one of 1/{share} in it", [put_into(originals, share, rng) for _ in range(60)]


def put_into(originals: list[UInt8Image], share: int, rng: np.random.Generator) -> UInt8Image:
    large, small = (originals[n] for n in rng.choice(len(originals), 2))
    canvas = fit_image(large, _CANVAS, _CANVAS * 3 // 4)
    small = scale_image(small, _CANVAS / share / max(small.shape[:2]))
    y, x = (int(rng.integers(0, room - side)) for room, side in zip(canvas.shape, small.shape[:2], strict=False))
    canvas[y : y + small.shape[0], x : x + small.shape[1]] = small
    return canvas


def find_lost_faces(full: Faces, quick: Faces, shape: tuple[int, ...]) -> list[float]:
    """Find the faces of the full look that the quick look lost; their sides in pixels of the full look's input."""
    sides = []
    for box in full.boxes:
        low, high = np.maximum(box[:2], quick.boxes[:, :2]), np.minimum(box[2:], quick.boxes[:, 2:])
        both = np.prod(np.clip(high - low, 0, None), 1)
        either = np.prod(box[2:] - box[:2]) + np.prod(quick.boxes[:, 2:] - quick.boxes[:, :2], 1) - both
        if not len(both) or (both / either).max() < 0.4:
            sides.append(float((box[2:] - box[:2]).min() * min(1, 640 / max(shape[:2]))))
    return sides


def time_call(call: Callable[[], dict[int, Faces]]) -> tuple[dict[int, Faces], float]:
    began = time.process_time()
    return call(), time.process_time() - began


def measure_recall(size: int, doubtful: float) -> None:
    stage.DOUBTFUL = doubtful
    quick, full = Detect(device="cpu", quick_look=size), Detect(device="cpu", quick_look=0)
    for detect in (quick, full):
        detect.setup()
    for name, images in make_corpora():
        pixels = dict(enumerate(images))
        enough = quick._detect_quickly(pixels)
        a, fast = time_call(lambda p=pixels: quick.detect_faces(p))  # type: ignore[misc]
        b, slow = time_call(lambda p=pixels: full.detect_faces(p))  # type: ignore[misc]
        faces = sum(len(found.scores) for found in b.values())
        lost_sides = sorted(side for n, found in b.items() for side in find_lost_faces(found, a[n], pixels[n].shape))
        print(
            f"{name}: enough for {len(enough)} of {len(images)}, {fast / len(images) * 1e3:.1f} ms against "
            f"{slow / len(images) * 1e3:.1f} ({slow / fast:.2f} times); lost {len(lost_sides)} of {faces} faces"
            + (f", of {', '.join(f'{side:.0f}' for side in lost_sides)} px at 640" if lost_sides else ""),
            flush=True,
        )


def measure_recognition(enlarged: int) -> None:
    detects = {s: Detect(device="cpu", size=s, quick_look=0, border_below=160) for s in (640, 480, 384, 320, 256)}
    layout, embedder = find_chip_layout("dlib-resnet"), find_card("dlib-resnet-int8", "embedder").load("cpu", 1)
    paths = sorted(IMAGES.glob("*/*.jpg"))
    names = [str(path.relative_to(IMAGES).with_suffix("")) for path in paths]
    chips: dict[int, list[UInt8Image]] = {s: [] for s in detects}
    widths: dict[int, list[float]] = {s: [] for s in detects}
    for path in paths:
        pixels = np.asarray(cv2.imread(str(path), cv2.IMREAD_COLOR_RGB), np.uint8)
        pixels = np.asarray(cv2.resize(pixels, None, fx=enlarged, fy=enlarged, interpolation=cv2.INTER_CUBIC), np.uint8)
        size = np.array(pixels.shape[1::-1], np.float32)
        for s, detect in detects.items():
            found = detect.detect_faces({0: pixels})[0]
            if not len(found.scores):
                chips[s].append(np.zeros((150, 150, 3), np.uint8))
                continue
            best = int(compute_prominence(found.boxes, size).argmax())
            box, points = (v[best].astype(np.float64) for v in (found.boxes, found.landmarks))
            chips[s].append(cut_chip(layout, pixels, Frame(), box, points))
            widths[s].append(float((box[2:] - box[:2]).min() * min(1, s / size.max())))
    for s in detects:
        both = np.stack(chips[s])
        raw = embedder.embed(both) + embedder.embed(np.ascontiguousarray(both[:, :, ::-1]))
        vectors = np.asarray(raw / np.linalg.norm(raw, axis=1, keepdims=True), np.float32)
        print(f"at {s}: faces of {np.median(widths[s]):.0f} px, none in {len(paths) - len(widths[s])} images;")
        print(f"  {describe_view2(vectors, names)}; {describe_all_pairs(vectors, names)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("recall", "recognition"))
    parser.add_argument("--size", type=int, default=Detect.quick_look)
    parser.add_argument("--doubtful", type=float, default=stage.DOUBTFUL)
    parser.add_argument("--enlarged", type=int, default=4)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    if args.what == "recall":
        measure_recall(args.size, args.doubtful)
    else:
        measure_recognition(args.enlarged)


if __name__ == "__main__":
    main()
