"""The device-resident path: images/s from decoded 640x480 frames, dlib's chips/s, the rooflines beside them, and load.

    python tests/bench/gpu.py [--device cuda] [--precision float32,float16,bfloat16] [--seconds 10] [--threads 8]
    python tests/bench/gpu.py --device cpu --small       anywhere, to see that it runs

Frames are photos of ../shared, so that they have faces; without them noise, which has none. Goals, on one GPU of the
H200's class: 10,000 images/s of detection, alignment and embedding, and 40,000 chips/s of dlib's network.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from facepipe.arrow import pack_arrays
from facepipe.models.zoo.networks import load_detector_net, load_embedder_net
from facepipe.observe.gpu_usage import GpuSampler
from facepipe.stages import Align, Detect
from facepipe.stages.resident.embedding import ChipEmbedder
from facepipe.stages.resident.retinaface import ResidentRetinaFace
from facepipe.stages.resident.stage import FacesOnDevice

WIDTH, HEIGHT = 640, 480
IMAGES_GOAL, CHIPS_GOAL = 10_000, 40_000
PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "photos-dev"


def frames(count: int) -> list[np.ndarray]:
    """Photos scaled and cropped to 640x480, again and again; noise where there are none."""
    files = sorted(PHOTOS.glob("*.jpg"))
    if not files:
        print("no photos at ../shared: the frames are noise, and nothing is embedded")
        return list(np.random.default_rng(0).integers(0, 256, (count, HEIGHT, WIDTH, 3), np.uint8))
    made = []
    for file in files:
        image = cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB)
        scale = max(WIDTH / image.shape[1], HEIGHT / image.shape[0])
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        canvas = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        image = image[:HEIGHT, :WIDTH]
        canvas[: image.shape[0], : image.shape[1]] = image
        made.append(canvas)
    return [made[n % len(made)].copy() for n in range(count)]


def table(images: list[np.ndarray]) -> pa.Table:
    """What Decode gives of images of the full size; no files, so that nothing is decoded again."""
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


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def rate(call: Callable[[], object], items: int, seconds: float, device: str) -> float:
    """Items a second of a call, after two that are not counted."""
    for _ in range(2):
        call()
    wait(device)
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        call()
        done += items
    wait(device)
    return done / (time.perf_counter() - began)


def end_to_end(stage: FacesOnDevice, images: list[np.ndarray], seconds: float) -> tuple[float, float]:
    """(images/s, faces/s) of the stage in a stream of tables, from the third on."""
    given = table(images)
    stage.setup()

    def tables() -> Iterator[pa.Table]:
        while began is None or time.perf_counter() - began < seconds:
            yield given

    began: float | None = None
    done = faces = 0
    for n, found in enumerate(stage.stream(tables())):
        if n == 2:
            began = time.perf_counter()
        elif began is not None:
            done, faces = done + len(images), faces + found.num_rows - found["face_id"].null_count
    assert began is not None
    took = time.perf_counter() - began
    return done / took, faces / took


def traffic(net: nn.Module, call: Callable[[], object]) -> int:
    """Bytes that the network's layers read and write, each tensor once a layer, weights left aside."""
    moved = 0

    def count(_: nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        nonlocal moved
        moved += sum(t.numel() * t.element_size() for t in (*given, out))

    hooks = [m.register_forward_hook(count) for m in net.modules() if not list(m.children())]
    call()
    for hook in hooks:
        hook.remove()
    return moved


def bandwidths(device: str, size: int, seconds: float) -> tuple[float, float]:
    """Bytes/s from pinned memory to the device, and of a copy on it (read and written)."""
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device != "cpu")
    there = torch.empty(size, dtype=torch.uint8, device=device)
    other = torch.empty_like(there)
    up = rate(lambda: there.copy_(host, non_blocking=True), size, seconds, device)
    return up, rate(lambda: other.copy_(there), 2 * size, seconds, device)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="float32,float16,bfloat16")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--small", action="store_true", help="few frames, small batches")
    given = parser.parse_args()
    device, small = given.device, given.small
    name = "cpu" if device == "cpu" else torch.cuda.get_device_name(device)
    up, memory = bandwidths(device, 1 << 24 if small else 1 << 28, 0.2)
    images = frames(8 if small else 256)
    print(f"{name}; transfer {up / 1e9:.1f} GB/s, memory {memory / 1e9:.0f} GB/s, {len(images)} frames a table")
    print(f"transfer roofline {up / (WIDTH * HEIGHT * 3):,.0f} images/s of 640x480")
    sizes = {"frames": 4, "chips": 8} if small else {}
    for precision in given.precision.split(","):
        finder = ResidentRetinaFace(*load_detector_net("retinaface-mnet025"), device, precision)
        one = torch.zeros(1, HEIGHT, WIDTH, 3, dtype=torch.uint8, device=device)
        moved = traffic(finder.net, lambda f=finder, x=one: f.predict(x))
        print(f"\n{precision}: RetinaFace moves {moved / 1e6:.0f} MB an image, roofline {memory / moved:,.0f} images/s")
        for quick, thumbs in ((0, False), (0, True), (384, True)):
            stage = FacesOnDevice(Detect(quick_look=quick), Align(thumbs=thumbs), device=device, precision=precision)
            with GpuSampler() as sampler:
                chosen = replace(stage, threads=given.threads, **sizes)
                found, faces = end_to_end(chosen, images, given.seconds)
            print(
                f"  detect+align+embed, quick_look={quick}, thumbs={thumbs}: {found:,.0f} images/s "
                f"({found / IMAGES_GOAL:.0%} of {IMAGES_GOAL:,}), {faces:,.0f} faces/s; {sampler.summarise()}"
            )
        chips(device, precision, sizes.get("chips", 512), given.seconds)


def chips(device: str, precision: str, count: int, seconds: float) -> None:
    embedder = ChipEmbedder(load_embedder_net("dlib-resnet"), device, precision, flip=False, max_batch=count)
    batch = torch.randint(0, 256, (count, 150, 150, 3), dtype=torch.uint8, device=device)
    with GpuSampler() as sampler:
        found = rate(lambda: embedder(batch), count, seconds, device)
    with FlopCounterMode(display=False) as counter:
        embedder.embed(batch[:1])
    flops = counter.get_total_flops()
    print(
        f"  dlib's network, {embedder.batches.size} at a time: {found:,.0f} chips/s ({found / CHIPS_GOAL:.0%} of "
        f"{CHIPS_GOAL:,}), {found * flops / 1e12:.2f} TFLOP/s; {sampler.summarise()}"
    )


if __name__ == "__main__":
    main()
