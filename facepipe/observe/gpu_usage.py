"""How busy a machine's GPUs are, sampled in a thread through NVML (nvidia-ml-py); without it there are no figures."""

import statistics
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

_EVERY = 0.2  # seconds; NVML's own figures are means over 1/6 s to 1 s
_GIB = 1 << 30


@dataclass(frozen=True)
class GpuFigures:
    """Of all samples of all GPUs: share of the time in which a kernel ran, in percent, and memory in GiB.

    why: empty, or why there are no figures
    """

    gpus: int = 0
    samples: int = 0
    busy_mean: float = 0.0
    busy_p50: float = 0.0
    memory_gib: float = 0.0
    why: str = ""

    def __str__(self) -> str:
        if self.why:
            return f"no figures of the GPUs: {self.why}"
        busy = f"{self.busy_mean:.0f} % busy (p50 {self.busy_p50:.0f} %)"
        return f"{self.gpus} GPU{'s' * (self.gpus != 1)}, {busy}, {self.memory_gib:.1f} GiB at most"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: round(v, 3) if isinstance(v, float) else v for name, v in asdict(self).items()}


class Sampler:
    """Samples while it is entered: `with Sampler() as sampler: ...`, then `sampler.figures()`.

    nvml: the module pynvml, or None to import it; every: seconds between samples. All GPUs of the machine count, or
    those that `chosen` names. Never raises: where the module, the driver or a GPU is missing, `figures` says so
    """

    def __init__(self, chosen: Callable[[int], bool] = lambda n: True, nvml: Any = None, every: float = _EVERY):
        self._chosen, self._nvml, self._every = chosen, nvml, every
        self._busy: list[float] = []
        self._memory = 0
        self._handles: list[Any] = []
        self._why = "nothing was sampled"
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Sampler":
        try:
            self._nvml = self._nvml or import_module("pynvml")
            self._nvml.nvmlInit()
            count = self._nvml.nvmlDeviceGetCount()
            self._handles = [self._nvml.nvmlDeviceGetHandleByIndex(n) for n in range(count) if self._chosen(n)]
        except ImportError:
            self._why = "nvidia-ml-py is not installed (pip install 'facepipe[gpu]')"
        except Exception as error:  # pynvml's own exceptions derive from nothing else
            self._why = f"NVML says {error}"
        else:
            self._why = self._why if self._handles else "there is no GPU"
        if self._handles:
            self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._nvml.nvmlShutdown()

    def _run(self) -> None:
        while not self._ended.wait(self._every):
            try:
                for handle in self._handles:
                    self._busy.append(float(self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu))
                    self._memory = max(self._memory, int(self._nvml.nvmlDeviceGetMemoryInfo(handle).used))
            except Exception as error:
                self._why = f"NVML says {error}"
                return

    def figures(self) -> GpuFigures:
        """Of the samples so far."""
        busy = list(self._busy)
        if not busy:
            return GpuFigures(why=self._why)
        mean, median = statistics.fmean(busy), statistics.median(busy)
        return GpuFigures(len(self._handles), len(busy), mean, median, self._memory / _GIB)
