"""The sampler of a GPU's load."""

import time
from types import SimpleNamespace

import pytest

from facepipe.observe.gpu_usage import GpuSampler


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
