"""How the GPUs of a run fare: counted in the gallery's marks, so that every worker and every runner knows.

A GPU fails if its library says so, whatever image it was given. The worker then ends, and a new one tries again. A GPU
that fails several times without finishing an image in between is left out. If no other GPU works, the run stops with
the error of the device. Images are not to blame, and none becomes `crashed` for it.
"""

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from facepipe import storage
from facepipe.errors import DeviceError, StorageError
from facepipe.storage.redact import redact
from pipelines.runtime.crash_marks import list_device_marks, locate_device_mark

# Failures without an image finished in between. Two may be of one image: in its block, and alone.
_MAX_FAILURES = 3
# How long a worker whose GPU fails waits to learn whether other GPUs work.
_MAX_WAIT_SECONDS = 120.0
_POLL_SECONDS = 0.5


class DeviceFaultError(Exception):
    """The GPU of this worker failed. The process must end, because every later call would fail too."""


@dataclass(frozen=True)
class DeviceRecord:
    """What is known of a GPU.

    Attributes:
        failures: failures since it last finished an image
        works: whether it has finished an image in this run
        name: name of the GPU
        error: its last error
    """

    failures: int = 0
    works: bool = False
    name: str = ""
    error: str = ""

    @property
    def is_failing(self) -> bool:
        """Whether the GPU is to be left out."""
        return self.failures >= _MAX_FAILURES


def name_device(device: str) -> str:
    """Name the GPU that a process uses, so that its name differs from those of all other GPUs of a cluster."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return f"{socket.gethostname()}, GPU {visible or device.partition(':')[2] or '0'}"


class DeviceHealth:
    """The record of one GPU, and those of the others of the run.

    Attributes:
        name: name of the GPU.
    """

    def __init__(self, folder: str, name: str, devices: int, wait_seconds: float = _MAX_WAIT_SECONDS):
        """Read the record of a GPU.

        Args:
            folder: folder of the workers' marks.
            name: name of the GPU.
            devices: number of GPUs of the run.
            wait_seconds: how long to wait for what becomes of other GPUs.
        """
        self.name = name
        self._folder = folder
        self._devices = devices
        self._wait_seconds = wait_seconds
        self._path = locate_device_mark(folder, name)
        self._record = _read_record(self._path)

    @property
    def is_failing(self) -> bool:
        """Whether the GPU is to be left out."""
        return self._record.is_failing

    def add_failure(self, error: BaseException) -> None:
        """Count a failure."""
        text = " ".join(redact(f"{type(error).__name__}: {error}").split())[:300]
        self._write(DeviceRecord(self._record.failures + 1, self._record.works, self.name, text))

    def add_success(self) -> None:
        """Note that the GPU has finished images. It is written once, and after each failure."""
        if self._record.failures or not self._record.works:
            self._write(DeviceRecord(0, True, self.name, self._record.error))

    def require_other(self, sleep: Callable[[float], object] = time.sleep) -> None:
        """Check that another GPU works; call it if this one is failing.

        Raises:
            DeviceError: No other GPU works.
        """
        end = time.monotonic() + self._wait_seconds
        while True:
            others = [_read_record(path) for path in list_device_marks(self._folder) if path != self._path]
            if any(other.works and not other.is_failing for other in others):
                return
            is_settled = len([other for other in others if other.is_failing]) >= self._devices - 1
            if is_settled or time.monotonic() >= end:
                raise DeviceError(
                    f"the GPU fails ({self.name}): {self._record.error}. No image was marked. Check the GPU with "
                    "nvidia-smi and the versions with `facepipe doctor`, or run on CPUs: export CUDA_VISIBLE_DEVICES="
                )
            sleep(_POLL_SECONDS)

    def _write(self, record: DeviceRecord) -> None:
        self._record = record
        storage.make_parent_folder(self._path)
        text = f"{record.failures} {int(record.works)}\n{record.name}\n{record.error}"
        storage.write(self._path, text.encode(), sync=False)


def _read_record(path: str) -> DeviceRecord:
    try:
        lines = [*storage.read(path).decode("utf-8", "replace").split("\n"), "", ""]
    except StorageError:
        return DeviceRecord()
    failures, _, works = lines[0].partition(" ")
    return DeviceRecord(int(failures) if failures.isdecimal() else 0, works == "1", lines[1], lines[2])
