"""embed against a bare two-process loop over the same models, and against face_recognition, in one run.

    python tests/bench/throughput.py [--times 20] [--rounds 3] [--variants "local; local detect.quick_look=0; ray"]

Needs ../shared. A variant is a runner and settings of embed. Steady state: from the moment every worker has delivered two blocks to the end; start-up is given
apart. face_recognition's calls (HOG detector, landmarks, encoding; two processes) run through dlib-bin, on each photo once.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from corpus import SHARED, repeated_photos
from PIL import Image

from facepipe.config import build, parse_settings
from pipelines.embed import EmbedConfig, EmbedSummary, run

WORKERS = 2


def facepipe_rate(photos: Path, variant: str) -> tuple[float, float, EmbedSummary]:
    """(images/s in the steady state, seconds from the call to the first record, summary)."""
    seen: list[tuple[float, int]] = []
    began = time.perf_counter()

    def note(summary: EmbedSummary) -> None:
        seen.append((time.perf_counter(), summary.images))

    runner, *settings = variant.split()
    fixed = {"source": {"uri": str(photos)}, "run": {"runner": runner, "workers": WORKERS, "block_largest": 32}}
    with tempfile.TemporaryDirectory() as folder:
        config = build(EmbedConfig, parse_settings(settings), fixed)
        summary = run(config, f"{folder}/gallery", note)
    start, done = seen[2 * WORKERS]
    end, images = seen[-1]
    return (images - done) / (end - start), seen[0][0] - began, summary


def bare_rate(photos: Path) -> float:
    command = [sys.executable, str(SHARED / "tools" / "bare_loop.py"), str(photos), "--flip", "--repeat", "1"]
    out = subprocess.run([*command, "--procs", str(WORKERS)], capture_output=True, text=True, check=True).stdout
    print("  bare loop:", out.strip())
    found = re.search(r"([\d.]+) images/s", out)
    assert found
    return float(found[1])


def dlib_models() -> None:
    global detect, shape, encode
    import dlib

    from facepipe.models.weights import find_package_file

    def model(name: str) -> str:
        return str(find_package_file("face_recognition_models", f"models/{name}", "face-recognition-models"))

    detect = dlib.get_frontal_face_detector()
    shape = dlib.shape_predictor(model("shape_predictor_5_face_landmarks.dat"))
    encode = dlib.face_recognition_model_v1(model("dlib_face_recognition_resnet_model_v1.dat"))


def dlib_one(path: str) -> int:
    image = np.array(Image.open(path).convert("RGB"))  # face_recognition.load_image_file
    boxes = detect(image, 1)  # face_recognition's default: one upsampling
    return len([encode.compute_face_descriptor(image, shape(image, box), 1) for box in boxes])


def dlib_rate(photos: list[str]) -> float:
    with ProcessPoolExecutor(WORKERS, initializer=dlib_models) as pool:
        list(pool.map(dlib_one, photos[:WORKERS]))
        began = time.perf_counter()
        faces = sum(pool.map(dlib_one, photos))
        seconds = time.perf_counter() - began
    print(f"  face_recognition's calls: {len(photos)} images, {faces} faces, {len(photos) / seconds:.2f} images/s")
    return len(photos) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--variants", default="local; local detect.quick_look=0; local embed.model=dlib-resnet-int8; ray"
    )
    args = parser.parse_args()
    ratios: dict[str, list[tuple[float, ...]]] = {variant.strip(): [] for variant in args.variants.split(";")}
    with tempfile.TemporaryDirectory() as folder:
        photos = repeated_photos(Path(folder) / "photos", args.times)
        once = sorted(str(path) for path in photos.glob("000-*"))
        for n in range(args.rounds):
            print(f"round {n + 1}")
            dlib = dlib_rate(once)
            for variant, found in ratios.items():
                bare = bare_rate(photos)
                rate, first, summary = facepipe_rate(photos, variant)
                stages = "  ".join(f"{k} {v / summary.images * 1e3:.1f}" for k, v in summary.stage_seconds.items())
                print(f"  facepipe {variant}: {rate:.1f} images/s, {summary.faces} faces in {summary.images} images, ")
                print(f"    first record after {first:.1f} s; ms per image: {stages}", flush=True)
                found.append((rate, rate / bare, rate / dlib, first))
    for variant, found in ratios.items():
        for what, values in zip(
            ("images/s", "of the bare loop", "of face_recognition", "s to the first record"),
            zip(*found, strict=True),
            strict=True,
        ):
            print(f"{variant}: {statistics.median(values):.2f} {what} ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
