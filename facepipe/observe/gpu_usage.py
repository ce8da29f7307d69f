"""GPU utilisation, sampled in a thread through NVML (package nvidia-ml-py)."""

import statistics
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

from facepipe.extras import format_install

_INTERVAL_S = 0.2  # NVML's own figures are means over 1/6 s to 1 s
_GIB = 1 << 30


@dataclass(frozen=True)
class GpuFigures:
    """Utilisation over all samples of all GPUs.

    Attributes:
        gpus: number of GPUs that were sampled.
        samples: number of samples.
        busy_mean: mean share of the time in which a kernel ran, in percent.
        busy_p50: median of the same.
        memory_gib: largest memory use of one GPU, in GiB.
        why: the reason why there are no figures; empty if there are some.
    """

    gpus: int = 0
    samples: int = 0
    busy_mean: float = 0.0
    busy_p50: float = 0.0
    memory_gib: float = 0.0
    why: str = ""

    def __str__(self) -> str:
        if self.why:
            return f"no GPU figures: {self.why}"
        plural = "" if self.gpus == 1 else "s"
        busy = f"{self.busy_mean:.0f} % busy (p50 {self.busy_p50:.0f} %)"
        return f"{self.gpus} GPU{plural}, {busy}, {self.memory_gib:.1f} GiB at most"

    def to_dict(self) -> dict[str, Any]:
        """Return the figures for JSON, rounded to three decimals."""
        figures = asdict(self)
        return {name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()}


class GpuSampler:
    """A context manager that samples the GPUs while it is entered.

        with GpuSampler() as sampler:
            ...
        print(sampler.summarise())

    It never raises. If the module, the driver or a GPU is missing, the figures say so.
    """

    def __init__(
        self,
        selects: Callable[[int], bool] = lambda gpu: True,
        nvml: Any = None,
        interval_s: float = _INTERVAL_S,
    ) -> None:
        """Prepare a sampler; nothing runs yet.

        Args:
            selects: whether to sample the GPU of a number; all GPUs of the machine by default.
            nvml: the module pynvml; imported if None.
            interval_s: seconds between samples.
        """
        self._selects = selects
        self._nvml = nvml
        self._interval_s = interval_s
        self._busy: list[float] = []
        self._memory = 0
        self._handles: list[Any] = []
        self._why = "nothing was sampled"
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "GpuSampler":
        try:
            self._nvml = self._nvml or import_module("pynvml")
            self._nvml.nvmlInit()
            count = self._nvml.nvmlDeviceGetCount()
            self._handles = [self._nvml.nvmlDeviceGetHandleByIndex(gpu) for gpu in range(count) if self._selects(gpu)]
        except ImportError:
            self._why = f"nvidia-ml-py is not installed ({format_install('pynvml')})"
        except Exception as error:  # pynvml's exceptions have no common base class
            self._why = f"NVML says {error}"
        else:
            if not self._handles:
                self._why = "this machine has no GPU"
        if self._handles:
            self._thread = threading.Thread(target=self._sample, name="gpu-sampler", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._nvml.nvmlShutdown()

    def _sample(self) -> None:
        """Sample all GPUs until the context ends or NVML fails."""
        while not self._ended.wait(self._interval_s):
            try:
                for handle in self._handles:
                    self._busy.append(float(self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu))
                    self._memory = max(self._memory, int(self._nvml.nvmlDeviceGetMemoryInfo(handle).used))
            except Exception as error:
                self._why = f"NVML says {error}"
                return

    def summarise(self) -> GpuFigures:
        """Return the figures of the samples so far."""
        busy = list(self._busy)
        if not busy:
            return GpuFigures(why=self._why)
        return GpuFigures(
            gpus=len(self._handles),
            samples=len(busy),
            busy_mean=statistics.fmean(busy),
            busy_p50=statistics.median(busy),
            memory_gib=self._memory / _GIB,
        )
