"""Batches on a device: few shapes, powers of two, outputs in order, less at a time if memory is short, no common queue."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from facepipe.models.detectors.retinaface_engines import choose_canvas
from facepipe.models.runtime.device_batches import DeviceBatches, choose_batch_size
from facepipe.models.runtime.precision import set_float32_products
from facepipe.models.runtime.transfers import Download
from facepipe.stages import Detect
from facepipe.types import UInt8Image

CPU = torch.device("cpu")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    ),
]


def split(count: int, largest: int) -> list[int]:
    sizes = []
    while count > 0:
        sizes.append(choose_batch_size(count, largest))
        count -= sizes[-1]
    return sizes


@given(st.integers(1, 500), st.integers(0, 7))
def test_batches_are_powers_of_two_with_little_padding(count: int, exponent: int) -> None:
    sizes = split(count, 1 << exponent)
    assert all(size & (size - 1) == 0 and size <= 1 << exponent for size in sizes)
    assert count <= sum(sizes) <= 1.25 * count


@pytest.mark.parametrize("size", [384, 640])
def test_a_mix_of_photos_computes_little_more_than_it_has(size: int) -> None:
    """Tables of 256 photos with the aspects of photo collections: one in four has an aspect of its own."""
    rng = np.random.default_rng(1)
    stage = Detect(size=size)
    stage.__dict__["detector"] = type("Stride", (), {"stride": 32})
    frames = 0
    slots = 0
    pixels = 0
    computed = 0
    canvases: set[tuple[int, int]] = set()
    for _ in range(3):
        shapes: Counter[tuple[int, int]] = Counter()
        for _ in range(256):
            aspect = rng.choice([4 / 3, 3 / 2, 16 / 9, 1.0, 0.0], p=[0.35, 0.25, 0.1, 0.05, 0.25])
            aspect = aspect or float(np.exp(rng.normal(0, 0.35)))
            aspect = 1 / aspect if rng.random() < 0.35 else aspect
            side = int(rng.integers(641, 1280))
            height = round(side / max(aspect, 1))
            width = round(side * min(aspect, 1))
            box = stage.letterbox(np.zeros((max(height, 1), max(width, 1), 3), np.uint8), size)
            shapes[choose_canvas(*box.pixels.shape[:2])] += 1
            pixels += box.pixels.shape[0] * box.pixels.shape[1]
        for canvas, count in shapes.items():
            frames += count
            slots += sum(split(count, 32))
            computed += sum(split(count, 32)) * canvas[0] * canvas[1]
        canvases |= set(shapes)
    print(
        f"\n{size}: {slots / frames:.2f} slots a frame, {computed / pixels:.2f} of the pixels, {len(canvases)} shapes"
    )
    assert slots / frames <= 1.3
    assert computed / pixels <= 1.3
    assert len(canvases) <= 20


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_an_image_fits_its_canvas(height: int, width: int) -> None:
    canvas = choose_canvas(height, width)
    assert canvas[0] >= height
    assert canvas[1] >= width
    assert canvas == choose_canvas(*canvas), "few shapes"
    assert canvas[0] % 32 == canvas[1] % 32 == 0


def make_images(count: int) -> list[UInt8Image]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, 256, (4 + n % 3, 5 + n % 4, 3), np.uint8) for n in range(count)]


def sum_up(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    flat = images.long().flatten(1)
    return flat.sum(1), (flat > 0).sum(1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("max_batch", [1, 2, 16, 100])
def test_each_image_has_its_own_outputs_in_order(max_batch: int, device: str) -> None:
    images = make_images(29)
    batches = DeviceBatches(sum_up, torch.device(device), max_batch)
    for _ in range(3):
        outputs = batches.run(images, [(8, 8 + 8 * (n % 2)) for n in range(29)])
        assert [int(total) for total, _ in outputs] == [int(image.sum()) for image in images]
        assert [int(count) for _, count in outputs] == [image.size for image in images], "black beside the image"
    assert batches.run([], []) == []


def test_running_out_of_memory_halves_the_batch_and_loses_nothing() -> None:
    sizes = []

    def compute(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sizes.append(len(images))
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sum_up(images)

    images = make_images(40)
    batches = DeviceBatches(compute, CPU, 32)
    outputs = batches.run(images, [(8, 8)] * 40)
    assert [int(total) for total, _ in outputs] == [int(image.sum()) for image in images]
    assert sizes[:4] == [32, 16, 8, 4]
    assert batches.max_batch == 4


def test_what_does_not_fit_alone_and_other_errors_are_raised() -> None:
    def fail(error: Exception) -> DeviceBatches:
        def compute(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
            raise error

        return DeviceBatches(compute, CPU, 8)

    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: an illegal memory access")):
        with pytest.raises(RuntimeError, match="CUDA"):
            fail(error).run(make_images(3), [(8, 8)] * 3)


def test_large_frames_come_in_small_batches() -> None:
    sizes = []

    def compute(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sizes.append(images.shape[0] * images.shape[1] * images.shape[2])
        return (images[:, 0, 0, 0],)

    DeviceBatches(compute, CPU, 32).run([np.zeros((8, 8, 3), np.uint8)] * 5, [(1920, 1920)] * 5)
    assert max(sizes) <= 32 * 640 * 640


def test_no_thread_waits_for_what_another_has_queued() -> None:
    """The second look at an image gets its answer while the batches of other tables are still computed."""
    has_begun = threading.Event()
    may_end = threading.Event()

    def compute(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if images.shape[1] == 16:
            has_begun.set()
            assert may_end.wait(60)
        return sum_up(images)

    batches = DeviceBatches(compute, CPU, 8)
    with ThreadPoolExecutor(1) as pool:
        table = pool.submit(batches.run, make_images(8), [(16, 16)] * 8)
        assert has_begun.wait(60)
        second_look = batches.run(make_images(1), [(8, 8)])
        assert not table.done()
        may_end.set()
        assert len(table.result()) == 8
    assert len(second_look) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_downloaded_is_what_it_was(device: str) -> None:
    tensor = torch.arange(12, device=device).view(3, 4)
    download = Download(tensor)
    tensor.zero_()
    assert download.wait().tolist() == np.arange(12).reshape(3, 4).tolist()


def test_single_precision_is_ieee_unless_tf32_is_named() -> None:
    try:
        set_float32_products("tf32")
        assert torch.backends.cudnn.allow_tf32 is True
        for precision in ("float32", "float16"):
            set_float32_products(precision)
            assert torch.backends.cudnn.allow_tf32 is False
            assert torch.backends.cudnn.conv.fp32_precision in ("ieee", "none")
            assert torch.backends.cuda.matmul.allow_tf32 is False
    finally:
        set_float32_products("float32")
