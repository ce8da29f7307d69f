"""Memory: what this process holds and may still take, and keeping freed pages (glibc)."""

import ctypes
import os
from contextlib import suppress

# Parameters of glibc's mallopt.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_NEVER = 2**31 - 1

_CGROUP = "/sys/fs/cgroup"


def keep_freed_memory() -> None:
    """Make this process keep freed memory for its next allocations, if the C library is glibc.

    Otherwise the large tensors of a network are mapped again and zeroed by the kernel, layer by layer, step by step:
    a third to half of the time on a CPU.
    """
    with suppress(OSError, AttributeError):
        # Take blocks of up to 1 GiB from the heap, and never return the heap's end to the system.
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(_MMAP_THRESHOLD, 1 << 30)
        library.mallopt(_TRIM_THRESHOLD, _NEVER)


def measure_resident_memory() -> int:
    """Measure the resident bytes of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_available_memory() -> int:
    """Measure the bytes that programs may still take: on this machine, and in this container if it has a limit."""
    with open("/proc/meminfo") as file:
        sizes = dict(line.split(":", 1) for line in file)
    available = int(sizes["MemAvailable"].split()[0]) << 10
    with suppress(OSError, ValueError):
        # A container without a limit says "max", which is no number.
        limit = int(_read_text("memory.max"))
        # Cached files count as used, and give way.
        cached = dict(line.split() for line in _read_text("memory.stat").splitlines()).get("inactive_file", "0")
        available = min(available, limit - int(_read_text("memory.current")) + int(cached))
    return max(0, available)


def _read_text(name: str) -> str:
    with open(os.path.join(_CGROUP, name)) as file:
        return file.read()
