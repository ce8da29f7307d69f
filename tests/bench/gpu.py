"""The GPU's part of `embed`: images/s from decoded frames and photos, dlib's chips/s, and how busy the GPU is.

    python tests/bench/gpu.py [--device cuda] [--precision float32,tf32,float16] [--seconds 10] [--photos FOLDER]
    python tests/bench/gpu.py --device cpu --small       anywhere, to see that it runs

Without photos the frames are noise, in which there are no faces. The goal is what decoding gives: 1,500 photos/s.
"""

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import torch

from facepipe.arrow import pack_arrays
from facepipe.models.embedders.engines import TorchEmbedder
from facepipe.models.zoo.architectures import ARCHITECTURES
from facepipe.models.zoo.packaged import load_dlib_net
from facepipe.observe.gpu_usage import GpuSampler
from facepipe.schema import WORK_ITEM
from facepipe.stages import Align, Chain, Decode, Detect, Embed, Read
from facepipe.types import UInt8Image

WIDTH = 640
HEIGHT = 480
IMAGES_GOAL = 1_500
PARALLEL = 4


@dataclass(frozen=True)
class Load:
    """What is measured.

    Attributes:
        device: cuda, cuda:N or cpu.
        precision: Of the networks.
        seconds: How long.
    """

    device: str
    precision: str
    seconds: float


def list_photos(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("*.jpg")) if folder else []


def make_frames(photos: list[Path], count: int) -> list[UInt8Image]:
    """Make 640x480 frames: photos scaled and cropped, again and again; noise if there are none."""
    if not photos:
        print("no photos: the frames are noise, and nothing is embedded")
        return list(np.random.default_rng(0).integers(0, 256, (count, HEIGHT, WIDTH, 3), np.uint8))
    frames: list[UInt8Image] = []
    for file in photos:
        image = cv2.cvtColor(np.asarray(cv2.imread(str(file))), cv2.COLOR_BGR2RGB)
        scale = max(WIDTH / image.shape[1], HEIGHT / image.shape[0])
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        canvas = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        image = image[:HEIGHT, :WIDTH]
        canvas[: image.shape[0], : image.shape[1]] = image
        frames.append(canvas)
    return [frames[n % len(frames)] for n in range(count)]


def make_table(images: list[UInt8Image]) -> pa.Table:
    """Make what Decode gives of images of the full size; without files, so that nothing is decoded again."""
    n = len(images)
    columns = {"uri": [f"{k}" for k in range(n)], "image_id": [f"{k:032x}" for k in range(n)], "status": ["ok"] * n}
    columns |= {"error": pa.nulls(n, pa.string()), "bytes": pack_arrays([None] * n), "pixels": pack_arrays(images)}
    columns |= {
        "pixels_width": [WIDTH] * n,
        "pixels_height": [HEIGHT] * n,
        "width": [WIDTH] * n,
        "height": [HEIGHT] * n,
    }
    return pa.table(columns | {"pixels_scale": [1.0] * n, "pixels_left": [0.0] * n, "pixels_top": [0.0] * n})


def read_table(photos: list[Path], count: int) -> pa.Table:
    """Read photos, again and again, as work items that Read has read."""
    files = [photos[n % len(photos)] for n in range(count)]
    items = [{"uri": f"{n:05d}", "path": os.fsencode(file)} for n, file in enumerate(files)]
    return Read()(pa.Table.from_pylist(items, schema=WORK_ITEM))


def measure_images(table: pa.Table, load: Load, *, decode: bool, quick_look: int) -> str:
    """Measure images per second of the stages on tables like one, after the first four."""
    detect = Detect(device=load.device, precision=load.precision, quick_look=quick_look)  # type: ignore[arg-type]
    embed = Embed(device=load.device, precision=load.precision)  # type: ignore[arg-type]
    stages = [detect, Align(), embed]
    if decode:
        stages.insert(0, Decode(threads=len(os.sched_getaffinity(0))))  # type: ignore[arg-type]
    for stage in stages:
        stage.setup()
    # A chain cuts one table into batches. Its parts get the tables directly here, so that the stream has no end.
    chain = Chain(stages, table.num_rows, ahead=int(decode), parallel=PARALLEL)
    start: float | None = None

    def list_tables() -> Iterator[pa.Table]:
        while start is None or time.perf_counter() - start < load.seconds:
            yield table

    images = 0
    prepared = chain._run_stages(stages[: chain.ahead], list_tables())
    with GpuSampler() as sampler:
        for n, found in enumerate(chain._run_parallel(stages[chain.ahead :], prepared)):
            if n == PARALLEL:
                start = time.perf_counter()
            elif start is not None:
                images += len(set(found["uri"].to_pylist()))
        assert start is not None
        rate = images / (time.perf_counter() - start)
    return f"{rate:,.0f} images/s ({rate / IMAGES_GOAL:.0%} of {IMAGES_GOAL:,}); {sampler.summarise()}"


def measure_chips(load: Load, count: int) -> str:
    """Measure chips per second of dlib's network, sent from the host."""
    model_input = ARCHITECTURES["dlib-resnet"].input
    embedder = TorchEmbedder(load_dlib_net(), model_input, (150, 150), device=load.device, batches_on_cpu=True)
    embedder.configure(load.precision, 128)
    chips = np.random.default_rng(0).integers(0, 256, (count, 150, 150, 3), np.uint8)
    embedder.embed(chips)
    start = time.perf_counter()
    done = 0
    while time.perf_counter() - start < load.seconds:
        embedder.embed(chips)
        done += count
    return f"{done / (time.perf_counter() - start):,.0f} chips/s from the host, {count} per call"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="float32,tf32,float16")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--photos", default="", help="folder of JPEGs")
    parser.add_argument("--small", action="store_true", help="few frames")
    given = parser.parse_args()
    count = 4 if given.small else 256
    photos = list_photos(given.photos)
    frames = make_table(make_frames(photos, count))
    name = "cpu" if given.device == "cpu" else torch.cuda.get_device_name(given.device)
    print(f"{name}, {len(os.sched_getaffinity(0))} cores, {count} images per table, {PARALLEL} tables in work")
    for precision in given.precision.split(","):
        load = Load(given.device, precision, 0.1 if given.small else given.seconds)
        for quick_look in (0, 384):
            rate = measure_images(frames, load, decode=False, quick_look=quick_look)
            print(f"{precision}, decoded 640x480, quick_look={quick_look}: {rate}")
        if photos:
            rate = measure_images(read_table(photos, count), load, decode=True, quick_look=384)
            print(f"{precision}, photos from their bytes: {rate}")
        print(f"{precision}, dlib's network: {measure_chips(load, 8 if given.small else 512)}")


if __name__ == "__main__":
    main()
