"""Process memory: the resident size, and keeping freed pages (glibc)."""

import ctypes
import os
from contextlib import suppress

# Parameters of glibc's mallopt.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_NEVER = 2**31 - 1


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
