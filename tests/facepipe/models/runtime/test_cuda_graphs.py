"""Buckets of fixed size, transfers, and the sampler of a GPU's load."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from facepipe.models.runtime.cuda_graphs import CapturedShape, CudaGraphCache
from facepipe.models.runtime.transfers import Download, Uploads, fill_buffers, gather_pieces, send_array
from facepipe.observe.gpu_usage import GpuSampler

CPU = torch.device("cpu")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
def test_a_bucket_computes_its_full_size_whatever_it_is_given(device: str) -> None:
    seen: list[tuple[int, ...]] = []

    def function(items: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(items.shape))
        return items.float().flatten(1).sum(1, keepdim=True)

    buckets = CudaGraphCache(function, torch.device(device), max_shapes=2)
    for count in (4, 1, 3, 2, 4, 1, 3):  # so often that a GPU's is captured
        items = torch.randint(0, 255, (count, 5, 3), dtype=torch.uint8, device=device)
        assert torch.equal(buckets(items, 4), items.float().flatten(1).sum(1, keepdim=True))
    assert set(seen) == {(4, 5, 3)}
    assert len(buckets) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_the_shapes_used_last_are_kept(device: str) -> None:
    buckets = CudaGraphCache(lambda items: items + 1, torch.device(device), max_shapes=2)
    for side in (1, 1, 1, 1, 2, 2, 2, 2, 1, 3, 3, 3, 3, 1, 2):  # 3 takes the place of 2, then 2 that of 3
        ones = torch.ones(1, side, dtype=torch.uint8, device=device)
        assert torch.equal(buckets(ones, 2), ones + 1)
        assert len(buckets) <= 2
    assert [shape[1] for shape in buckets._captured] == [1, 2]
    buckets.clear()
    assert len(buckets) == 0


def test_what_cannot_be_captured_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(self: CapturedShape) -> None:
        tried.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    tried: list[int] = []
    monkeypatch.setattr(CapturedShape, "_capture", fails)
    bucket = CapturedShape(lambda items: items + 1, (2, 3), CPU, None)
    bucket.is_capturable = True
    for _ in range(9):
        assert torch.equal(bucket(torch.zeros(1, 3, dtype=torch.uint8)), torch.ones(1, 3, dtype=torch.uint8))
    assert len(tried) == 1
    assert "one by one" in caplog.text


@given(st.lists(st.integers(0, 40), max_size=8), st.integers(1, 30))
def test_buffers_are_filled_to_the_brim_in_order(sizes: list[int], size: int) -> None:
    arrays = [np.arange(n, dtype=np.uint8) + 10 * k for k, n in enumerate(sizes)]
    lists = list(fill_buffers(arrays, size))
    lengths = [sum(map(len, pieces)) for pieces in lists]
    assert all(length == size for length in lengths[:-1])
    assert not lengths or 0 < lengths[-1] <= size
    into = np.zeros(size, np.uint8)
    read = [into[: gather_pieces(pieces, into)].copy() for pieces in lists]
    assert np.concatenate([np.empty(0, np.uint8), *read]).tolist() == [v for array in arrays for v in array.tolist()]


@pytest.mark.parametrize("device", DEVICES)
def test_images_arrive_as_they_were(device: str) -> None:
    """Also those that are views, are cut by the buffer's end, or come while the one before is still on its way."""
    rng = np.random.default_rng(0)
    uploads = Uploads(torch.device(device), buffer_size=1000)
    for _ in range(5):
        images = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((9, 11), (30, 31), (1, 1), (5, 8))]
        images.append(images[0][::2, ::-1])
        there = uploads(images)
        assert there.cpu().numpy().reshape(-1).tolist() == [v for image in images for v in image.reshape(-1).tolist()]


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_fetched_is_what_it_was(device: str) -> None:
    tensor = torch.arange(12, device=device).view(3, 4)
    fetched = Download(tensor)
    tensor.zero_()
    assert fetched.wait().tolist() == np.arange(12).reshape(3, 4).tolist()
    assert send_array(np.arange(3), torch.device(device)).tolist() == [0, 1, 2]


class Nvml:
    """As pynvml, of a machine with two GPUs, one of them idle."""

    def __init__(self, fails: bool = False):
        self._fails = fails
        self.ended = False

    def nvmlInit(self) -> None:  # noqa: N802
        if self._fails:
            raise RuntimeError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, n: int) -> int:  # noqa: N802
        return n

    def nvmlDeviceGetUtilizationRates(self, n: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(gpu=80 if n == 0 else 0)

    def nvmlDeviceGetMemoryInfo(self, n: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(used=(3 - n) << 30)

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.ended = True


def test_the_sampler_sums_up_what_nvml_says() -> None:
    nvml = Nvml()
    with GpuSampler(nvml=nvml, interval_s=0.01) as sampler:
        time.sleep(0.2)
    found = sampler.summarise()
    assert found.gpus == 2
    assert found.samples >= 4
    assert found.busy_mean == pytest.approx(40)
    assert found.memory_gib == pytest.approx(3)
    assert nvml.ended
    assert "40 % busy" in str(found)
    with GpuSampler(selects=lambda n: n == 0, nvml=Nvml(), interval_s=0.01) as sampler:
        time.sleep(0.1)
    assert sampler.summarise().busy_p50 == 80


def test_without_nvml_there_are_no_figures_and_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with GpuSampler(nvml=Nvml(fails=True)) as sampler:
        pass
    assert "Driver Not Loaded" in str(sampler.summarise())

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("facepipe.observe.gpu_usage.import_module", missing)
    with GpuSampler() as sampler:
        pass
    assert sampler.summarise().samples == 0
    assert "not installed" in str(sampler.summarise())
    assert sampler.summarise().to_dict()["why"]
