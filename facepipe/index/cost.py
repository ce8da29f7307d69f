"""What a query costs, in nanoseconds of one core: measured on AMD EPYC with AVX-512 (docs/performance.md).

Only ratios decide: which of two settings is cheaper, and whether to scan everything instead. Of a GPU the figures are
estimated, not measured: an H200's data sheet says 989 TFLOP/s in half precision and 4.8 TB/s. A pair of 128-D vectors
takes 256 FLOP, at 40 % of that 0.65 ps, and its product is written (hidden behind the arithmetic) and read again, 2
bytes at 80 % of the bandwidth, 0.52 ps; a tenth more for what is picked out of it.
"""

from dataclasses import dataclass
from math import log

from facepipe.index.manifest import Manifest

_LIST = 250.0  # a list visited, in every shard
_CODE = 1.0  # a code scanned
_CANDIDATE = 350.0  # a candidate located and re-scored
PRODUCT = 3.6  # a vector compared exactly, in a matrix product
DEVICE_PRODUCT = 0.0013  # the same on a GPU
SENT = 60.0  # a vector's way to a GPU: 512 bytes read and copied by one thread at some 10 GB/s, 10 ns of PCIe 5
_PASSED_ON = 150.0  # a pair that a GPU could not rule out: compared and sorted by the host
BLOCK = 262_144  # vectors between which thresholds rise (facepipe.nearest.knn_gpu)
START = 6e9  # torch is loaded, and a CUDA context made: once a process, some seconds


@dataclass(frozen=True)
class Scan:
    """Scans of all vectors. queries: that share one; total: of all scans; k: nearest of each; cores: of the host; gpu:
    is there one."""

    queries: int
    total: int
    k: int
    cores: int
    gpu: bool = False


def of_lists(live: int, lists: int, shards: int, nprobe: int, rescore: int) -> float:
    """Visiting `nprobe` of the lists and re-scoring `rescore` candidates."""
    return nprobe * (_LIST * shards + _CODE * live / lists) + _CANDIDATE * rescore


def of_scan(live: int, scan: Scan) -> float:
    """Comparing a query with every vector; on a GPU what all cores of the host could do meanwhile."""
    if not scan.gpu:
        return PRODUCT * live
    passed_on = _PASSED_ON * scan.k * (1 + log(1 + live / BLOCK))
    once = START / max(1, scan.total) + SENT * live / max(1, scan.queries)
    return scan.cores * (DEVICE_PRODUCT * live + once) + passed_on


def scan_is_cheaper(manifest: Manifest, nprobe: int, rescore: int, scan: Scan | None = None) -> bool:
    """Whether comparing with every vector costs less than visiting lists. An exact index has no lists to visit."""
    live, lists = manifest.live, manifest.template.lists
    if not lists:
        return True
    cheapest = min(PRODUCT * live, of_scan(live, scan)) if scan else PRODUCT * live
    return cheapest < of_lists(live, lists, len(manifest.shards), nprobe, rescore)


def device_is_cheaper(live: int, scan: Scan) -> bool:
    """Whether a scan costs less on the GPU that is there than on the cores."""
    return scan.gpu and of_scan(live, scan) < PRODUCT * live
